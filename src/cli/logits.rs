//! `torchless logits`: the logits of every position, as a safetensors file.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde_json::json;
use torchless::{Parameters, PipelineConfig};

use super::grid::{GridArgs, RunArgs};
use super::output::{print, print_json};
use super::{Outcome, files};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    grid: GridArgs,
    #[command(flatten)]
    run: RunArgs,

    /// A JSON array of token ids
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,

    /// Where to write them: a safetensors file with the one tensor `logits`, f32 [n, vocab]
    #[arg(long, value_name = "FILE")]
    out: PathBuf,

    /// Parts that the sequence is computed in, on several stages at the same time; more where a part would have above 64 positions
    #[arg(long, value_name = "M", default_value = "4")]
    micro_batches: NonZeroUsize,
}

pub fn run(args: &Args) -> Outcome {
    let tokens = files::read_ids(&args.tokens)?;
    files::check_writable(&args.out)?;
    let trace = args.run.trace.as_deref();
    let inputs: Vec<&Path> = [args.tokens.as_path(), args.grid.model.named()].into_iter().chain(trace).collect();
    files::check_apart(&args.out, &inputs)?;
    let params = Parameters::load(args.grid.model.path()?)?;
    let mut config = args.grid.config(&params, tokens.len());
    config.pipeline = PipelineConfig { num_micro_batches: args.micro_batches.get(), async_execution: true, ..config.pipeline };
    let loaded = args.grid.load(&args.run, &params, config)?;
    let fast = args.run.is_fast(false);
    let chunk = tokens.len().div_ceil(args.micro_batches.get());
    let logits = args.run.run(&loaded, fast, |state| {
        let model = &loaded.model;
        Ok(if fast {
            model.fast_prefill_logits_in_chunks(state, &tokens, chunk)?
        } else {
            model.prefill_logits_in_chunks(state, &tokens, chunk)?
        })
    })?;
    let shape = [tokens.len(), params.config().vocab_size];
    write(args, shape, &logits)?;
    if args.grid.json {
        return print_json(&json!({"out": args.out, "shape": shape}));
    }
    print(&format!("logits [{}, {}] are in {}\n", shape[0], shape[1], args.out.display()))
}

/// safetensors: the header's length in 8 bytes, the header padded with spaces, the data.
fn write(args: &Args, shape: [usize; 2], logits: &[f32]) -> Outcome {
    let header = json!({"logits": {"dtype": "F32", "shape": shape, "data_offsets": [0, size_of_val(logits)]}}).to_string();
    let length = header.len().next_multiple_of(8);
    files::write(&args.out, |file| {
        file.write_all(&(length as u64).to_le_bytes())?;
        write!(file, "{header:<length$}")?;
        logits.iter().try_for_each(|logit| file.write_all(&logit.to_le_bytes()))
    })
}
