//! Clients that ask a scheduler for one text after another: in bursts, some hearing slowly, some going away before or in the middle.
//! Every token that is heard is held against the text of its prompt alone.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::executor::block_on_stream;
use futures::stream::select_all;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use torchless::{
    GenerateOptions, InferenceState, ParallelConfig, Parameters, PipelineParallelMistral, Result, SamplerOptions, Scheduler,
    SchedulerConfig, SchedulerCounts, Token, generate,
};

const CLIENTS: usize = 6;
/// Requests of a burst, at most.
const BURST: usize = 10;
/// Different texts that are asked for.
const TEXTS: usize = 90;
/// The longest prompt and the longest answer. Both together are 4 pages.
const PROMPT: usize = 176;
const ANSWER: usize = 80;
/// Positions of the cache: 12 pages, where all bursts together may ask for 240.
const KV_POSITIONS: usize = 12 * 64;
/// No request takes so long to end where others end.
const PATIENCE: Duration = Duration::from_secs(90);

/// What may be asked for, and the answer alone.
struct Text {
    prompt: Vec<u32>,
    options: GenerateOptions,
    answer: Vec<Token>,
}

/// How a request ended, from the client that asked.
struct Ended {
    text: usize,
    heard: Vec<Result<Token>>,
    /// Tokens after which the client went away.
    patience: usize,
}

/// What has come of a soak so far.
#[derive(Debug, Clone, Copy)]
pub struct Tally {
    /// Requests that have ended.
    pub requests: usize,
    /// Those heard to their end.
    pub finished: usize,
    /// Those left before their first token.
    pub cancelled: usize,
    /// Those left later.
    pub dropped: usize,
    /// Tokens heard.
    pub tokens: usize,
    pub elapsed: Duration,
    pub counts: SchedulerCounts,
    /// Pages of the cache that are held.
    pub pages: usize,
}

/// The model of the stories, on the CPU, with stages that compute at the same time.
pub fn load(stages: usize, ranks: usize) -> PipelineParallelMistral {
    let mut config = ParallelConfig::pipeline(4).stages(stages).kv_positions(KV_POSITIONS);
    config.tensor.world_size = ranks;
    let stories = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/tiny-stories");
    PipelineParallelMistral::load(Parameters::load(stories).unwrap(), config).unwrap()
}

/// Runs requests on `model` until `requests` have been made or `time` is over. `watch` is told of every one that ends.
///
/// # Panics
/// If a text is not that of its prompt alone, no request ends for a while, or anything is held at the end.
pub fn run(model: &PipelineParallelMistral, requests: usize, time: Duration, mut watch: impl FnMut(&Tally)) -> Tally {
    let texts: Arc<[Text]> = texts(model).into();
    let scheduler = Arc::new(Scheduler::new(model, SchedulerConfig { max_sequences: 24, ..SchedulerConfig::default() }).unwrap());
    let (start, next) = (Instant::now(), Arc::new(AtomicUsize::new(0)));
    let (ends, ended) = mpsc::channel();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let client = Client {
                scheduler: scheduler.clone(),
                texts: texts.clone(),
                ends: ends.clone(),
                random: ChaCha8Rng::seed_from_u64(client as u64),
            };
            let next = next.clone();
            // Not scoped: a test that fails must not wait for them.
            thread::spawn(move || client.ask(|| start.elapsed() < time && next.fetch_add(1, Ordering::Relaxed) < requests))
        })
        .collect();
    drop(ends);

    let mut tally = Tally {
        requests: 0,
        finished: 0,
        cancelled: 0,
        dropped: 0,
        tokens: 0,
        elapsed: Duration::ZERO,
        counts: scheduler.counts(),
        pages: 0,
    };
    loop {
        match ended.recv_timeout(PATIENCE) {
            Ok(ended) => tally.add(&ended, &texts),
            Err(RecvTimeoutError::Timeout) => panic!("no request has ended in {PATIENCE:?}: {scheduler:?}"),
            Err(RecvTimeoutError::Disconnected) => break,
        }
        (tally.elapsed, tally.counts, tally.pages) = (start.elapsed(), scheduler.counts(), model.kv_pages_held());
        watch(&tally);
    }
    clients.into_iter().for_each(|client| client.join().unwrap());

    // Those that were left in a step are dropped when it is done.
    let left = Instant::now();
    while scheduler.counts().running + scheduler.counts().waiting > 0 {
        assert!(left.elapsed() < PATIENCE, "requests that nobody hears go on: {scheduler:?}");
        thread::sleep(Duration::from_millis(1));
    }
    tally.counts = scheduler.counts();
    scheduler.forget_prefixes();
    assert_eq!(model.kv_pages_held(), 0, "pages are held by nobody");
    tally
}

impl Tally {
    fn add(&mut self, Ended { text, heard, patience }: &Ended, texts: &[Text]) {
        let answer = &texts[*text].answer;
        let heard: Vec<&Token> =
            heard.iter().map(|token| token.as_ref().unwrap_or_else(|e| panic!("request for text {text}: {e}"))).collect();
        let want = answer.len().min(*patience);
        assert!(heard.iter().copied().eq(&answer[..want]), "text {text} is {heard:?}, alone it is {answer:?}");
        self.requests += 1;
        self.tokens += want;
        *match patience {
            0 => &mut self.cancelled,
            _ if want < answer.len() => &mut self.dropped,
            _ => &mut self.finished,
        } += 1;
    }
}

struct Client {
    scheduler: Arc<Scheduler>,
    texts: Arc<[Text]>,
    ends: Sender<Ended>,
    random: ChaCha8Rng,
}

impl Client {
    /// Asks as long as there `is_more` to ask for, a burst after the other.
    fn ask(mut self, is_more: impl Fn() -> bool) {
        loop {
            let size = 1 + below(&mut self.random, BURST);
            let burst: Vec<Ended> = (0..size).take_while(|_| is_more()).map(|_| self.draw()).collect();
            if burst.is_empty() {
                return;
            }
            self.hear(burst);
            thread::sleep(Duration::from_millis(below(&mut self.random, 20) as u64));
        }
    }

    /// Any text, heard as long as the client may bear it.
    fn draw(&mut self) -> Ended {
        let patience = match below(&mut self.random, 10) {
            0 => 0,
            1 => 1 + below(&mut self.random, ANSWER / 2),
            _ => usize::MAX,
        };
        Ended { text: below(&mut self.random, self.texts.len()), heard: Vec::new(), patience }
    }

    /// Hears all of a burst at once. One in four bursts is heard slowly.
    fn hear(&mut self, mut burst: Vec<Ended>) {
        let is_slow = below(&mut self.random, 4) == 0;
        let completions = burst.iter().enumerate().map(|(i, ended)| {
            let Text { prompt, options, .. } = &self.texts[ended.text];
            let completion = self.scheduler.submit(prompt, options.clone()).unwrap();
            // Dropped, and so cancelled, as soon as it has said so much; `None` says that it has ended.
            let tokens = completion.take(ended.patience).map(Some).chain(futures::stream::iter([None]));
            tokens.map(move |token| (i, token)).boxed()
        });
        for (i, token) in block_on_stream(select_all(completions)) {
            match token {
                Some(token) => burst[i].heard.push(token),
                None => {
                    let ended = Ended { heard: std::mem::take(&mut burst[i].heard), ..burst[i] };
                    // Nobody hears it where the soak has failed.
                    let _ = self.ends.send(ended);
                }
            }
            if is_slow {
                thread::sleep(Duration::from_micros(below(&mut self.random, 1000) as u64));
            }
        }
    }
}

/// Texts to ask for: prompts that begin like one of three and go on like another, cut anywhere; a third is drawn with a seed.
fn texts(model: &PipelineParallelMistral) -> Vec<Text> {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let tokenizer = model.parameters().tokenizer().unwrap();
    let openings = ["Once upon a time, there was a little fox named Rusty.", "Lily had a red ball.", "Tom saw a big dog."];
    let stories: Vec<Vec<u32>> = openings
        .iter()
        .map(|opening| {
            let mut story = tokenizer.encode(opening).unwrap();
            story.extend(alone(model, &story, &options(PROMPT, Some(1))).iter().map(|token| token.id));
            story
        })
        .collect();
    (0..TEXTS)
        .map(|i| {
            let mut cut = |most: usize| {
                let story = &stories[below(&mut random, stories.len())];
                &story[..1 + below(&mut random, most.min(story.len()))]
            };
            let (beginning, end) = (cut(PROMPT * 3 / 4), cut(PROMPT / 4));
            let prompt = [beginning, end].concat();
            let options = options(1 + below(&mut random, ANSWER), (i % 3 == 0).then_some(i as u64));
            Text { answer: alone(model, &prompt, &options), prompt, options }
        })
        .collect()
}

/// Greedy, or drawn with a seed.
fn options(max_tokens: usize, seed: Option<u64>) -> GenerateOptions {
    let temperature = if seed.is_some() { 0.9 } else { 0.0 };
    let sampling = SamplerOptions { temperature, seed, ..SamplerOptions::default() };
    GenerateOptions { max_tokens, sampling, ..GenerateOptions::default() }
}

fn alone(model: &PipelineParallelMistral, prompt: &[u32], options: &GenerateOptions) -> Vec<Token> {
    let mut state = InferenceState::new(model.config());
    generate(model, &mut state, prompt, options.clone()).map(Result::unwrap).collect()
}

/// Any number below `n`.
fn below(random: &mut ChaCha8Rng, n: usize) -> usize {
    random.next_u32() as usize % n
}

/// Resident memory of this process in bytes, where the system tells it.
pub fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(1024 * line.trim().trim_end_matches(" kB").parse::<u64>().ok()?)
}
