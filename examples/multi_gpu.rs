//! One model split over every GPU of this machine, telling a story.
//!
//! ```sh
//! cargo run --release --example multi_gpu
//! cargo run --release --example multi_gpu -- --devices cpu,gpu:0 --prompt "Lily had a red ball."
//! ```

use std::io::{Write, stdout};
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use torchless::{
    Device, GenerateOptions, InferenceState, ParallelConfig, Parameters, SamplerOptions, TensorParallelMistral, devices, generate,
};

#[derive(Parser)]
struct Args {
    /// A model in the Hugging Face layout
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/tiny-stories"))]
    model: PathBuf,
    /// Devices, a rank each, such as cpu,gpu:0; by default every hardware GPU
    #[arg(long, value_name = "LIST")]
    devices: Option<String>,
    #[arg(long, value_name = "TEXT", default_value = "Once upon a time, there was a little fox named Rusty.")]
    prompt: String,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("multi_gpu: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    // Where there is no desktop, Mesa's layer that picks a default device complains on stderr. We ask for all of them.
    // SAFETY: this is the only thread so far.
    unsafe { std::env::set_var("NODEVICE_SELECT", "1") };

    println!("Devices of this machine:");
    for device in devices() {
        println!("  {:<6} {} ({}, {})", device.label(), device.name(), device.kind().name(), device.backend());
    }
    let mut chosen = Device::parse_list(args.devices.as_deref().unwrap_or("auto"))?;
    if args.devices.is_none() && chosen.iter().all(Device::is_cpu) {
        println!("No hardware GPU here, so two ranks share the CPU.");
        chosen = vec![Device::cpu(), Device::cpu()];
    }

    let params = Parameters::load(&args.model)?;
    let config = ParallelConfig::default().kv_positions(params.config().max_position_embeddings.min(4096));
    let model = TensorParallelMistral::load_grid(params.clone(), config.clone(), chosen)?;
    println!("\nWho owns what:");
    println!("  rank  device  heads   KV heads  channels      vocabulary           bytes");
    let range = |r: &Range<usize>| format!("{}..{}", r.start, r.end);
    for rank in model.ranks() {
        let p = &rank.partition;
        let [heads, kv_heads, channels, vocab] = [&p.heads, &p.kv_heads, &p.channels, &p.vocab].map(range);
        println!(
            "  {:<4}  {:<6}  {heads:<6}  {kv_heads:<8}  {channels:<12}  {vocab:<14}  {:>10}",
            rank.rank, rank.device, rank.weight_bytes
        );
    }

    print!("\n{}", args.prompt);
    let mut state = InferenceState::new(model.config());
    let options = GenerateOptions { sampling: SamplerOptions { seed: Some(7), ..Default::default() }, fast: true, ..Default::default() };
    let (start, mut n) = (Instant::now(), 0);
    for token in generate(&model, &mut state, &args.prompt, options) {
        print!("{}", token?.text);
        stdout().flush()?;
        n += 1;
    }
    println!("\n\n{n} tokens, {:.1} a second", f64::from(n) / start.elapsed().as_secs_f64());

    // The same tokens, exactly, on the split model and on one CPU rank.
    let tokens = &state.tokens()[..state.position().min(64)];
    let split = model.prefill_logits(&mut InferenceState::new(model.config()), tokens)?;
    let reference = TensorParallelMistral::load(params, config)?;
    let whole = reference.prefill_logits(&mut InferenceState::new(reference.config()), tokens)?;
    let largest = split.iter().zip(&whole).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("Largest difference of a logit from one CPU rank, over {} positions: {largest:.1e}", tokens.len());
    Ok(())
}
