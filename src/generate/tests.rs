use std::path::Path;
use std::sync::{Mutex, OnceLock};

use super::course::{begun_stop, first_stop};
use super::*;

/// A model that says a fixed sequence of tokens, over and over, and remembers what it was asked.
struct Scripted {
    parameters: Parameters,
    script: Vec<u32>,
    calls: Mutex<Vec<String>>,
    /// Tokens that the script comes behind: those of the first call.
    prompt: OnceLock<usize>,
}

impl Scripted {
    fn new(script: Vec<u32>) -> Self {
        Self::of("examples/models/tiny-stories", script)
    }

    fn of(checkpoint: &str, script: Vec<u32>) -> Self {
        let parameters = Parameters::load(Path::new(env!("CARGO_MANIFEST_DIR")).join(checkpoint)).unwrap();
        Self { parameters, script, calls: Mutex::default(), prompt: OnceLock::new() }
    }

    /// That says `text`, then the end of the sequence.
    fn saying(text: &str) -> Self {
        let mut model = Self::new(Vec::new());
        model.script = model.parameters.tokenizer().unwrap().encode_continuation(text).unwrap();
        model.script.push(2);
        model
    }

    /// Answers with what it says after each token.
    fn compute(&self, call: &str, state: &mut InferenceState, tokens: &[u32]) -> Result<Vec<f32>> {
        self.calls.lock().unwrap().push(format!("{call} {tokens:?}"));
        let vocab = self.config().vocab_size;
        let mut logits = vec![0.0; tokens.len() * vocab];
        let prompt = self.prompt.get_or_init(|| state.tokens.len() + tokens.len());
        for (row, position) in logits.chunks_mut(vocab).zip(state.tokens.len() + 1..) {
            row[self.script[position.saturating_sub(*prompt) % self.script.len()] as usize] = 9.0;
        }
        state.tokens.extend(tokens);
        state.logits = logits[logits.len() - vocab..].to_vec();
        Ok(logits)
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
        self.compute("forward", state, &[token]).map(drop)
    }
    fn try_fast_forward(&self, state: &mut InferenceState, token: u32) -> Result<()> {
        self.compute("fast forward", state, &[token]).map(drop)
    }
    fn prefill(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<()> {
        self.compute("prefill", state, tokens).map(drop)
    }
    fn fast_prefill(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<()> {
        self.compute("fast prefill", state, tokens).map(drop)
    }
    fn forward_draft(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<Vec<f32>> {
        self.compute("draft", state, tokens)
    }
    fn fast_forward_draft(&self, state: &mut InferenceState, tokens: &[u32]) -> Result<Vec<f32>> {
        self.compute("fast draft", state, tokens)
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
        let model = Scripted { parameters: Parameters::load(copy.path()).unwrap(), ..Scripted::new(vec![272, end]) };
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
fn a_draft_is_computed_once_and_its_wrong_end_is_taken_back() {
    for (fast, prefix) in [(false, ""), (true, "fast ")] {
        let model = Scripted::new(vec![5, 6, 7, 8, 11]);
        let mut state = InferenceState::new(model.config());
        let options = GenerateOptions { max_tokens: 5, fast, speculate: 7, ..greedy() };
        let mut generation = generate(&model, &mut state, &[1, 4, 5, 6, 7, 9, 12, 1, 4], options);
        let ids: Vec<u32> = generation.by_ref().map(|t| t.unwrap().id).collect();
        let counts = generation.counts();
        drop(generation);
        assert_eq!(ids, [5, 6, 7, 8, 11]);
        // Behind 1, 4, 5 came 6 and 7 before, which is right; behind 5, 6, 7, 8 nothing.
        assert_eq!(model.calls.lock().unwrap()[1..], [format!("{prefix}draft [5, 6, 7]"), format!("{prefix}forward [8]")]);
        assert_eq!(counts, DraftCounts { launches: 3, drafted: 2, accepted: 2 });

        let model = Scripted::new(vec![5, 6, 3]);
        let mut state = InferenceState::new(model.config());
        let options = GenerateOptions { max_tokens: 4, fast, speculate: 7, ..greedy() };
        let mut generation = generate(&model, &mut state, &[1, 4, 5, 6, 7, 9, 12, 1, 4], options);
        let ids: Vec<u32> = generation.by_ref().take(3).map(|t| t.unwrap().id).collect();
        assert_eq!((ids, generation.counts().drafted), (vec![5, 6, 3], 0), "7 may still come");
        drop(generation);
        assert_eq!(state.tokens()[9..], [5, 6], "7 does not, and 3 is not computed");
        assert_eq!(state.logits()[3], 9.0);
    }
}

#[test]
fn a_draft_is_no_longer_than_the_text_can_become() {
    // The prompt goes in circles, and the model with it: only the room is short.
    for (max_tokens, positions, wanted) in
        [(1, 300, None), (2, 300, None), (3, 300, Some("draft [5, 6]")), (90, 509, Some("draft [5, 6, 7]"))]
    {
        let model = Scripted::new(vec![5, 6, 7, 8]);
        let mut state = InferenceState::new(model.config());
        let prompt: Vec<u32> = (0..positions).rev().map(|back| 8 - back % 4).collect();
        let options = GenerateOptions { max_tokens, speculate: 7, ..greedy() };
        let tokens: Vec<Token> = generate(&model, &mut state, prompt, options).map(Result::unwrap).collect();
        assert_eq!(tokens.len(), max_tokens.min(4));
        let calls = model.calls.lock().unwrap();
        let drafts: Vec<&str> = calls.iter().filter(|call| call.starts_with("draft")).map(String::as_str).collect();
        assert_eq!(drafts, wanted.into_iter().collect::<Vec<_>>(), "{max_tokens} tokens behind {positions}");
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
