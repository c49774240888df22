#!/usr/bin/env bash
# Builds the package for aarch64 and tests it under user-mode emulation, on sizes that it can bear: the kernels through
# mnops._C on a CPU that has nothing but armv8-a, then ops, autograd, modules and networks with torch in one process
# (importing it takes half a minute there). Arguments go to the second pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
tools/arm/build.sh
cache=$(tools/arm/environment.sh)
export PYTHONPATH=$PWD/build/arm/package PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
test() { "$cache/python" -m pytest -q -p no:cacheprovider "$@"; }

ARM_CPU=cortex-a53 test --noconftest tests/test_kernels.py
on_cpu='cpu-cpu and (against_reference or as_exact or memory_format or gradients_only or half_x or empty_batch) and not float64 and not drawn'
network='twenty_steps or training_then_eval or (batch_norm_rule and not bias) or one_value'  # torch 2.10 has no BatchNorm2d(bias=)
test tests/test_ops.py tests/test_nn.py tests/test_mobilenet.py -k "($on_cpu) or $network" "$@"
