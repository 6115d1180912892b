//! Many requests at once: every text is that of its prompt alone, whatever joins, leaves, waits or gives way.

mod common;

use std::pin::Pin;
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Wake};
use std::thread;
use std::time::{Duration, Instant};

use common::{Spec, fixture, write_checkpoint};
use futures::executor::{LocalPool, block_on_stream};
use futures::{Stream, StreamExt};
use torchless::{
    Completion, Error, FinishReason, GenerateOptions, InferenceState, KvType, ParallelConfig, ParallelMistral, Parameters, PipelineConfig,
    PipelineParallelMistral, SamplerOptions, Scheduler, SchedulerConfig, TensorParallelConfig, TensorParallelMistral, Token, generate,
};

fn load(name: &str, [stages, ranks]: [usize; 2]) -> PipelineParallelMistral {
    let mut config = ParallelConfig::tensor_parallel(ranks, 0).stages(stages);
    config.pipeline = PipelineConfig { async_execution: true, ..PipelineConfig::default() };
    PipelineParallelMistral::load(fixture::load(name), config).unwrap()
}

/// Greedy, or drawn with a seed.
fn options(max_tokens: usize, seed: Option<u64>) -> GenerateOptions {
    let temperature = if seed.is_some() { 0.9 } else { 0.0 };
    GenerateOptions {
        max_tokens,
        sampling: SamplerOptions { temperature, seed, ..SamplerOptions::default() },
        ..GenerateOptions::default()
    }
}

fn ids(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

fn wait(completion: Completion) -> Vec<Token> {
    block_on_stream(completion).map(Result::unwrap).collect()
}

fn alone<By>(model: &ParallelMistral<By>, prompt: &[u32], options: &GenerateOptions) -> Vec<Token> {
    let mut state = InferenceState::new(model.config());
    generate(model, &mut state, prompt, options.clone()).map(Result::unwrap).collect()
}

/// Prompts of different lengths, the fixture's first.
fn prompts(name: &str, n: usize) -> Vec<Vec<u32>> {
    let cases = fixture::cases(name);
    let vocab = fixture::load(name).config().vocab_size;
    let prompt = |i: usize| match cases.get(i) {
        Some(case) => case.ids.clone(),
        None => (0..i * 13 % 150 + 1).map(|t| ((t * 31 + i * 7) % vocab) as u32).collect(),
    };
    (0..n).map(prompt).collect()
}

#[test]
fn every_text_is_that_of_its_prompt_alone_on_any_grid_and_in_any_chunks() {
    for name in fixture::ALL {
        for (grid, prompt_rows, reuse_prefixes) in [([1, 1], 128, true), ([1, 2], 7, false), ([2, 1], 1, true), ([3, 2], 40, true)] {
            let model = load(name, grid);
            let scheduler = Scheduler::new(&model, SchedulerConfig { prompt_rows, reuse_prefixes, ..SchedulerConfig::default() }).unwrap();
            let requests: Vec<(Vec<u32>, GenerateOptions)> =
                prompts(name, 14).into_iter().enumerate().map(|(i, p)| (p, options(5 + i * 3, (i % 3 == 2).then_some(i as u64)))).collect();
            let submitted: Vec<Completion> = requests.iter().map(|(p, o)| scheduler.submit(p, o.clone()).unwrap()).collect();
            for (i, (completion, (prompt, options))) in submitted.into_iter().zip(&requests).enumerate() {
                let text = wait(completion);
                assert_eq!(text, alone(&model, prompt, options), "{name} on {grid:?}, request {i}");
            }
            for case in fixture::cases(name) {
                let text = wait(scheduler.submit(&case.ids, options(case.greedy.len(), None)).unwrap());
                assert_eq!(ids(&text), case.greedy, "{name} on {grid:?}: {}", case.name);
            }
        }
    }
}

#[test]
fn a_cache_too_small_for_all_changes_no_text_and_starves_nobody() {
    for (name, grid) in [("tiny-mistral", [1, 1]), ("sliding", [2, 1]), ("uneven", [2, 2])] {
        let model = load(name, grid);
        let page = 64 * 2 * 4 * model.ranks().iter().map(|r| r.layers.len() * r.partition.kv_heads.len()).sum::<usize>();
        let page = page * model.config().head_dim;
        for pages in [4, 7] {
            let config = SchedulerConfig { kv_memory: Some(pages * page + page / 2), prompt_rows: 30, ..SchedulerConfig::default() };
            let scheduler = Scheduler::new(&model, config).unwrap();
            let prompts = prompts(name, 12);
            let alone: Vec<_> = prompts.iter().map(|prompt| alone(&model, prompt, &options(90, None))).collect();
            let submitted: Vec<_> = prompts.iter().map(|prompt| scheduler.submit(prompt, options(90, None)).unwrap()).collect();
            for (i, (completion, alone)) in submitted.into_iter().zip(alone).enumerate() {
                assert_eq!(wait(completion), alone, "{name} with {pages} pages, request {i}");
                assert!(model.kv_pages_held() <= pages, "{} pages of {pages}", model.kv_pages_held());
            }
            let counts = scheduler.counts();
            assert!(name == "sliding" || counts.preemptions > 0, "{name} with {pages} pages: {counts:?}");
            scheduler.forget_prefixes();
            assert_eq!((model.kv_pages_held(), scheduler.counts().running), (0, 0));
        }
    }
}

#[test]
fn a_prompt_that_begins_like_an_earlier_one_computes_only_its_end() {
    for (name, grid) in [("tiny-mistral", [1, 1]), ("gqa-headdim", [2, 2])] {
        let model = load(name, grid);
        let scheduler = Scheduler::new(&model, SchedulerConfig::default()).unwrap();
        let long: Vec<u32> = (0..200).map(|t| t * 7 % 300).collect();
        let first = wait(scheduler.submit(&long, options(10, None)).unwrap());
        // Tokens of the prompt that were computed, and that were not.
        let check = |prompt: &[u32]| {
            let before = scheduler.counts();
            let text = wait(scheduler.submit(prompt, options(10, None)).unwrap());
            assert_eq!(text, alone(&model, prompt, &options(10, None)), "{name}");
            let after = scheduler.counts();
            let new = text.len() as u64 - 1; // the last is not computed
            (after.computed_tokens - before.computed_tokens - new, after.reused_tokens - before.reused_tokens)
        };
        assert_eq!(check(&long), (1, 199), "{name}: only the last token's logits are missing");
        assert_eq!(check(&long[..150]), (1, 149), "{name}: the prefix ends within a page");
        assert_eq!(check(&[&long[..150], &[1, 2, 3]].concat()), (3, 150), "{name}: and goes another way there");
        let behind = [&long[..], &ids(&first)].concat();
        assert_eq!(check(&[&behind[..], &[5, 6]].concat()), (3, behind.len() as u64 - 1), "{name}: behind the answer");
        assert_eq!(check(&long), (1, 199), "{name}: what was read is still what it was");
        assert_eq!(check(&[0, 7, 14]), (3, 0), "{name}: fewer tokens in common than are worth it");
        scheduler.forget_prefixes();
        assert_eq!(check(&long), (200, 0), "{name}");
        drop(scheduler);
        assert_eq!(model.kv_pages_held(), 0, "{name}");
    }
}

#[test]
fn a_cancelled_request_frees_its_pages_while_others_go_on() {
    let model = load("tiny-mistral", [2, 1]);
    let scheduler = Scheduler::new(&model, SchedulerConfig { reuse_prefixes: false, ..SchedulerConfig::default() }).unwrap();
    let prompt: Vec<u32> = (0..100).collect();
    let mut some: Vec<_> = (0..6).map(|_| scheduler.submit(&prompt, options(300, Some(1))).unwrap()).collect();
    let kept = some.remove(3);
    for (i, completion) in some.into_iter().enumerate() {
        // Some before their first token, some later.
        let _heard: Vec<_> = block_on_stream(completion).take(i * 2).collect();
    }
    let text = wait(kept);
    assert_eq!(text, alone(&model, &prompt, &options(300, Some(1))));
    assert_eq!((scheduler.counts().running, scheduler.counts().waiting), (0, 0));
    assert_eq!(model.kv_pages_held(), 0);
}

#[test]
fn requests_are_admitted_in_the_order_of_their_arrival() {
    let model = TensorParallelMistral::load(fixture::load("tied"), TensorParallelConfig::default()).unwrap();
    let config = SchedulerConfig { max_sequences: 1, reuse_prefixes: false, ..SchedulerConfig::default() };
    let scheduler = Scheduler::new(&model, config).unwrap();
    let submitted: Vec<_> = (0..5).map(|i| scheduler.submit(&[i, i + 1], options(20, None)).unwrap()).collect();
    let waiting: Vec<usize> = submitted
        .into_iter()
        .map(|completion| {
            let mut tokens = block_on_stream(completion);
            tokens.next().unwrap().unwrap();
            scheduler.counts().waiting
        })
        .collect();
    // When the i-th has begun, no later one has.
    assert!(waiting.iter().enumerate().all(|(i, &waiting)| waiting >= 4 - i), "{waiting:?}");
}

#[test]
fn a_text_ends_with_the_cache_and_a_prompt_that_does_not_fit_is_refused() {
    let model = TensorParallelMistral::load(fixture::load("tiny-mistral"), ParallelConfig::default().kv_positions(128)).unwrap();
    let scheduler = Scheduler::new(&model, SchedulerConfig::default()).unwrap();
    let text = wait(scheduler.submit(&[1, 2, 3], options(500, Some(3))).unwrap());
    assert_eq!((text.len(), text.last().unwrap().finish), (128 - 3 + 1, Some(FinishReason::Context)));
    let error = scheduler.submit(&[1; 129], options(1, None)).unwrap_err();
    assert!(matches!(error, Error::ContextFull { position: 0, wanted: 129, limit: 128 }), "{error}");
    assert!(matches!(scheduler.submit(&[] as &[u32; 0], options(1, None)).unwrap_err(), Error::EmptyPrompt));
    assert!(matches!(scheduler.submit(&[320], options(1, None)).unwrap_err(), Error::TokenOutOfRange { token: 320, .. }));
    assert!(wait(scheduler.submit(&[1], options(0, None)).unwrap()).is_empty());

    // Somebody else holds all pages.
    scheduler.forget_prefixes();
    let mut state = InferenceState::new(model.config());
    model.prefill(&mut state, &[1; 128]).unwrap();
    let outcome: Vec<_> = block_on_stream(scheduler.submit(&[1, 2], options(5, None)).unwrap()).collect();
    assert!(matches!(outcome[..], [Err(Error::CacheFull { .. })]), "{outcome:?}");
    drop(state);
    assert_eq!(wait(scheduler.submit(&[1, 2], options(5, None)).unwrap()).len(), 5);
}

#[test]
fn configurations_that_make_no_sense_are_refused_and_a_dropped_scheduler_says_so() {
    let model = TensorParallelMistral::load(fixture::load("tied"), TensorParallelConfig::default()).unwrap();
    let default = SchedulerConfig::default;
    for (config, words) in [
        (SchedulerConfig { max_sequences: 0, ..default() }, "max_sequences 0"),
        (SchedulerConfig { prompt_rows: 0, ..default() }, "prompt_rows 0"),
        (SchedulerConfig { kv_memory: Some(100), ..default() }, "kv_memory 100"),
    ] {
        let error = Scheduler::new(&model, config).unwrap_err().to_string();
        assert!(error.contains(words), "{error:?} should say {words:?}");
    }
    let scheduler = Scheduler::new(&model, default()).unwrap();
    let completion = scheduler.submit(&[1, 2, 3], options(400, None)).unwrap();
    drop(scheduler);
    let last = block_on_stream(completion).last().unwrap();
    assert!(matches!(&last, Err(Error::Request(why)) if why.contains("dropped")) || last.is_ok_and(|token| token.finish.is_some()));
    assert_eq!(model.kv_pages_held(), 0);
}

#[test]
fn an_f16_cache_serves_a_scheduler_too() {
    let model = load("gqa-headdim", [2, 1]);
    let config = SchedulerConfig { kv: KvType::F16, ..SchedulerConfig::default() };
    let scheduler = Scheduler::new(&model, config).unwrap();
    let prompt: Vec<u32> = (0..180).map(|t| t * 3 % 384).collect();
    let texts: Vec<_> = (0..4).map(|_| scheduler.submit(&prompt, options(12, None)).unwrap()).collect();
    let mut state = InferenceState::with_kv(model.config(), KvType::F16);
    let want: Vec<_> = generate(&model, &mut state, &prompt, options(12, None)).map(Result::unwrap).collect();
    texts.into_iter().for_each(|text| assert_eq!(wait(text), want));
    assert_eq!(wait(scheduler.submit(&prompt, options(12, None)).unwrap()), want, "from the kept prefix");
    assert!(scheduler.counts().reused_tokens >= 128);
}

#[test]
fn stories_stream_as_text_with_stops() {
    let params = Parameters::load(fixture::stories()).unwrap();
    let model = PipelineParallelMistral::load(params, ParallelConfig::pipeline(4).stages(2)).unwrap();
    let scheduler = Scheduler::new(&model, SchedulerConfig::default()).unwrap();
    let options = GenerateOptions { stop: vec![".".into()], ..options(60, None) };
    let prompts = ["Once upon a time, there was a little fox named Rusty.", "Lily had a red ball.", "Tom saw a big dog"];
    let submitted: Vec<_> = prompts.iter().map(|prompt| scheduler.submit(*prompt, options.clone()).unwrap()).collect();
    for (completion, prompt) in submitted.into_iter().zip(prompts) {
        assert_eq!(completion.prompt_tokens(), model.parameters().tokenizer().unwrap().encode(prompt).unwrap().len());
        let text: String = wait(completion).into_iter().map(|token| token.text).collect();
        let mut state = InferenceState::new(model.config());
        let want: String = generate(&model, &mut state, prompt, options.clone()).map(|token| token.unwrap().text).collect();
        assert_eq!(text, want);
        assert!(!text.is_empty() && !text.contains('.'), "{text:?}");
    }
}

#[test]
fn other_shapes_run_too() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &Spec { layers: 3, sliding_window: Some(20), heads: 3, kv_heads: 1, ..Spec::default() });
    let model = PipelineParallelMistral::load(Parameters::load(dir.path()).unwrap(), ParallelConfig::pipeline(2).stages(3)).unwrap();
    let scheduler = Scheduler::new(&model, SchedulerConfig { prompt_rows: 9, ..SchedulerConfig::default() }).unwrap();
    let prompts: Vec<Vec<u32>> = (0..8).map(|i| (0..i * 17 + 1).map(|t| t * 3 % 40).collect()).collect();
    let submitted: Vec<_> = prompts.iter().map(|p| scheduler.submit(p, options(70, Some(5))).unwrap()).collect();
    for (completion, prompt) in submitted.into_iter().zip(&prompts) {
        assert_eq!(wait(completion), alone(&model, prompt, &options(70, Some(5))));
    }
}

#[test]
fn under_a_sliding_window_prompts_longer_than_the_cache_run_whatever_the_rows_of_a_step() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &Spec { sliding_window: Some(20), max_positions: 2048, ..Spec::default() });
    let config = ParallelConfig::pipeline(4).stages(2).kv_positions(6 * 64);
    let model = PipelineParallelMistral::load(Parameters::load(dir.path()).unwrap(), config).unwrap();
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| (0..1000 + i * 37).map(|t| t * (i + 3) % 40).collect()).collect();
    let alone: Vec<_> = prompts.iter().map(|prompt| alone(&model, prompt, &options(30, Some(2)))).collect();
    for prompt_rows in [50, 256, usize::MAX] {
        let scheduler = Scheduler::new(&model, SchedulerConfig { prompt_rows, ..SchedulerConfig::default() }).unwrap();
        let submitted: Vec<_> = prompts.iter().map(|prompt| scheduler.submit(prompt, options(30, Some(2))).unwrap()).collect();
        for (completion, alone) in submitted.into_iter().zip(&alone) {
            assert_eq!(wait(completion), *alone, "{prompt_rows} rows");
        }
        drop(scheduler);
        assert_eq!(model.kv_pages_held(), 0);
    }
}

#[test]
fn hundreds_of_requests_run_at_once_on_a_model_that_is_otherwise_gone() {
    for grid in [[1, 1], [2, 1]] {
        let model = load("tied", grid);
        let prompts: Vec<Vec<u32>> = (0..200).map(|i| vec![i, i / 2, 7]).collect();
        let alone: Vec<_> = prompts.iter().map(|prompt| alone(&model, prompt, &options(4, None))).collect();
        let config = SchedulerConfig { max_sequences: 200, prompt_rows: 1, ..SchedulerConfig::default() };
        let scheduler = Scheduler::new(&model, config).unwrap();
        drop(model);
        let submitted: Vec<_> = prompts.iter().map(|prompt| scheduler.submit(prompt, options(4, None)).unwrap()).collect();
        for (completion, alone) in submitted.into_iter().zip(alone) {
            assert_eq!(wait(completion), alone, "{grid:?}");
        }
    }
}

#[test]
fn one_page_serves_one_request_after_the_other() {
    let model = PipelineParallelMistral::load(fixture::load("tied"), ParallelConfig::pipeline(2).stages(2).kv_positions(64)).unwrap();
    let scheduler = Scheduler::new(&model, SchedulerConfig::default()).unwrap();
    let prompts: Vec<Vec<u32>> = (0..9).map(|i| (0..1 + i * 63 / 8).collect()).collect();
    let submitted: Vec<_> = prompts.iter().map(|prompt| scheduler.submit(prompt, options(100, Some(4))).unwrap()).collect();
    let texts: Vec<_> = submitted.into_iter().map(wait).collect();
    scheduler.forget_prefixes();
    assert_eq!(model.kv_pages_held(), 0);
    for (text, prompt) in texts.into_iter().zip(&prompts) {
        assert_eq!(text, alone(&model, prompt, &options(100, Some(4))), "{} tokens", prompt.len());
    }
}

#[test]
fn a_stream_may_wander_between_threads_and_executors_and_a_client_may_panic() {
    let model = load("tiny-mistral", [2, 1]);
    let scheduler = Scheduler::new(&model, SchedulerConfig::default()).unwrap();
    let prompt = [5, 6, 7];
    let want = alone(&model, &prompt, &options(40, Some(9)));
    let mut completion = scheduler.submit(&prompt, options(40, Some(9))).unwrap();
    let lost = scheduler.submit(&[1; 50], options(400, Some(1))).unwrap();
    let panicked = thread::spawn(move || {
        let heard = block_on_stream(lost).nth(1);
        panic!("as a client may: {}", heard.is_some());
    });
    let mut text = Vec::new();
    for i in 0..4 {
        let heard = thread::spawn(move || {
            let take = completion.by_ref().take(5 + i).map(Result::unwrap).collect::<Vec<_>>();
            let heard = if i % 2 == 0 { LocalPool::new().run_until(take) } else { futures::executor::block_on(take) };
            (completion, heard)
        });
        let (back, heard) = heard.join().unwrap();
        completion = back;
        text.extend(heard);
    }
    text.extend(wait(completion));
    assert_eq!(text, want);
    panicked.join().unwrap_err();
    settled(&scheduler);
    scheduler.forget_prefixes();
    assert_eq!(model.kv_pages_held(), 0);
}

/// Waits until nothing runs, for a while.
fn settled(scheduler: &Scheduler) {
    let start = Instant::now();
    while scheduler.counts().running + scheduler.counts().waiting > 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "{scheduler:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Does something when it is woken for the first time, on the thread that wakes.
struct Waker(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Waker {
    fn new(act: impl FnOnce() + Send + 'static) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(Box::new(act)))))
    }

    /// Has the stream wake this one.
    fn poll(self: &Arc<Self>, completion: &mut Completion) {
        let waker = self.clone().into();
        assert!(Pin::new(completion).poll_next(&mut Context::from_waker(&waker)).is_pending());
    }
}

impl Wake for Waker {
    fn wake(self: Arc<Self>) {
        let act = self.0.lock().unwrap().take();
        if let Some(act) = act {
            act();
        }
    }
}

/// The next of `heard`, which must come.
fn must_come<T>(heard: &mpsc::Receiver<T>) -> T {
    heard.recv_timeout(Duration::from_secs(60)).expect("the scheduler stands still")
}

#[test]
fn a_waker_may_ask_the_scheduler_and_drop_all_that_it_has() {
    let model = load("tiny-mistral", [2, 1]);
    let scheduler = Arc::new(Scheduler::new(&model, SchedulerConfig::default()).unwrap());
    let (tell, heard) = mpsc::channel();

    // For a token, and for the end of a request that is cancelled.
    let long: Vec<u32> = (0..300).collect();
    for is_cancelled in [false, true] {
        let mut completion = scheduler.submit(&long, options(9, None)).unwrap();
        let (asked, tell) = (scheduler.clone(), tell.clone());
        Waker::new(move || tell.send(asked.counts()).unwrap()).poll(&mut completion);
        if is_cancelled {
            thread::spawn(|| drop(completion));
        }
        must_come(&heard);
    }

    // As an executor does that has been shut down; the scheduler goes last, on a thread of its own.
    let mut completion = scheduler.submit(&long, options(9, None)).unwrap();
    let held = Arc::new(Mutex::new(None));
    let (taken, started) = (held.clone(), Instant::now());
    let waker = Waker::new(move || {
        drop(taken.lock().unwrap().take());
        tell.send(Default::default()).unwrap();
    });
    let mut all = held.lock().unwrap();
    waker.poll(&mut completion);
    *all = Some((completion, scheduler));
    drop(all);
    must_come(&heard);
    while model.kv_pages_held() > 0 {
        assert!(started.elapsed() < Duration::from_secs(60), "{} pages are held", model.kv_pages_held());
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_waker_that_panics_ends_every_request_and_nobody_waits_for_ever() {
    let model = load("tied", [2, 1]);
    let scheduler = Scheduler::new(&model, SchedulerConfig { max_sequences: 3, ..SchedulerConfig::default() }).unwrap();
    let mut completion = scheduler.submit(&[1; 200], options(9, None)).unwrap();
    Waker::new(|| panic!("as a waker never should")).poll(&mut completion);
    let (tell, heard) = mpsc::channel();
    for i in 0..6 {
        let (completion, tell) = (scheduler.submit(&[i], options(500, Some(1))), tell.clone());
        thread::spawn(move || tell.send(completion.map(|completion| block_on_stream(completion).last())));
    }
    let told = |outcome: torchless::Result<Option<torchless::Result<Token>>>| match outcome {
        Ok(Some(Err(Error::Request(why)))) | Err(Error::Request(why)) if why.contains("panicked") => true,
        Ok(Some(Ok(last))) if last.finish.is_some() => false,
        cut => panic!("a text was cut off without a word: {cut:?}"),
    };
    let told = (0..6).filter(|_| told(must_come(&heard))).count();
    // Those that ran may have ended before.
    assert!(told >= 3, "{told} requests were told why");
    assert!(matches!(scheduler.submit(&[1], options(1, None)), Err(Error::Request(why)) if why.contains("panicked")));
}

#[test]
fn a_stream_that_outlives_its_scheduler_holds_no_pages() {
    let model = load("tied", [1, 1]);
    let scheduler = Scheduler::new(&model, SchedulerConfig::default()).unwrap();
    wait(scheduler.submit(&[3; 100], options(9, None)).unwrap());
    let completion = scheduler.submit(&[4; 100], options(400, None)).unwrap();
    drop(scheduler);
    assert_eq!(model.kv_pages_held(), 0);
    drop(completion);
}

#[test]
fn a_reused_prefix_leaves_room_for_the_rest_of_a_prompt_longer_than_the_window() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &Spec { sliding_window: Some(400), max_positions: 4096, ..Spec::default() });
    let config = ParallelConfig::default().kv_positions(768);
    let model = TensorParallelMistral::load(Parameters::load(dir.path()).unwrap(), config).unwrap();
    let prompt: Vec<u32> = (0..2000).map(|t| t * 7 % 40).collect();
    let want = alone(&model, &prompt, &options(3, None));
    let scheduler = Scheduler::new(&model, SchedulerConfig::default()).unwrap();
    wait(scheduler.submit(&prompt[..1000], options(3, None)).unwrap());
    assert_eq!(wait(scheduler.submit(&prompt, options(3, None)).unwrap()), want);
    assert!(scheduler.counts().reused_tokens >= 1000 - 64, "{:?}", scheduler.counts());
}
