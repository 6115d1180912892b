//! One turn of a conversation: `cargo run --release --example chat -- [DIRECTORY] [QUESTION]`.
//!
//! The model in this repository tells stories, has never seen a conversation and has no chat template. So it gets one that only puts
//! what was said in a row, and goes on with the story instead of answering.

use std::io::{Write, stdout};

use torchless::{
    ChatMessage, ChatTemplate, GenerateOptions, InferenceState, Parameters, SamplerOptions, TensorParallelConfig, TensorParallelMistral,
    generate,
};

const STORIES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/tiny-stories");
const IN_A_ROW: &str = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let directory = args.next();
    let question = args.next().unwrap_or_else(|| "Once upon a time, there was a little fox named Rusty.".into());

    let params = Parameters::load(directory.as_deref().unwrap_or(STORIES))?;
    let template = match directory {
        Some(_) => params.chat_template()?,
        None => ChatTemplate::new(IN_A_ROW, "<s>", "</s>")?,
    };
    let config = torchless::ParallelConfig::from(TensorParallelConfig::new(1, 0)).kv_positions(2048);
    let model = TensorParallelMistral::load(params, config)?;

    let text = template.render(&[ChatMessage::user(question)], true)?;
    println!("The template makes of it: {text:?}\n");
    // It has written the special tokens, so none are put in front.
    let prompt = model.parameters().tokenizer()?.encode_continuation(&text)?;
    let sampling = SamplerOptions { seed: Some(7), ..Default::default() };
    let options = GenerateOptions { sampling, fast: true, ..Default::default() };
    for token in generate(&model, &mut InferenceState::new(model.config()), &prompt, options) {
        print!("{}", token?.text);
        stdout().flush()?;
    }
    println!();
    Ok(())
}
