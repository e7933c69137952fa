#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network:
#
#   PYTHON=/path/to/python bench/gpu.sh [directory for the results]
#
# PYTHON has torch for CUDA with its Triton, pytest and what a build takes, nvcc is on PATH or in CUDA_HOME; they are used
# as they are, the package is built into .site. The directory is $OUT when that is set, else bench/results.
# STEPS picks among these; each takes a few minutes and can be run by itself, and what was built stays:
#   verify    random problems against float64, on the CUDA kernels and on Triton's, a process a core: verify-*.log
#   kernels   the tests of the CUDA kernels, on the GPU and against the emulator: kernels.log
#   tests     the whole test suite: tests.log
#   sanitize  compute-sanitizer's memcheck and racecheck on a few problems, where the toolkit has it: sanitizer.log
#   bench     speed: the CUDA kernels, their portable path, Triton's, every SDPA backend, FlexAttention, in the parts
#             forward, backward, masks, decode, compiled (FlexAttention and torch.compile), loss and additive:
#             results-PART.jsonl (one record a contender and case)
#   quick     a few cases of it: results-quick.jsonl
# The build alone is STEPS=" ". Without nvcc, FASTATTN_CUDA=off leaves the CUDA kernels out.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PYTHON=$(command -v "$PYTHON")
RESULTS=${1:-${OUT:-bench/results}}
STEPS=${STEPS:-verify kernels tests sanitize bench}
STEPS=${STEPS/bench/forward backward masks decode compiled loss additive}
CORES=$(nproc)
mkdir -p "$RESULTS"
RESULTS=$(cd "$RESULTS" && pwd)
export PYTHONUNBUFFERED=1
WANTED=${FASTATTN_CUDA:-on}
unset FASTATTN_CUDA # of the tests that build
BACKENDS="cuda triton"
[[ $WANTED == off ]] && BACKENDS=triton

[[ -f .site/.gpu-$WANTED ]] || rm -f .site/.stamp # built for whatever FASTATTN_CUDA said then
FASTATTN_CUDA=$WANTED make setup PYTHON="$PYTHON"
touch ".site/.gpu-$WANTED"
run() { PYTHONPATH="$PWD/.site" PYTHONSAFEPATH=1 "$PYTHON" "$@"; }

run -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"; print(torch.cuda.get_device_name())'
run -m fastattn info

measure() { # suite, options
  run -m fastattn bench "$@" --device cuda --json "$RESULTS/part.jsonl" || echo "gpu.sh: bench $* failed" >&2
  if [[ -f $RESULTS/part.jsonl ]]; then
    cat "$RESULTS/part.jsonl" >>"$RESULTS/results-$step.jsonl"
    rm "$RESULTS/part.jsonl"
  fi
}

# Problems of as many seeds as there are cores, each seed by a process of its own: Triton compiles nearly every problem anew,
# and the float64 answers come from the CPU.
verify() { # name, problems in all, options
  local name=$1 cases=$((($2 + CORES - 1) / CORES)) log="$RESULTS/verify-$1.log" pids=() pid seed
  shift 2
  for ((seed = 0; seed < CORES; ++seed)); do
    OMP_NUM_THREADS=1 run -m fastattn verify --device cuda --cases $cases --seed $seed "$@" >"$log.$seed" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  cat "$log".* >"$log"
  rm "$log".*
  grep -h "cases passed" "$log" || true
}

failed=0
for step in $STEPS; do
  case $step in
  verify)
    for backend in $BACKENDS; do
      verify $backend "${VERIFY_CASES:-128}" --backend $backend
    done
    if [[ $BACKENDS == *cuda* ]]; then # what the Hopper path takes by default, on the other one
      FASTATTN_CUDA_PATH=portable verify cuda-portable "${VERIFY_CASES:-128}" --backend cuda --dtype bfloat16 --no-loss
    fi
    ;;
  kernels)
    if [[ $BACKENDS == *cuda* ]]; then
      # The emulator's library is what the GPU's results are compared with.
      make emulator PYTHON="$PYTHON" || failed=1
      run -m pytest tests/cuda_kernels -q -s -p no:cacheprovider 2>&1 | tee "$RESULTS/kernels.log" || failed=1
    fi
    ;;
  tests)
    run -m pytest tests -q -p no:cacheprovider --continue-on-collection-errors \
      $(run -c 'import xdist' 2>/dev/null && echo "-n $CORES --dist worksteal") 2>&1 | tee "$RESULTS/tests.log" || failed=1
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
  quick | forward | backward | masks | decode | compiled | loss | additive)
    rm -f "$RESULTS/results-$step.jsonl"
    lengths="4,16,1024,128;4,16,4096,128;2,16,8192,128;4,16,4096,64;4,8,4096,256;64,12,197,64;512,6,49,32"
    case $step in # --quick leaves out the contenders that compile
    quick) measure attention --quick --dtype bfloat16 --masks dense,causal --shapes "4,16,4096,128;64,12,197,64" ;;
    forward) measure attention --quick --dtype bfloat16 --masks dense,causal --shapes "$lengths" ;;
    backward) measure attention --quick --dtype bfloat16 --masks dense,causal --shapes "$lengths" --backward ;;
    masks)
      for backward in "" --backward; do
        measure attention --quick --dtype bfloat16 --masks window,padded,random,block-sparse,segments,bias,dropout \
          --shapes "4,16,4096,128;64,12,197,64" $backward
        measure attention --quick --dtype float32 --masks causal --shapes "4,16,4096,64" $backward
      done
      ;;
    decode)
      measure attention --quick --dtype bfloat16 --masks dense,padded --shapes "1,32/8,1x8192,64;16,32/8,1x8192,128"
      ;;
    compiled)
      for backward in "" --backward; do
        measure attention --dtype bfloat16 --masks causal,window,segments --shapes "4,16,4096,128" --rounds 5 $backward
      done
      ;;
    loss | additive) for dtype in float32 bfloat16; do measure $step --dtype $dtype; done ;;
    esac
    ;;
  *)
    echo "gpu.sh: STEPS has $step; known are verify, kernels, tests, sanitize, quick, bench and its parts" >&2
    exit 2
    ;;
  esac
done
exit $failed
