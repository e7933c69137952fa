#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network:
#
#   PYTHON=/path/to/python bench/gpu.sh [directory for the results]
#
# PYTHON has torch for CUDA with its Triton, pytest and what a build takes, nvcc is on PATH or in CUDA_HOME; they are used
# as they are, the package is built into .site. The directory is $OUT when that is set, else bench/results.
# STEPS picks among:
#   verify    random problems against float64, on the CUDA kernels and on Triton's: verify-cuda.json, verify-triton.json
#   tests     the test suite, with the tests of the CUDA kernels on the GPU and their comparison with the emulator: tests.log
#   sanitize  compute-sanitizer's memcheck and racecheck on a few problems, where the toolkit has it: sanitizer.log
#   bench     speed: the CUDA kernels, their portable path, Triton's, every SDPA backend, FlexAttention: results.jsonl (one
#             record a contender and case); quick is a few cases of it
# Without nvcc, FASTATTN_CUDA=off leaves the CUDA kernels out.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PYTHON=$(command -v "$PYTHON")
RESULTS=${1:-${OUT:-bench/results}}
STEPS=${STEPS:-verify tests sanitize bench}
mkdir -p "$RESULTS"
RESULTS=$(cd "$RESULTS" && pwd)
export PYTHONUNBUFFERED=1
WANTED=${FASTATTN_CUDA:-on}
unset FASTATTN_CUDA # of the tests that build
BACKENDS="cuda triton"
[[ $WANTED == off ]] && BACKENDS=triton

rm -f .site/.stamp # built for whatever FASTATTN_CUDA said then
FASTATTN_CUDA=$WANTED make setup PYTHON="$PYTHON"
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
    for backend in $BACKENDS; do
      run -m fastattn verify --backend $backend --device cuda --cases "${VERIFY_CASES:-200}" \
        --json "$RESULTS/verify-$backend.json" || failed=1
    done
    if [[ $BACKENDS == *cuda* ]]; then # what the Hopper path takes by default, on the other one
      FASTATTN_CUDA_PATH=portable run -m fastattn verify --backend cuda --device cuda --cases "${VERIFY_CASES:-200}" \
        --dtype bfloat16 --no-loss --json "$RESULTS/verify-cuda-portable.json" || failed=1
    fi
    ;;
  tests)
    # The emulator's library is what the GPU's results are compared with.
    [[ $BACKENDS == *cuda* ]] && { make emulator PYTHON="$PYTHON" || failed=1; }
    run -m pytest tests -q -p no:cacheprovider --continue-on-collection-errors 2>&1 | tee "$RESULTS/tests.log" || failed=1
    ;;
  sanitize)
    if ! command -v compute-sanitizer >/dev/null; then
      echo "gpu.sh: no compute-sanitizer on PATH: nothing was checked by it" | tee "$RESULTS/sanitizer.log"
    elif [[ $BACKENDS == *cuda* ]]; then
      : >"$RESULTS/sanitizer.log"
      for tool in memcheck racecheck; do
        for path in "" portable; do # without torch's cache every allocation is guarded
          PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTATTN_CUDA_PATH=$path PYTHONPATH="$PWD/.site" PYTHONSAFEPATH=1 \
            compute-sanitizer --tool $tool --error-exitcode 9 --kernel-name-exclude kernel_substring=at:: \
            "$PYTHON" -m fastattn verify --backend cuda --device cuda --small --cases "${SANITIZE_CASES:-6}" \
            2>&1 | tee -a "$RESULTS/sanitizer.log" || failed=1
        done
      done
    fi
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
      measure attention --dtype float32 --masks causal --shapes "4,16,4096,64" $backward
    done
    measure loss
    ;;
  *)
    echo "gpu.sh: STEPS has $step; known are verify, tests, sanitize, quick, bench" >&2
    exit 2
    ;;
  esac
done
exit $failed
