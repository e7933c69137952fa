#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network:
#
#   PYTHON=/path/to/python bench/gpu.sh [directory for the results]
#
# PYTHON has torch for CUDA with its Triton, pytest and what a build takes; it is used as it is, the package is built
# into .site. Written there: verify.json, tests.log, results.jsonl (one record a contender and case), report.html. The
# directory is $OUT when that is set, else bench/results. STEPS picks among: verify tests quick bench.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
RESULTS=${1:-${OUT:-bench/results}}
STEPS=${STEPS:-verify tests bench}
mkdir -p "$RESULTS"
RESULTS=$(cd "$RESULTS" && pwd)
export PYTHONUNBUFFERED=1

make setup PYTHON="$(command -v "$PYTHON")"
run() { PYTHONPATH="$PWD/.site" PYTHONSAFEPATH=1 "$PYTHON" "$@"; }

run -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"; print(torch.cuda.get_device_name())'
run -m fastattn info

measure() { # suite, options
  run -m fastattn bench "$@" --device cuda --json "$RESULTS/part.jsonl" || echo "gpu.sh: bench $* failed" >&2
  if [[ -f $RESULTS/part.jsonl ]]; then
    cat "$RESULTS/part.jsonl" >>"$RESULTS/results.jsonl"
    rm "$RESULTS/part.jsonl"
  fi
}

failed=0
for step in $STEPS; do
  case $step in
  verify)
    run -m fastattn verify --backend triton --device cuda --cases "${VERIFY_CASES:-200}" --json "$RESULTS/verify.json" || failed=1
    ;;
  tests)
    run -m pytest tests -q -p no:cacheprovider 2>&1 | tee "$RESULTS/tests.log" || failed=1
    ;;
  quick)
    rm -f "$RESULTS/results.jsonl"
    measure attention --quick --dtype bfloat16 --masks dense,causal --shapes "4,16,4096,128;64,12,197,64"
    ;;
  bench)
    rm -f "$RESULTS/results.jsonl"
    lengths="4,16,1024,128;4,16,4096,128;2,16,8192,128;4,16,4096,64;4,8,4096,256;64,12,197,64;512,6,49,32"
    for backward in "" --backward; do
      measure attention --dtype bfloat16 --masks dense,causal --shapes "$lengths" $backward
      measure attention --dtype bfloat16 --masks window,padded,random,block-sparse,segments,bias,dropout \
        --shapes "4,16,4096,128;64,12,197,64" $backward
    done
    measure loss
    ;;
  *)
    echo "gpu.sh: STEPS has $step; known are verify, tests, quick, bench" >&2
    exit 2
    ;;
  esac
done
exit $failed
