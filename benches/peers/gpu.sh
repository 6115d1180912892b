#!/bin/bash
# torchless beside llama.cpp's Vulkan backend on one adapter, in turn.
# usage: benches/peers/gpu.sh MODELS LLAMA_BENCH ADAPTER VULKAN [ROUNDS [PROMPT [TOKENS]]]
#   MODELS as make-model and llama-quantize fill it; ADAPTER as torchless names it (gpu:0), VULKAN as llama-bench does (Vulkan0)
set -euo pipefail
models=$1 llama=$2 adapter=$3 vulkan=$4 rounds=${5:-3} prompt=${6:-32} tokens=${7:-8}
torchless=$(dirname "$0")/../../target/release/torchless
field() { grep -o "\"$1\": [0-9.]*" | grep -o '[0-9.]*$'; }
median() { sort -g | awk '{v[NR]=$1} END {print v[int((NR+1)/2)]}'; }
echo "| format | measure | torchless | llama.cpp | ratio of medians |"
echo "|---|---|---|---|---|"
for format in ${FORMATS:-q4_0 iq4_nl q8_0 bf16}; do
  weights=$format; [ "$format" = bf16 ] && weights=stored
  ours=() theirs=()
  for _ in $(seq "$rounds"); do
    ours+=("$("$torchless" bench --json --model "$models/bf16" --weights "$weights" --devices "$adapter" --prompt-tokens "$prompt" --decode-tokens "$tokens" --cache-weights)")
    theirs+=("$("$llama" -m "$models/$format.gguf" -dev "$vulkan" -ngl 99 -p "$prompt" -n "$tokens" -r 1 -o json 2>/dev/null)")
  done
  for measure in prefill decode; do
    n=$([ $measure = prefill ] && echo 1 || echo 2)
    t=$(printf '%s\n' "${ours[@]}" | field "${measure}_tokens_per_s" | median)
    l=$(for run in "${theirs[@]}"; do printf '%s' "$run" | field avg_ts | sed -n "${n}p"; done | median)
    awk -v f="$format" -v m="$measure" -v t="$t" -v l="$l" 'BEGIN { printf "| %s | %s | %.2f | %.2f | %.2f |\n", f, m, t, l, t / l }'
  done
done
