#!/bin/bash
# What AMD's compiler makes of every kernel that hardware runs, as benches/compilers/TABLE.md keeps it (Debian 12, x86-64; no GPU needed).
# usage: scripts/compilers.sh         writes the table anew
#        scripts/compilers.sh --check fails if the table differs from what this machine's compiler says
set -euo pipefail
cd "$(dirname "$0")/.."
table=benches/compilers/TABLE.md
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
TORCHLESS_KERNELS=$tmp/kernels cargo test -q --lib kernels_are_written_for_compilers -- --ignored >"$tmp/log" || { cat "$tmp/log" >&2; exit 1; }
mesa=$(dpkg-query -W -f '${Version}' mesa-vulkan-drivers)
{
  echo "# Kernels by AMD's compiler"
  echo
  echo "Of Mesa $mesa, made by \`scripts/compilers.sh\`; README.md beside the other benches says what the columns are. Linear layers are named by their weights' format, what becomes of their outputs, and the workgroup: tiles of 16 outputs x rows x slices of the columns, or the side of the square of invocations x rows x outputs of each."
  echo
  cargo run -q --release --manifest-path benches/compilers/Cargo.toml -- "$tmp/kernels"
} >"$tmp/table.md"
if [ "${1:-}" = --check ]; then
  if ! grep -q "Of Mesa $mesa," "$table"; then
    echo "not compared: the table is of another compiler than this machine's, Mesa $mesa" >&2
  elif ! diff -u "$table" "$tmp/table.md"; then
    echo "the kernels' code has changed: look at it, then scripts/compilers.sh writes the table anew" >&2
    exit 1
  fi
else
  mv "$tmp/table.md" "$table"
fi
