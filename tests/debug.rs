//! `debug = true` reports every step of every call to stderr, where the program has no subscriber of its own.

mod common;

use common::fixture;
use torchless::{InferenceState, TensorParallelConfig, TensorParallelMistral};

/// Set in the child: this binary again, whose stderr is read.
const CHILD: &str = "TORCHLESS_DEBUG_CHILD";

#[test]
fn every_step_of_every_call_is_reported() {
    if std::env::var_os(CHILD).is_some() {
        let model = TensorParallelMistral::load(fixture::load("tied"), TensorParallelConfig::default()).unwrap();
        let mut state = InferenceState::new(model.config());
        model.forward(&mut state, 1, true);
        model.forward(&mut state, 2, false);
        model.fast_forward(&mut state, 3, true);
        model.try_forward(&mut state, 4, true).unwrap();
        return;
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    let output = child.args(["every_step_of_every_call_is_reported", "--exact", "--nocapture"]).env(CHILD, "1").output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    // One place: a segment that ends with a gather.
    assert_eq!(text.lines().filter(|line| line.contains("exchange=AllGather")).count(), 3, "{text}");
    assert!(!text.contains('\u{1b}'), "no colours into a pipe: {text:?}");
}
