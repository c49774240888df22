#!/usr/bin/env bash
# make test-gpu: the ops on the GPU for every backend that serves there, then a few of them under NVIDIA's
# compute-sanitizer where it is installed. Arguments go to pytest. What fails does not keep the rest from running.
#
# A first run compiles hundreds of Triton kernels, in a process for each core where pytest-xdist is installed; they
# are kept in ~/.triton.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
failed=0
step() {
  echo "== $*" >&2
  "$@" || failed=1
}

$python tools/gpu/here.py || exit 1

parallel=()
if $python -c 'import xdist' 2>/dev/null; then
  parallel=(-n "$(nproc --ignore=2)")
fi
# On a GPU hypothesis draws fewer shapes: each is a new kernel.
export HYPOTHESIS_PROFILE=${HYPOTHESIS_PROFILE:-few}
step $python -m pytest -q -rsf "${parallel[@]}" -k "cuda or graph or triton" \
  tests/test_backends.py tests/test_ops.py tests/test_ops_drawn.py tests/test_cuda_graph.py tests/test_triton.py \
  tests/test_cuda.py "$@"

if command -v compute-sanitizer >/dev/null; then
  # Beside each op's plain case, depthwise's other kernels: stride 2, 5x5, any other shape, NCHW.
  plain="cuda and test_against_reference and (float32 or bfloat16)"
  plain="$plain and (plain or (depthwise and (odd or 5x5 or 7x7 or nchw)))"
  # Not the caching allocator: it would hide an access beyond a tensor within its pool.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    step compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      $python -m pytest -q -p no:cacheprovider -k "$plain" tests/test_ops.py
  done
else
  echo "compute-sanitizer is not installed: no memory and race checks" >&2
fi
exit $failed
