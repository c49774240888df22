#!/usr/bin/env bash
# make test-gpu: the tests on the GPU, what is compiled before what Triton compiles as it goes, then NVIDIA's
# compute-sanitizer over the CUDA kernels where it is installed. Arguments go to pytest. What fails does not keep the rest
# from running; SECONDS_EACH (90) ends a part, with the failures seen so far; PARTS names those to run. Logs:
# runs/gpu-tests.
#
# A first run compiles hundreds of Triton kernels, in a process for each core; they are kept in ~/.triton.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
limit=${SECONDS_EACH:-90}
logs=runs/gpu-tests
failed=0

$python tools/gpu/here.py || exit 1
mkdir -p $logs
# Without its library the CUDA backend's tests would be left out in silence.
$python -c 'import sys; from mnops import _native; sys.exit(_native.cuda_missing())' || failed=1

# On a GPU hypothesis draws fewer shapes: each is a new kernel.
export HYPOTHESIS_PROFILE=${HYPOTHESIS_PROFILE:-few} PYTHONPATH=tools/gpu OMP_NUM_THREADS=2
shards=$(nproc --ignore=2)
[ "$shards" -gt 14 ] && shards=14

wanted() { [[ " ${PARTS:-$1} " == *" $1 "* ]]; }

# part NAME ARGUMENTS: pytest on them in as many processes, which end with a summary when time is over.
part() {
  name=$1
  shift
  wanted "$name" || return 0
  begin=$(date +%s)
  pids=()
  for i in $(seq 0 $((shards - 1))); do
    SHARD=$i/$shards timeout -k 30 "$limit" $python -m pytest -q -rf --tb=short -p shard -p no:cacheprovider "$@" \
      >"$logs/$name.$i" 2>&1 &
    pids+=($!)
  done
  for i in "${!pids[@]}"; do
    wait "${pids[$i]}"
    status=$?  # 5: no test was this process's
    if [ $status != 0 ] && [ $status != 5 ]; then
      failed=1
      grep -E "^(FAILED|ERROR|E  )|passed|failed|error|lost" "$logs/$name.$i" | tail -15
      echo "$logs/$name.$i: status $status"
    fi
  done
  echo "== $name: $(cat "$logs/$name".* | grep -oE "[0-9]+ passed" | awk '{n += $1} END {print n + 0}') passed," \
    "$(cat "$logs/$name".* | grep -cE "^(FAILED|ERROR)") failed, $(($(date +%s) - begin)) s"
}

ops="tests/test_ops.py tests/test_ops_drawn.py"
part cuda -k "cuda-cuda" $ops "$@"
part networks -k "(cuda or graph or triton) and not emulation" tests/test_backends.py tests/test_cuda_graph.py tests/test_cuda.py "$@"

if command -v compute-sanitizer >/dev/null; then
  # Beside each op's plain case, depthwise's other kernels: stride 2, 5x5, any other shape, NCHW. Only mnops' kernels are
  # looked at; not the caching allocator, which would hide an access beyond a tensor within its pool.
  plain="cuda-cuda and test_against_reference and (float32 or bfloat16)"
  plain="$plain and (plain or (depthwise and (odd or 5x5 or 7x7 or nchw)))"
  only=$(compute-sanitizer --help | grep -oE -m 1 -- "--kernel-(name|regex)\b" | head -1)
  for tool in memcheck racecheck; do
    wanted "$tool" || continue
    begin=$(date +%s)
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 30 "$limit" compute-sanitizer --tool "$tool" ${only:+$only kns=mnops} \
      --error-exitcode 1 $python -m pytest -q -p no:cacheprovider -k "$plain" tests/test_ops.py >"$logs/$tool" 2>&1 || failed=1
    tail -3 "$logs/$tool"
    echo "== $tool: $(($(date +%s) - begin)) s"
  done
else
  echo "compute-sanitizer is not installed: no memory and race checks" >&2
fi

part triton -k "triton-cuda" $ops "$@"
part ahead -k "not interpreter" tests/test_triton.py "$@"
exit $failed
