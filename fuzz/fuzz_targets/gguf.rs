#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = torchless::fuzzing::gguf(input);
});
