#!/usr/bin/env bash
# Tests the AVX-512 kernels on any x86-64 CPU: the same source, with the intrinsics of SIMDe (Debian's libsimde-dev, for
# which this needs root where it is not installed). VENV is the environment that `make build` made. Without torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$PWD/${VENV:-.venv}/bin/python
folder=$PWD/build/avx512
if [ ! -e /usr/include/simde ]; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends libsimde-dev; } >&2
fi
# -O1: these are not the instructions that anybody runs, and with -O3 SIMDe's take minutes to compile.
cmake -S . -B "$folder" -G Ninja -DCMAKE_MAKE_PROGRAM="$(dirname "$python")/ninja" \
  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -DNDEBUG" \
  -DMNOPS_EMULATE_AVX512=ON -DMNOPS_CUDA=OFF -DPython_EXECUTABLE="$python" \
  -DMNOPS_TORCH_DIR="$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >/dev/null
cmake --build "$folder" --target _C
mkdir -p "$folder/package/mnops"
touch "$folder/package/mnops/__init__.py"
cp "$folder"/_C*.so "$folder/package/mnops/"
PYTHONPATH=$folder/package PYTHONSAFEPATH=1 "$python" -m pytest -q -n auto --maxprocesses 4 -p no:cacheprovider --noconftest \
  tests/test_kernels.py -k avx512 "$@"
