//! `torchless chat`: a conversation with a model, turn by turn.

mod lines;
mod stop;

use std::time::Instant;

use serde_json::{Value, json};
use torchless::{ChatMessage, ChatTemplate, Error, FinishReason, InferenceState, Parameters, TensorParallelMistral, Tokenizer};

use super::grid::{GridArgs, RunArgs};
use super::output::{print, print_json};
use super::sampling::SamplingArgs;
use super::{Outcome, note};
use lines::{Line, Lines};

/// Positions of a conversation unless `--context` or the model say otherwise.
const CONTEXT: usize = 4096;

/// Tokens of a prompt that are computed before anybody looks for ctrl-C.
const PART: usize = 256;

const HELP: &str = "every line is for the model; /reset begins anew, /system TEXT sets the system message, /exit or ctrl-D ends, ctrl-C \
                    stops an answer; //TEXT is a line that begins with /";

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    grid: GridArgs,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    sampling: SamplingArgs,

    /// What the model is told in front of the conversation
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,

    /// Tokens of an answer at most
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_tokens: usize,
}

pub fn run(args: &Args) -> Outcome {
    // What can be wrong of an answer's options is told now, and not when the first line has been typed.
    let seed = args.sampling.seed()?;
    let params = Parameters::load(args.grid.model.path()?)?;
    let template = params.chat_template()?;
    let tokenizer = params.tokenizer()?;
    let system = args.system.clone().filter(|text| !text.is_empty());
    // So is whether the template takes a system message.
    template.render(&messages(system.as_deref(), &[ChatMessage::user("Hello!")]), true)?;

    let positions = args.grid.context.map_or(CONTEXT, std::num::NonZeroUsize::get);
    let config = args.grid.config(&params, positions);
    let loaded = args.grid.load(&args.run, &params, config)?;
    let fast = args.run.is_fast(true);
    stop::listen()?;
    let end = Some(tokenizer.encode_continuation(template.eos())?).filter(|ids| ids.len() == 1).map(|ids| ids[0]);
    let is_untold = args.sampling.is_seed_news() && !args.grid.json;
    let mut chat =
        Chat { args, model: &loaded.model, template, tokenizer, end, fast, seed, is_untold, system, said: Vec::new(), turns: Vec::new() };
    args.run.run(&loaded, fast, |state| chat.talk(state))?;
    if args.grid.json {
        return print_json(&json!({
            "messages": messages(chat.system.as_deref(), &chat.said),
            "turns": chat.turns,
            "context": loaded.model.context(),
            "seed": (!args.sampling.is_greedy()).then_some(seed),
        }));
    }
    Ok(())
}

struct Chat<'a> {
    args: &'a Args,
    model: &'a TensorParallelMistral,
    template: ChatTemplate,
    tokenizer: &'a Tokenizer,
    /// The template's end of an answer, whether or not the model's files count it among those that end a text.
    end: Option<u32>,
    fast: bool,
    seed: u64,
    /// The seed is to be told.
    is_untold: bool,
    system: Option<String>,
    /// What users and the model have said.
    said: Vec<ChatMessage>,
    /// What became of each turn, for `--json`.
    turns: Vec<Value>,
}

impl Chat<'_> {
    fn talk(&mut self, state: &mut InferenceState) -> Outcome {
        let mut lines = Lines::new()?;
        if lines.is_terminal() {
            note(HELP);
        }
        while let Some(line) = lines.next()? {
            match line {
                Line::Say(text) => self.turn(state, text)?,
                Line::Reset => self.said.clear(),
                Line::System(text) => self.system = Some(text).filter(|text| !text.is_empty()),
                Line::Help => note(HELP),
                Line::Unknown(command) => note(format_args!("there is no command {command}: {HELP}")),
            }
        }
        Ok(())
    }

    /// Answers `text`. What can't be answered is not part of the conversation.
    fn turn(&mut self, state: &mut InferenceState, text: String) -> Outcome {
        self.said.push(ChatMessage::user(text));
        let limit = self.model.context();
        let refusal = match self.prompt() {
            Ok(prompt) if prompt.len() <= limit => return self.answer(state, &prompt),
            Ok(prompt) => {
                self.turns.push(
                    json!({"prompt_tokens": prompt.len(), "kept_tokens": 0, "tokens": 0, "finish": FinishReason::Context.to_string()}),
                );
                let n = prompt.len();
                format!("the conversation has grown to {n} tokens, and the context has {limit}: /reset begins anew, --context makes room")
            }
            Err(error) => {
                self.turns.push(json!({"prompt_tokens": 0, "kept_tokens": 0, "tokens": 0, "finish": "refused"}));
                error.to_string()
            }
        };
        note(refusal);
        self.said.pop();
        Ok(())
    }

    /// The whole conversation as tokens. The template writes the special ones, so none are put in front.
    fn prompt(&self) -> Result<Vec<u32>, Error> {
        let text = self.template.render(&messages(self.system.as_deref(), &self.said), true)?;
        let prompt = self.tokenizer.encode_continuation(&text)?;
        if prompt.is_empty() { Err(Error::EmptyPrompt) } else { Ok(prompt) }
    }

    /// Computes tokens part by part, so that ctrl-C need not wait for all of a long prompt; whether it came to the end.
    fn prefill(&self, state: &mut InferenceState, tokens: &[u32], answering: &stop::Answering) -> Outcome<bool> {
        for part in tokens.chunks(PART) {
            if answering.is_stopped() {
                return Ok(false);
            }
            if self.fast { self.model.fast_prefill(state, part)? } else { self.model.prefill(state, part)? }
        }
        Ok(true)
    }

    fn answer(&mut self, state: &mut InferenceState, prompt: &[u32]) -> Outcome {
        // All but the last at most: its logits are needed.
        let kept = prompt[..prompt.len() - 1].iter().zip(state.tokens()).take_while(|(a, b)| a == b).count();
        state.truncate(kept);
        // The first turn is that of `generate`, and no turn repeats the draws of another.
        let seed = self.seed.wrapping_add(self.turns.len() as u64);
        let options = self.args.sampling.generate(seed, self.args.max_tokens, self.fast);
        let (start, mut text, mut n, mut finish) = (Instant::now(), String::new(), 0, FinishReason::Length.to_string());
        let is_json = self.args.grid.json;
        let answering = stop::Answering::begin();
        let (before, last) = prompt.split_at(prompt.len() - 1);
        let is_in = self.prefill(state, &before[kept..], &answering)?;
        if !is_in {
            finish = "interrupted".into();
        }
        let answer = is_in.then(|| torchless::generate(self.model, state, last, options));
        for token in answer.into_iter().flatten() {
            let token = token?;
            if std::mem::take(&mut self.is_untold) {
                note(format_args!("seed {}", self.seed));
            }
            n += 1;
            // Many models begin with a space, which belongs to the conversation but not on the screen.
            let shown = if text.trim_start().is_empty() { token.text.trim_start() } else { &token.text };
            if !is_json {
                print(shown)?;
            }
            text += &token.text;
            if let Some(reason) = token.finish {
                finish = reason.to_string();
            } else if self.end == Some(token.id) {
                finish = FinishReason::Eos.to_string();
                break;
            } else if answering.is_stopped() {
                finish = "interrupted".into();
                break;
            }
        }
        drop(answering);
        if !is_json {
            print("\n")?;
        }
        match &*finish {
            "interrupted" => note("the answer was stopped; what there is of it stays in the conversation"),
            "context" => note("the answer ends because the context is full: /reset begins anew, --context makes room"),
            "length" => note(format_args!("the answer ends after {n} tokens; --max-tokens allows more")),
            _ => {}
        }
        self.turns.push(json!({
            "prompt_tokens": prompt.len(),
            "kept_tokens": kept,
            "tokens": n,
            "finish": finish,
            "seconds": start.elapsed().as_secs_f64(),
        }));
        self.said.push(ChatMessage::assistant(text));
        Ok(())
    }
}

/// A conversation, with what the model is told in front.
fn messages(system: Option<&str>, said: &[ChatMessage]) -> Vec<ChatMessage> {
    system.map(ChatMessage::system).into_iter().chain(said.iter().cloned()).collect()
}
