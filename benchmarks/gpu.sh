#!/usr/bin/env bash
# Everything that needs a GPU, in one go and within 10 minutes: build with CUDA, GPU tests, a
# compute-sanitizer pass, benchmarks. Leaves JSON and logs in $OUT (default: out/gpu).
#
#   make gpu                      on a machine with a GPU and the network
#   make carry && make gpu        where nothing can be fetched: `make carry` first, elsewhere
#
# `make carry` fills .carry/ (ignored by git) with the wheels that a CUDA image lacks and with the
# data and models of the examples; it is used when it is there.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
SITE=$(mktemp -d)
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 SINGE_RESULTS="$OUT" CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-8}
failed=()
END=$((SECONDS + ${BUDGET:-570}))

step() {  # step NAME SECONDS COMMAND...: run with a limit, keep the log, go on after a failure
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  if [ $((END - SECONDS)) -lt 5 ]; then
    echo "== $name: NOT RUN, the time is used up"
    failed+=("$name")
    return
  fi
  limit=$((END - SECONDS < limit ? END - SECONDS : limit))
  echo "== $name: $*"
  if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then
    echo "   ok, $((SECONDS - start)) s"
  else
    echo "   FAILED ($?), $((SECONDS - start)) s; the end of $name.log:"
    tail -n 25 "$OUT/$name.log"
    failed+=("$name")
  fi
}

if ! nvidia-smi >"$OUT/nvidia-smi.log" 2>&1; then
  echo "no usable NVIDIA GPU: $(head -n 1 "$OUT/nvidia-smi.log")" >&2
  exit 1
fi
if [ -d .carry/wheels ]; then
  step wheels 120 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" .carry/wheels/*.whl
  export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PATH="$SITE/bin:$PATH"
  export SINGE_DATA="$PWD/.carry"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export SINGE_CUDA=ON XDG_CACHE_HOME="$SITE/cache"

step build 180 "$PYTHON" setup.py build_ext --inplace
step info 60 "$PYTHON" -m singe info --json
step tests 200 "$PYTHON" -m pytest -m gpu -v -p no:cacheprovider tests
step kernels 90 "$PYTHON" -m benchmarks.kernels --device cuda --rounds 10
step targets 150 "$PYTHON" -m benchmarks.targets --device cuda --patience 15 --draws 3
# ResNet-50 at 224 pixels, batch 64, fp32 and bf16, first; then what else there is time for.
matrix=("$PYTHON" -m pytest -p no:cacheprovider benchmarks/bench_scoring.py --device cuda --rounds 3)
step suite 120 "${matrix[@]}" --benchmark-json="$OUT/suite-cuda.json" \
  -k "(resnet50 or mobilenet_v2 or resnet20) and (layer-4 or network-4 or network-16)"
step sanitizer 120 compute-sanitizer --tool memcheck --error-exitcode 9 \
  "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_integral.py -m gpu -k "not large and not 64"
step compiled 60 "$PYTHON" -m benchmarks.compiled --device cuda --batches 8
step peers 60 "$PYTHON" -m pytest -p no:cacheprovider benchmarks/bench_peers.py --device cuda \
  --benchmark-json="$OUT/peers-cuda.json"
step growth 60 "$PYTHON" -m benchmarks.growth --device cuda --axes nodes samples depth
cp -f "$OUT"/*.json benchmarks/results/ 2>/dev/null || true
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all steps passed; results in $OUT"
