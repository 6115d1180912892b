#!/bin/bash
# Fuzzes the readers of what comes from outside, guided by coverage: every target of fuzz/, or those named.
# usage: scripts/fuzz.sh [SECONDS [TARGET..]]       each target for so long (60), one after the other; JOBS=2 runs two at once
#        scripts/fuzz.sh --keep [TARGET..]          what was found since, cut down to what adds coverage, becomes fuzz/corpus/TARGET
#        scripts/fuzz.sh --build                    builds only
# Needs the nightly toolchain, a C++ compiler and `cargo install cargo-fuzz`. fuzz/README.md tells how to read what comes out.
# Inputs gather in WORK (fuzz/target/work), logs with them; an input that fails is written to fuzz/artifacts/TARGET, and this fails.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${WORK:-fuzz/target/work} jobs=${JOBS:-1}
# A panic, an overflow, 512 MiB at once, 2 GiB in all or 10 seconds for one input is a finding.
limits=(-rss_limit_mb=2048 -malloc_limit_mb=512 -timeout=10 -max_len=16384)

keep= seconds=60
case ${1:-} in
  --keep) keep=1; shift ;;
  --build) seconds=0 ;;
  "") ;;
  *) seconds=$1; shift ;;
esac
[ $# -gt 0 ] && [ "$1" != --build ] || set -- $(cargo +nightly fuzz list)

# Built once, and run from a copy, so that a later build doesn't take the ground from under a long run.
nice -n 10 cargo +nightly fuzz build
[ "$seconds" != 0 ] || exit 0
host=$(rustc +nightly -vV | sed -n 's/^host: //p')
mkdir -p "$work/bin"

one() { # TARGET
  local target=$1 log=$work/$1.log
  mkdir -p "$work/$target" "fuzz/corpus/$target" "fuzz/artifacts/$target"
  local dict=fuzz/dictionaries/$target.dict
  nice -n 19 "$work/bin/$target" "${limits[@]}" -use_value_profile=1 -max_total_time="$seconds" -print_final_stats=1 -verbosity=1 \
    $([ ! -e "$dict" ] || echo "-dict=$dict") -artifact_prefix="fuzz/artifacts/$target/" "$work/$target" "fuzz/corpus/$target" >"$log" 2>&1
  local failed=$?
  row "$target" "$log"
  [ $failed = 0 ] || { echo "$target failed: see $log" >&2; return 1; }
}

row() { # TARGET LOG: a row of the table in fuzz/README.md
  local last; last=$(grep -aE '^#[0-9]+.* cov: ' "$2" | tail -n 1)
  local count=${last%%[!#0-9]*} edges=${last##* cov: }
  local found; found=$(find "fuzz/artifacts/$1" -type f | wc -l)
  echo "| $1 | $seconds | ${count#\#} | ${edges%% *} | $(find "$work/$1" -type f | wc -l) | $found |"
}

if [ -n "$keep" ]; then
  for target in "$@"; do
    least=$(mktemp -d) now=$(mktemp -d)
    mkdir -p "$work/$target"
    # Of a copy: a run that goes on takes away what it finds smaller inputs for, some of it while this copies.
    cp -r "$work/$target/." "$now" 2>/dev/null || true
    nice -n 19 "fuzz/target/$host/release/$target" "${limits[@]}" -set_cover_merge=1 -use_counters=0 "$least" "fuzz/corpus/$target" "$now" >"$work/$target.merge.log" 2>&1
    rm -r "$now"
    rm -r "fuzz/corpus/$target"; mv "$least" "fuzz/corpus/$target"; chmod 755 "fuzz/corpus/$target"
    echo "$target: $(find "fuzz/corpus/$target" -type f | wc -l) inputs, $(du -sb "fuzz/corpus/$target" | cut -f 1) bytes"
  done
  exit 0
fi

for target in "$@"; do cp "fuzz/target/$host/release/$target" "$work/bin/"; done
echo "| target | seconds | executions | coverage edges | corpus files | findings |"
echo "|---|---|---|---|---|---|"
failed=0
for target in "$@"; do
  while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || failed=1; done
  set +e; one "$target" & set -e
done
while [ -n "$(jobs -p)" ]; do wait -n || failed=1; done
exit $failed
