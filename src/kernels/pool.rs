//! The threads that a model computes with.

use std::ops::Range;
#[cfg(feature = "parallel")]
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};
#[cfg(feature = "parallel")]
use std::time::{Duration, Instant};

#[cfg(feature = "parallel")]
use crate::error::Error;
use crate::error::Result;

/// A private pool: a model's own threads, so that it cannot deadlock with its caller's Rayon work.
pub(crate) struct Pool {
    /// `None` for the caller's own thread.
    #[cfg(feature = "parallel")]
    threads: Option<rayon::ThreadPool>,
}

#[cfg(feature = "parallel")]
thread_local! {
    /// This thread is inside a pool of none but itself.
    static ALONE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

impl Pool {
    /// A pool of so many threads; one per core where `None`. Without feature `parallel` there is one, whatever is asked.
    pub(crate) fn new(threads: Option<usize>) -> Result<Self> {
        #[cfg(feature = "parallel")]
        {
            if threads == Some(1) {
                return Ok(Self { threads: None });
            }
            let builder = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).thread_name(|i| format!("torchless-{i}"));
            let threads = builder.build().map_err(|e| Error::DriverGone(format!("its worker threads cannot start: {e}")))?;
            Ok(Self { threads: Some(threads) })
        }
        #[cfg(not(feature = "parallel"))]
        {
            let _ = threads;
            Ok(Self {})
        }
    }

    /// Runs `f`, which enters the pool again and again, on one of its threads, so that it need not change threads to enter.
    pub(crate) fn host<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        #[cfg(feature = "parallel")]
        if let Some(threads) = &self.threads {
            return threads.install(f);
        }
        f()
    }

    /// Runs `f` inside the pool, where [`for_each`] spreads over its threads.
    pub(crate) fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        #[cfg(feature = "parallel")]
        match &self.threads {
            Some(threads) => threads.install(|| {
                let _awake = Awake::keep();
                f()
            }),
            None => {
                let before = ALONE.replace(true);
                let result = f();
                ALONE.set(before);
                result
            }
        }
        #[cfg(not(feature = "parallel"))]
        f()
    }
}

/// Threads of the pool that this is called in.
pub(crate) fn threads() -> usize {
    #[cfg(feature = "parallel")]
    return if ALONE.get() { 1 } else { rayon::current_num_threads() };
    #[cfg(not(feature = "parallel"))]
    1
}

/// How long a thread without work looks for some before it sleeps: waking it takes tens of microseconds, as long as a short task.
#[cfg(feature = "parallel")]
const LOOKING: Duration = Duration::from_micros(200);

/// While it lives, the other threads of the pool look for work between one [`for_each`] and the next instead of falling asleep at once.
#[cfg(feature = "parallel")]
struct Awake(Arc<AtomicBool>);

#[cfg(feature = "parallel")]
impl Awake {
    fn keep() -> Self {
        let (ended, this) = (Arc::new(AtomicBool::new(false)), rayon::current_thread_index());
        let looking = ended.clone();
        rayon::spawn_broadcast(move |context| {
            if Some(context.index()) != this {
                look_for_work(|| looking.load(Ordering::Relaxed));
            }
        });
        Self(ended)
    }
}

#[cfg(feature = "parallel")]
impl Drop for Awake {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        // This thread's own copy of the broadcast, which does nothing, would otherwise wait for a thread that hosts.
        while let Some(rayon::Yield::Executed) = rayon::yield_local() {}
    }
}

/// What a thread that spreads tasks has learnt about those who help it.
///
/// On a machine with more to run than it has cores a helper loses its core in the midst of a task, for milliseconds, and the caller waits
/// that long: slower than alone. So whoever was left waiting much longer than a task takes goes on alone for a while, twice as long each time.
#[cfg(feature = "parallel")]
#[derive(Clone, Copy)]
struct Solitude {
    until: Option<Instant>,
    /// How long the next one is.
    next: Duration,
    /// How long there has been work with help, and no waiting, since the last one.
    helped: Duration,
}

#[cfg(feature = "parallel")]
thread_local! {
    static SOLITUDE: std::cell::Cell<Solitude> = const { std::cell::Cell::new(Solitude::NONE) };
}

#[cfg(feature = "parallel")]
impl Solitude {
    const NONE: Self = Self { until: None, next: Self::SHORTEST, helped: Duration::ZERO };
    const SHORTEST: Duration = Duration::from_millis(20);
    const LONGEST: Duration = Duration::from_millis(640);
    /// A wait that is nobody's fault, beyond that for tasks which are longer than the others.
    const PATIENCE: Duration = Duration::from_micros(500);
    /// Tasks beyond this last about as long as a helper is ever away.
    const LONG_TASK: Duration = Duration::from_millis(1);

    /// Whether this thread had better be alone now.
    fn is_better() -> bool {
        SOLITUDE.get().until.is_some_and(|until| Instant::now() < until)
    }

    /// Learns from tasks of which this thread did `own` in `worked`, before it waited for the last of the others.
    fn learn(own: u32, worked: Duration, waited: Duration) {
        let (before, task) = (SOLITUDE.get(), worked / own.max(1));
        let helped = before.helped + worked;
        SOLITUDE.set(if task < Self::LONG_TASK && waited > Self::PATIENCE + 2 * task {
            Self { until: Some(Instant::now() + before.next), next: (2 * before.next).min(Self::LONGEST), helped: Duration::ZERO }
        } else if helped > before.next {
            Self::NONE
        } else {
            Self { helped, ..before }
        });
    }
}

/// Does what the pool has to do until `ended`, or until there has been nothing for [`LOOKING`]. Answers since when there has been nothing.
#[cfg(feature = "parallel")]
fn look_for_work(ended: impl Fn() -> bool) -> Instant {
    let mut idle_since = Instant::now();
    while !ended() && idle_since.elapsed() < LOOKING {
        match rayon::yield_now() {
            Some(rayon::Yield::Executed) => idle_since = Instant::now(),
            _ => std::hint::spin_loop(),
        }
    }
    idle_since
}

/// Runs `task(i, stolen)` for every i below n; this is all that the feature `parallel` changes.
///
/// With it, ranges are halved recursively, and an idle thread steals the half that was split off first by another: `stolen` says
/// that another thread runs a task than the one that split it off.
#[cfg(feature = "parallel")]
pub(crate) fn for_each(n: usize, task: impl Fn(usize, bool) + Sync) {
    struct Work<'a, F> {
        task: &'a F,
        left: AtomicUsize,
        /// The thread that waits for all of them, and how many it has done.
        caller: Option<usize>,
        own: AtomicUsize,
    }
    fn halve<'s, F: Fn(usize, bool) + Sync>(
        scope: &rayon::Scope<'s>,
        mut tasks: Range<usize>,
        splitter: Option<usize>,
        work: &'s Work<'_, F>,
    ) {
        let this = rayon::current_thread_index();
        while tasks.len() > 1 {
            let middle = tasks.start + tasks.len() / 2;
            let split_off = middle..tasks.end;
            scope.spawn(move |scope| halve(scope, split_off, this, work));
            tasks.end = middle;
        }
        (work.task)(tasks.start, this != splitter);
        work.own.fetch_add(usize::from(this == work.caller), Ordering::Relaxed);
        work.left.fetch_sub(1, Ordering::Release);
    }
    match n {
        0 => {}
        _ if ALONE.get() || Solitude::is_better() => (0..n).for_each(|i| task(i, false)),
        1 => task(0, false),
        // The scope below needs a pool; this enters one, if this is not one of its threads.
        _ if rayon::current_thread_index().is_none() => rayon::scope(|_| for_each(n, &task as &(dyn Fn(usize, bool) + Sync))),
        _ => {
            let caller = rayon::current_thread_index();
            let work = Work { task: &task, left: AtomicUsize::new(n), caller, own: AtomicUsize::new(0) };
            let (start, mut idle_since) = (Instant::now(), None);
            rayon::scope(|scope| {
                halve(scope, 0..n, caller, &work);
                idle_since = Some(look_for_work(|| work.left.load(Ordering::Acquire) == 0));
            });
            if let Some(idle_since) = idle_since {
                let own = u32::try_from(work.own.into_inner()).unwrap_or(u32::MAX);
                Solitude::learn(own, idle_since - start, idle_since.elapsed());
            }
        }
    }
}

#[cfg(not(feature = "parallel"))]
pub(crate) fn for_each(n: usize, task: impl Fn(usize, bool) + Sync) {
    (0..n).for_each(|i| task(i, false));
}

/// A slice that tasks write to at places that no other task touches.
pub(crate) struct Scatter<'a, T>(*mut T, usize, std::marker::PhantomData<&'a mut [T]>);

// SAFETY: it is only a pointer; `range` makes its callers promise that ranges in use don't overlap.
unsafe impl<T: Send> Sync for Scatter<'_, T> {}

impl<'a, T> Scatter<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self(slice.as_mut_ptr(), slice.len(), std::marker::PhantomData)
    }

    /// # Safety
    /// While the result lives, no other range in use overlaps this one.
    ///
    /// # Panics
    /// If the range reaches outside the slice.
    #[allow(clippy::mut_from_ref)] // that is its purpose
    pub(crate) unsafe fn range(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.1, "range {range:?} of a slice of {}", self.1);
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}

#[cfg(all(test, feature = "parallel"))]
mod tests {
    use super::*;

    #[test]
    fn who_was_left_waiting_goes_on_alone_for_a_while() {
        let (us, ms) = (Duration::from_micros, Duration::from_millis);
        Solitude::learn(4, us(400), us(600));
        assert!(!Solitude::is_better(), "a wait of a few tasks");
        Solitude::learn(4, ms(400), ms(300));
        assert!(!Solitude::is_better(), "tasks are long");
        Solitude::learn(4, us(400), ms(4));
        assert!(Solitude::is_better());
        Solitude::learn(4, us(400), ms(4));
        assert_eq!(SOLITUDE.get().next, 4 * Solitude::SHORTEST, "longer each time");
        (0..100).for_each(|_| Solitude::learn(4, us(900), us(0)));
        assert!(SOLITUDE.get().until.is_none() && SOLITUDE.get().next == Solitude::SHORTEST, "as if nothing had been");
        let seen = std::sync::Mutex::new(Vec::new());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let threads_of = |n: usize| {
            for_each(n, |_, _| {
                std::thread::sleep(us(100));
                seen.lock().unwrap().push(rayon::current_thread_index());
            });
            let mut threads = std::mem::take(&mut *seen.lock().unwrap());
            threads.dedup();
            threads.len()
        };
        pool.install(|| {
            Solitude::learn(4, us(400), ms(4));
            assert_eq!(threads_of(20), 1, "alone");
            std::thread::sleep(Solitude::SHORTEST);
            assert!((0..100).any(|_| threads_of(20) > 1), "helped again");
        });
    }
}
