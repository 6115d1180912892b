//! What ctrl-C does: it ends an answer, and the program where there is none.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::cli::{Failure, Outcome};

static IS_ANSWERING: AtomicBool = AtomicBool::new(false);
static IS_STOPPED: AtomicBool = AtomicBool::new(false);

/// Takes ctrl-C over from the system.
pub fn listen() -> Outcome {
    let on_signal = || match IS_ANSWERING.load(Relaxed) {
        // An answer is left between two tokens; who can't wait for the first asks again.
        true if IS_STOPPED.swap(true, Relaxed) => std::process::exit(130),
        true => {}
        // As a shell reports a program that ctrl-C has ended.
        false => std::process::exit(130),
    };
    ctrlc::set_handler(on_signal).map_err(|e| Failure::because("cannot listen for ctrl-C", e))
}

/// While it lives, ctrl-C ends an answer.
pub struct Answering;

impl Answering {
    pub fn begin() -> Self {
        IS_STOPPED.store(false, Relaxed);
        IS_ANSWERING.store(true, Relaxed);
        Self
    }

    pub fn is_stopped(&self) -> bool {
        IS_STOPPED.load(Relaxed)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        IS_ANSWERING.store(false, Relaxed);
    }
}
