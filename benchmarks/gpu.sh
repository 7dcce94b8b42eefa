#!/usr/bin/env bash
# Everything that needs a GPU, in one go and within BUDGET seconds (default: 560): build with CUDA, GPU
# tests, a compute-sanitizer pass, benchmarks; of these ONLY="suite compiled" and the like. Leaves at most
# eight files in $OUT (default: out/gpu): six JSON results, logs.tar.gz, and logs.txt with the summary and
# the end of every log.
#
#   make gpu                      on a machine with a GPU and the network
#   make carry && make gpu        where nothing can be fetched: `make carry` first, elsewhere
#   ONLY=epochs make gpu          40 epochs of fine-tuning for docs/cifar10.md, in no run without ONLY
#
# `make carry` fills .carry/ (ignored by git) with the wheels that a CUDA image lacks, with the data and
# models of the examples, and with the commit; it is used when it is there. Built for sm_90 (H100, H200);
# SINGE_CUDA_ARCHS=80 and the like for other GPUs.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d)
SITE=$WORK/site LOGS=$WORK/logs RESULTS=$WORK/results
mkdir "$SITE" "$LOGS" "$RESULTS"
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 SINGE_RESULTS="$RESULTS" SINGE_CUDA=ON XDG_CACHE_HOME="$WORK/cache"
export SINGE_CUDA_ARCHS=${SINGE_CUDA_ARCHS:-90} CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-8}
for tool in nvcc compute-sanitizer; do
  command -v "$tool" >/dev/null || PATH=$PATH:/usr/local/cuda/bin
done
kinds=(kernels targets suite peers growth compiled)
results=("${kinds[@]/%/-cuda.json}" cifar10-resnet56.json)
for file in "${results[@]}"; do
  rm -f "$OUT/$file"  # of an earlier run
done
failed=()
END=$((SECONDS + ${BUDGET:-560}))

say() {
  echo "$@" | tee -a "$LOGS/summary.txt"
}

collect() {  # after every step, and at the end whatever ended the run
  local log file
  for file in "${results[@]}"; do
    [ ! -s "$RESULTS/$file" ] || cp "$RESULTS/$file" "$OUT"
  done
  {
    cat "$LOGS/summary.txt"
    for log in "$LOGS"/*.log; do
      printf '\n== %s\n' "${log##*/}"
      tail -n 40 "$log"
    done
  } >"$OUT/logs.txt" 2>/dev/null
  tar -czf "$OUT/logs.tar.gz" -C "$WORK" logs 2>/dev/null
}

finish() {
  kill $(jobs -p) 2>/dev/null
  collect
  rm -rf "$WORK"
}
trap finish EXIT

step() {  # step NAME SECONDS COMMAND...: run with a limit, keep the log, go on after a failure
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  if [[ -n ${ONLY:-} && " wheels build check $ONLY " != *" $name "* ]]; then
    return 0
  fi
  if [ $((END - SECONDS)) -lt 5 ]; then
    say "== $name: NOT RUN, the time is used up"
    failed+=("$name")
    return 1
  fi
  limit=$((END - SECONDS < limit ? END - SECONDS : limit))
  say "== $name: ${*%%$'\n'*}"
  timeout -k 5 "$limit" "$@" >"$LOGS/$name.log" 2>&1 || status=$?
  if [ "$status" = 0 ]; then
    say "   ok, $((SECONDS - start)) s"
  else
    say "   FAILED ($status), $((SECONDS - start)) s; the end of $name.log:"
    tail -n 25 "$LOGS/$name.log"
    failed+=("$name")
  fi
  collect
  return "$status"
}

give_up() {
  say "$*; everything else would fail or mean nothing"
  exit 1
}

timeout 20 nvidia-smi >"$LOGS/nvidia-smi.log" 2>&1 || give_up "no usable NVIDIA GPU: $(head -n 1 "$LOGS/nvidia-smi.log")"
if [ -d .carry/wheels ]; then
  step wheels 20 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" .carry/wheels/*.whl
  export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PATH="$SITE/bin:$PATH"
  export SINGE_DATA="$PWD/.carry"
  [ ! -f .carry/commit ] || export SINGE_COMMIT="$(cat .carry/commit)"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# CIFAR-10 takes 17 s to unpack: while the compiler runs.
timeout -k 5 90 "$PYTHON" -c 'import benchmarks.models as m; m.cifar10.images("train")' >"$LOGS/data.log" 2>&1 &
# egg_info: without it a checkout that was never installed has no version.
step build 60 "$PYTHON" setup.py -q egg_info build_ext --inplace || give_up "the build failed"
step check 20 "$PYTHON" -c '
import json, sys, torch
from singe.info import collect
from singe.kernels import native
from singe.kernels.masked_forward import backend, masked_forward
print(json.dumps(collect(), indent=1))
print(masked_forward(torch.ones(1, 2, 3, 4, device="cuda"), torch.ones(2, 3, device="cuda")).sum())
if backend(torch.device("cuda")) is None:
    sys.exit("the masked forward would fall back to torch")
sys.exit(native.cuda_problem(0) or None)' || give_up "the compiled kernels are not usable"

# From here on no falling back to torch's implementation, and no skipping for want of a GPU.
export SINGE_INTEGRAL=native SINGE_REQUIRE_GPU=1
test=("$PYTHON" -m pytest -vv -rs -p no:cacheprovider)
mapfile -t marked < <(grep -l 'mark\.gpu' tests/test_*.py)
# One thread each: the references run on the CPU, and processes that all use all cores stand in each other's way.
step tests 160 env OMP_NUM_THREADS=1 "${test[@]}" -n 14 -m gpu "${marked[@]}"
# Not marked: without a GPU these run in Triton's interpreter.
step triton 115 env OMP_NUM_THREADS=1 "${test[@]}" -n 14 -m "not gpu" tests/test_masked_forward{,_op}.py
# torch's caching allocator would hide what lies beyond a tensor; 2^30 elements would take too long.
triton=tests/test_masked_forward.py::test_triton_equals_torch
step sanitizer 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 --target-processes application-only \
  "${test[@]}" -k "not beyond and not more_channels" tests/test_integral.py::TestCuda \
  "${triton}[relu-torch.float32]" "${triton}[gelu-torch.bfloat16]" "${triton}[silu-torch.float64]"

step kernels 45 "$PYTHON" -m benchmarks.kernels --device cuda --rounds 10
step targets 90 "$PYTHON" -m benchmarks.targets --device cuda --rounds 1 --patience 15 --draws 3
# ResNet-50 first: the rest is what the time allows.
cell=benchmarks/bench_scoring.py::test_scoring
matrix=("${test[@]}" --device cuda --rounds 1)
step suite 100 "${matrix[@]}" --flush "$RESULTS/suite-cuda.json" \
  "${cell}[resnet50-layer-4]" "${cell}[resnet50-network-4]" "${cell}[resnet50-network-16]" \
  "${cell}[mobilenet_v2-layer-4]" "${cell}[mobilenet_v2-network-4]" \
  "${cell}[resnet20-layer-4]" "${cell}[resnet20-network-4]" "${cell}[resnet20-network-16]"
step peers 60 "${matrix[@]}" --flush "$RESULTS/peers-cuda.json" benchmarks/bench_peers.py
step growth 60 "$PYTHON" -m benchmarks.growth --device cuda --axes nodes samples depth
step latency 45 "$PYTHON" -m benchmarks.latency --device cuda --batch 64 --size 224
step compiled 80 "$PYTHON" -m benchmarks.compiled --device cuda --batches 8

# The block kernel uses its shared memory again and again between barriers.
step races 20 compute-sanitizer --tool racecheck --error-exitcode 9 --target-processes application-only \
  "${test[@]}" "tests/test_integral.py::TestCuda::test_equals_cpu_and_repeats[torch.float32-2-weighted]"

if [ -n "${ONLY:-}" ]; then  # by what an H200 took for 17 networks, eight take five minutes
  step epochs 460 env CUDA_DEVICE_MAX_CONNECTIONS=32 "$PYTHON" examples/cifar10/side_by_side.py \
    --ranking cost --seeds 1 --speedup 2.11 --batch-size 256 --lr 0.08 --plans "${PLANS:-.carry/plans}" \
    --criteria "gradient at 1 (singe, taylor)" "SInGE, layer" "SInGE, network" L1 FPGM LAMP Taylor Hessian
fi

cp -f "$RESULTS"/*.json benchmarks/results/ 2>/dev/null || true
for kind in "${kinds[@]}"; do
  [ -n "${ONLY:-}" ] || [ -s "$RESULTS/$kind-cuda.json" ] || say "no result of $kind"
done
if [ ${#failed[@]} -gt 0 ]; then
  say "failed: ${failed[*]}"
  exit 1
fi
say "all steps passed; results in $OUT"
