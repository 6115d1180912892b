use std::path::Path;
use std::sync::Mutex;

use super::course::{begun_stop, first_stop};
use super::*;

/// A model that says a fixed sequence of tokens, over and over, and remembers what it was asked.
struct Scripted {
    parameters: Parameters,
    script: Vec<u32>,
    calls: Mutex<Vec<String>>,
}

impl Scripted {
    fn new(script: Vec<u32>) -> Self {
        Self::of("examples/models/tiny-stories", script)
    }

    fn of(checkpoint: &str, script: Vec<u32>) -> Self {
        let parameters = Parameters::load(Path::new(env!("CARGO_MANIFEST_DIR")).join(checkpoint)).unwrap();
        Self { parameters, script, calls: Mutex::default() }
    }

    /// That says `text`, then the end of the sequence.
    fn saying(text: &str) -> Self {
        let mut model = Self::new(Vec::new());
        model.script = model.parameters.tokenizer().unwrap().encode_continuation(text).unwrap();
        model.script.push(2);
        model
    }

    fn compute(&self, call: &str, state: &mut InferenceState, tokens: &[u32]) -> Result<()> {
        let mut calls = self.calls.lock().unwrap();
        calls.push(format!("{call} {tokens:?}"));
        let mut logits = vec![0.0; self.config().vocab_size];
        logits[self.script[(calls.len() - 1) % self.script.len()] as usize] = 9.0;
        state.tokens.extend(tokens);
        state.logits = logits;
        Ok(())
    }

    /// Every token's text, and why it ended.
    fn run(&self, prompt: &str, options: GenerateOptions) -> (Vec<String>, Option<FinishReason>) {
        let mut state = InferenceState::new(self.config());
        let tokens: Vec<Token> = generate(self, &mut state, prompt, options).map(Result::unwrap).collect();
        assert!(tokens.iter().rev().skip(1).all(|t| t.finish.is_none()), "only the last token has a reason");
        (tokens.iter().map(|t| t.text.clone()).collect(), tokens.last().and_then(|t| t.finish))
    }
}

impl Model for Scripted {
    fn config(&self) -> &Config {
        self.parameters.config()
    }
    fn parameters(&self) -> &Parameters {
        &self.parameters
    }
    fn context(&self) -> usize {
        self.config().max_position_embeddings
    }
    fn try_forward(&self, state: &mut InferenceState, token: u32) -> Result<()> {
        self.compute("forward", state, &[token])
    }
    fn try_fast_forward(&self, state: &mut InferenceState, token: u32) -> Result<()> {
        self.compute("fast forward", state, &[token])
    }
    fn prefill(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<()> {
        self.compute("prefill", state, tokens)
    }
    fn fast_prefill(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<()> {
        self.compute("fast prefill", state, tokens)
    }
}

fn greedy() -> GenerateOptions {
    GenerateOptions { sampling: SamplerOptions::greedy(), ..GenerateOptions::default() }
}

fn stops(stops: &[&str]) -> GenerateOptions {
    GenerateOptions { stop: stops.iter().map(ToString::to_string).collect(), ..greedy() }
}

#[test]
fn the_text_goes_on_behind_the_prompt_and_ends_with_the_sequence() {
    let (texts, finish) = Scripted::saying("was red. 漢字!").run("The ball", greedy());
    assert_eq!((texts.concat().as_str(), finish), (" was red. 漢字!", Some(FinishReason::Eos)));
}

#[test]
fn any_of_the_end_tokens_ends_it() {
    let copy = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/tiny-stories").join(file);
        std::fs::copy(from, copy.path().join(file)).unwrap();
    }
    std::fs::write(copy.path().join("generation_config.json"), r#"{"bos_token_id": 1, "eos_token_id": [2, 812]}"#).unwrap();
    for end in [2, 812] {
        let model = Scripted { parameters: Parameters::load(copy.path()).unwrap(), script: vec![272, end], calls: Mutex::default() };
        assert_eq!(model.run("a", greedy()), (vec![".".into(), String::new()], Some(FinishReason::Eos)));
    }
}

#[test]
fn it_ends_after_as_many_tokens_as_asked_and_gives_out_what_it_held() {
    let model = Scripted::saying("漢字");
    let (texts, finish) = model.run("a", GenerateOptions { max_tokens: 3, ..greedy() });
    assert_eq!(texts, [" ", "", "\u{FFFD}\u{FFFD}"]);
    assert_eq!(finish, Some(FinishReason::Length));
    assert_eq!(model.run("a", GenerateOptions { max_tokens: 0, ..greedy() }), (vec![], None));
}

#[test]
fn a_full_context_is_a_reason_and_no_error() {
    let model = Scripted::new(vec![272]);
    let mut state = InferenceState::new(model.config());
    let prompt = vec![356; 509];
    let tokens: Vec<Token> = generate(&model, &mut state, prompt, greedy()).map(Result::unwrap).collect();
    // Three tokens fill positions 509, 510 and 511; the fourth has no position and needs none.
    assert_eq!(tokens.len(), 4);
    assert_eq!(tokens[3].finish, Some(FinishReason::Context));
    assert_eq!(state.position(), 512);
}

#[test]
fn each_token_is_computed_once_and_the_last_not_at_all() {
    for (fast, prefix) in [(false, ""), (true, "fast ")] {
        let model = Scripted::new(vec![5, 6, 7]);
        let mut state = InferenceState::new(model.config());
        let ids: Vec<u32> =
            generate(&model, &mut state, &[1, 9], GenerateOptions { max_tokens: 3, fast, ..greedy() }).map(|t| t.unwrap().id).collect();
        assert_eq!(ids, [5, 6, 7]);
        assert_eq!(
            *model.calls.lock().unwrap(),
            [format!("{prefix}prefill [1, 9]"), format!("{prefix}forward [5]"), format!("{prefix}forward [6]")]
        );
        assert_eq!(state.tokens(), [1, 9, 5, 6]);
    }
}

#[test]
fn nothing_is_computed_before_it_is_asked_for_or_after_the_drop() {
    let model = Scripted::new(vec![5]);
    let mut state = InferenceState::new(model.config());
    let mut tokens = generate(&model, &mut state, "a", greedy());
    assert!(model.calls.lock().unwrap().is_empty());
    tokens.next();
    drop(tokens);
    assert_eq!(model.calls.lock().unwrap().len(), 1);
}

#[test]
fn a_second_prompt_goes_on_without_special_tokens() {
    let model = Scripted::saying("two");
    let mut state = InferenceState::new(model.config());
    model.prefill(&mut state, &[1, 9]).unwrap();
    generate(&model, &mut state, "a", GenerateOptions { max_tokens: 1, ..greedy() }).for_each(|t| drop(t.unwrap()));
    assert_eq!(state.tokens(), [1, 9, 356]);
}

#[test]
fn text_is_cut_before_a_stop_wherever_tokens_end() {
    let text = "one two three. two four";
    for (list, wanted) in [
        (&["two"][..], " one "),
        (&["three.", "two t"], " one "),
        (&["e two three. tw", "wo"], " one t"),
        (&["ee", "three"], " one two "),
        (&["o", "one"], " "),
        (&["four!"], " one two three. two four"),
        (&[" "], ""),
    ] {
        let (texts, finish) = Scripted::saying(text).run("a", stops(list));
        let reason = if list == ["four!"] { FinishReason::Eos } else { FinishReason::Stop };
        assert_eq!((texts.concat().as_str(), finish), (wanted, Some(reason)), "{list:?}: {texts:?}");
    }
}

#[test]
fn a_stop_is_found_across_any_cuts_of_the_text() {
    let text = "abcababcabdéabé";
    let lists = [vec!["ababcabd"], vec!["bdé", "cab"], vec!["dé", "é"], vec!["abé", "zz"], vec!["caba", "abab"]];
    for list in lists {
        let stops: Vec<String> = list.iter().map(ToString::to_string).collect();
        // What a search through the whole text finds, ends first.
        let whole = &text[..first_stop(text, &stops).unwrap()];
        for cuts in 0u32..1 << 14 {
            let (mut held, mut out, mut stopped) = (String::new(), String::new(), false);
            for (i, c) in text.chars().enumerate() {
                held.push(c);
                if cuts >> i & 1 == 1 || i == text.chars().count() - 1 {
                    if let Some(start) = first_stop(&held, &stops) {
                        out += &held[..start];
                        stopped = true;
                        break;
                    }
                    let certain = held.len() - begun_stop(&held, &stops);
                    out.extend(held.drain(..certain));
                }
            }
            assert!(stopped && out == whole, "{list:?}, cuts {cuts:b}: {out:?} for {whole:?}");
        }
    }
}

#[test]
fn text_that_may_begin_a_stop_is_held_back_and_given_out_when_it_does_not() {
    let (texts, _) = Scripted::saying("a b c").run("x", stops(&["b d"]));
    assert!(texts.iter().all(|text| text != " b"), "{texts:?}");
    assert_eq!(texts.concat(), " a b c");
}

#[test]
fn a_model_without_a_tokenizer_generates_from_tokens_alone() {
    let model = Scripted::of("tests/fixtures/uneven", vec![7, 2]);
    let mut state = InferenceState::new(model.config());
    let tokens: Vec<Token> = generate(&model, &mut state, &[1], greedy()).map(Result::unwrap).collect();
    assert_eq!(tokens.iter().map(|t| (t.id, t.text.as_str())).collect::<Vec<_>>(), [(7, ""), (2, "")]);
    for (prompt, options) in [(Prompt::from("text"), greedy()), (Prompt::from(&[1]), stops(&["x"]))] {
        let items: Vec<_> = generate(&model, &mut state, prompt, options).collect();
        assert!(matches!(items[..], [Err(Error::Tokenizer(_))]), "{items:?}");
    }
}

#[test]
fn what_makes_no_sense_is_the_first_and_only_item() {
    let model = Scripted::new(vec![5]);
    let mut state = InferenceState::new(model.config());
    let cold = GenerateOptions { sampling: SamplerOptions { temperature: -1.0, ..SamplerOptions::default() }, ..greedy() };
    for (prompt, options, wanted) in [
        (Prompt::from("a"), cold, "temperature -1 makes no sense"),
        (Prompt::from("a"), stops(&[""]), "stop \"\" makes no sense"),
        (Prompt::from(Vec::new()), greedy(), "the prompt is empty"),
        (Prompt::from(""), greedy(), "the prompt is empty"),
    ] {
        let items: Vec<String> = generate(&model, &mut state, prompt, options).map(|item| item.unwrap_err().to_string()).collect();
        assert!(items.len() == 1 && items[0].starts_with(wanted), "{items:?}");
    }
    assert!(model.calls.lock().unwrap().is_empty());
}
