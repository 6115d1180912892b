#!/bin/bash
# Everything that the benches say of GPUs, on a machine that has one; under ten minutes after the build, on a card of some hundred GB/s.
# usage: benches/gpu.sh [MODEL]   MODEL: a checkpoint of a few billion parameters at most; the embedded one, which is tiny, by default
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-examples/models/tiny-stories}
export TORCHLESS_REQUIRE_GPU=1
cargo build -q --release
torchless=target/release/torchless
step() { printf '\n## %s (%s s)\n\n' "$*" "$SECONDS"; }

step "devices"
"$torchless" devices
step "every kernel against its twin, on every adapter"
cargo test -q --lib backend::wgpu
for format in f32 f16 bf16 q8_0 q4_0 iq4_nl; do
  step "variants of a product of 4096 x 4096 weights of $format with one row"
  "$torchless" tune --weights "$format"
done
for weights in stored q8_0 iq4_nl q4_0; do
  step "$model, $weights: tokens/s and where the time goes"
  "$torchless" bench --model "$model" --weights "$weights" --prompt-tokens 512
done
for how in "" "--no-overlap" "--wire f16"; do
  step "a prompt over gpu:0 and the CPU, in halves that overlap unless told otherwise $how"
  "$torchless" bench --model "$model" --devices gpu:0,cpu --prompt-tokens 512 --decode-tokens 8 $how
done
step "every hardware GPU and the CPU, alone and together"
"$torchless" plan --model "$model" --weights q4_0 --predict
step "an all-reduce through the host"
cargo bench -q --bench collective
