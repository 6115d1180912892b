//! The threads that a model computes with.

use std::ops::Range;

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

    /// Runs `f` inside the pool, where [`for_each`] spreads over its threads.
    pub(crate) fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        #[cfg(feature = "parallel")]
        match &self.threads {
            Some(threads) => threads.install(f),
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

/// Runs `task(i, stolen)` for every i below n; this is all that the feature `parallel` changes.
///
/// With it, ranges are halved recursively, and an idle thread steals the half that was split off last by another: `stolen` says
/// that another thread runs a task than the one that split it off.
#[cfg(feature = "parallel")]
pub(crate) fn for_each(n: usize, task: impl Fn(usize, bool) + Sync) {
    fn halve(tasks: Range<usize>, stolen: bool, task: &(impl Fn(usize, bool) + Sync)) {
        if tasks.len() == 1 {
            return task(tasks.start, stolen);
        }
        let middle = tasks.start + tasks.len() / 2;
        rayon::join_context(|_| halve(tasks.start..middle, stolen, task), |context| halve(middle..tasks.end, context.migrated(), task));
    }
    match n {
        0 => {}
        _ if ALONE.get() => (0..n).for_each(|i| task(i, false)),
        1 => task(0, false),
        // The scope enters a pool: a join from outside of one would call its own half migrated.
        _ => rayon::scope(|_| halve(0..n, false, &task)),
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
