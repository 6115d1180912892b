//! One model cut into stages that work at the same time: several stories at once, and a picture of who computed what when.
//!
//! ```sh
//! cargo run --release --example pipeline
//! cargo run --release --example pipeline -- --devices cpu,gpu:0 --svg timeline.svg
//! ```

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use futures::executor::block_on_stream;
use torchless::{
    Completion, Device, GenerateOptions, InferenceState, ParallelConfig, Parameters, PipelineParallelMistral, SamplerOptions, Scheduler,
    SchedulerConfig, generate,
};

/// Micro-batches that a prompt is cut into.
const MICRO_BATCHES: usize = 8;
/// Columns of the pictures.
const COLUMNS: usize = 110;

const PROMPTS: [&str; 4] = [
    "Once upon a time, there was a little fox named Rusty.",
    "Lily had a red ball.",
    "One windy evening, Tom heard a sound.",
    "Mia and her grandmother wanted to bake a cake.",
];

#[derive(Parser)]
struct Args {
    /// A model in the Hugging Face layout
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/tiny-stories"))]
    model: PathBuf,
    /// Devices, a stage each, such as cpu,gpu:0; by default every hardware GPU
    #[arg(long, value_name = "LIST")]
    devices: Option<String>,
    /// A story's beginning; may be given several times
    #[arg(long, value_name = "TEXT", default_values = PROMPTS)]
    prompt: Vec<String>,
    /// Draw the prefill into this SVG file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("pipeline: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    // Where there is no desktop, Mesa's layer that picks a default device complains on stderr. We ask for all of them.
    // SAFETY: this is the only thread so far.
    unsafe { std::env::set_var("NODEVICE_SELECT", "1") };

    let mut chosen = Device::parse_list(args.devices.as_deref().unwrap_or("auto"))?;
    // One stage has nothing to overlap with.
    if chosen.len() == 1 {
        chosen = vec![chosen[0].clone(); 2];
    }
    let params = Parameters::load(&args.model)?;
    let model = PipelineParallelMistral::load_grid(params, ParallelConfig::pipeline(MICRO_BATCHES).kv_positions(4096), chosen)?;
    println!("A stage holds some of the layers, and its own thread drives it:");
    for stage in model.ranks() {
        println!(
            "  stage {}  {:<6} layers {:<6} {:>10} bytes",
            stage.stage,
            stage.device,
            format!("{:?}", stage.layers),
            stage.weight_bytes
        );
    }

    let scheduler = Scheduler::new(&model, SchedulerConfig::default())?;
    let options = GenerateOptions { sampling: SamplerOptions { seed: Some(7), ..Default::default() }, ..Default::default() };
    let (start, mut stories, mut n) = (Instant::now(), Vec::new(), 0);
    for (prompt, story) in args.prompt.iter().zip(submit(&scheduler, &args.prompt, &options)?) {
        let mut text = prompt.clone();
        for token in block_on_stream(story) {
            text += &token?.text;
            n += 1;
        }
        println!("\n{text}");
        stories.push(text);
    }
    let together = f64::from(n) / start.elapsed().as_secs_f64();
    let (start, mut n, mut alone) = (Instant::now(), 0, args.prompt[0].clone());
    for token in generate(&model, &mut InferenceState::new(model.config()), &args.prompt[0], options.clone()) {
        alone += &token?.text;
        n += 1;
    }
    let is_same = if alone == stories[0] { "the same text" } else { "another text" };
    let rate = f64::from(n) / start.elapsed().as_secs_f64();
    println!("\n{} texts at once: {together:.0} tokens a second. The first of them alone: {is_same}, {rate:.0} a second.", stories.len());

    // The stories are a longer prompt. What they took of the cache is not needed any more.
    scheduler.forget_prefixes();
    let mut tokens = model.parameters().tokenizer()?.encode(&stories.concat())?;
    tokens.truncate(model.context().min(384));
    let mut state = InferenceState::new(model.config());
    model.start_trace();
    model.prefill(&mut state, &tokens)?;
    let prefill = model.timeline()?;
    println!(
        "\nA prompt of {} tokens in {MICRO_BATCHES} micro-batches: each stage computes one while the next computes the one before.",
        tokens.len()
    );
    print!("{}", prefill.text(COLUMNS));

    for token in generate(&model, &mut InferenceState::new(model.config()), &args.prompt[0], few(&options)) {
        token?;
    }
    let decode = model.timeline()?.between(prefill.range_ms().1, f64::INFINITY)?;
    println!("\nA text's beginning, and its next tokens one by one: each waits for all stages to compute the one before.");
    print!("{}", decode.text(COLUMNS));

    if stories.len() > 1 {
        for story in submit(&scheduler, &args.prompt, &few(&options))? {
            block_on_stream(story).try_for_each(|token| token.map(drop))?;
        }
        let together = model.timeline()?.between(decode.range_ms().1, f64::INFINITY)?;
        println!("\nThe same of all {} texts: while one stage computes some of them, another computes others.", stories.len());
        print!("{}", together.text(COLUMNS));
    }

    if let Some(path) = &args.svg {
        std::fs::write(path, prefill.svg()).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        println!("\nThe prefill is drawn in {}", path.display());
    }
    Ok(())
}

/// Hands all prompts in before the first token is taken.
fn submit(scheduler: &Scheduler, prompts: &[String], options: &GenerateOptions) -> torchless::Result<Vec<Completion>> {
    prompts.iter().map(|prompt| scheduler.submit(prompt, options.clone())).collect()
}

/// As few tokens as a picture can show.
fn few(options: &GenerateOptions) -> GenerateOptions {
    GenerateOptions { max_tokens: 8, ..options.clone() }
}
