//! The threads that a model computes with.

use crate::error::{Error, Result};

/// A private pool: a model's own threads, so that it cannot deadlock with its caller's Rayon work.
pub(crate) struct Pool {
    #[cfg(feature = "parallel")]
    threads: rayon::ThreadPool,
}

impl Pool {
    /// A pool of so many threads; one per core where `None`. Without feature `parallel` there is one, whatever is asked.
    pub(crate) fn new(threads: Option<usize>) -> Result<Self> {
        if threads == Some(0) {
            return Err(Error::Option { option: "threads", value: "0".into(), right: "use at least 1" });
        }
        #[cfg(feature = "parallel")]
        {
            let builder = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).thread_name(|i| format!("torchless-{i}"));
            let threads = builder.build().map_err(|e| Error::DriverGone(format!("its {threads:?} worker threads cannot start: {e}")))?;
            Ok(Self { threads })
        }
        #[cfg(not(feature = "parallel"))]
        Ok(Self {})
    }

    /// Threads that compute.
    pub(crate) fn threads(&self) -> usize {
        #[cfg(feature = "parallel")]
        return self.threads.current_num_threads();
        #[cfg(not(feature = "parallel"))]
        1
    }

    /// Runs `f` inside the pool, where [`for_each`] spreads over its threads.
    pub(crate) fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        #[cfg(feature = "parallel")]
        return self.threads.install(f);
        #[cfg(not(feature = "parallel"))]
        f()
    }
}

/// Runs tasks `0..n`, on the threads of the pool that this is called in.
pub(crate) fn for_each(n: usize, f: impl Fn(usize) + Sync) {
    #[cfg(feature = "parallel")]
    if n > 1 {
        use rayon::prelude::*;
        return (0..n).into_par_iter().with_max_len(1).for_each(&f);
    }
    (0..n).for_each(f);
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
    pub(crate) unsafe fn range(&self, range: std::ops::Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.1, "range {range:?} of a slice of {}", self.1);
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}
