#!/usr/bin/env bash
# Cross-compiles the package for aarch64 into build/arm/package. setup.py itself runs under the emulated interpreter, so
# what it asks of Python (suffix, headers, platform) are the target's answers; cmake, ninja and the compiler are the host's.
set -euo pipefail
cd "$(dirname "$0")/../.."
cache=$(tools/arm/environment.sh)
export CMAKE_TOOLCHAIN_FILE=$PWD/tools/arm/toolchain.cmake MNOPS_CUDA=OFF
export CXXFLAGS="-idirafter $cache/root/usr/include"  # Debian's pyconfig.h includes its aarch64 half from there
rm -rf build/arm/package
mkdir -p build/arm  # its .egg-info, too: the host's, in the root, may be written at the same time
"$cache/python" setup.py -q egg_info --egg-base build/arm build --build-base build/arm --build-lib build/arm/package
