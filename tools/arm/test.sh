#!/usr/bin/env bash
# Builds the package for aarch64 and tests it under user-mode emulation, on sizes that it can bear: the kernels through
# mnops._C on a CPU that has nothing but armv8-a, what newer ones have on such a one, and beside that, in one process
# (importing torch takes half a minute there), ops, autograd, blocks and the network. Arguments go to the latter's pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
tools/arm/build.sh
cache=$(tools/arm/environment.sh)
export PYTHONPATH=$PWD/build/arm/package PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
test() { "$cache/python" -m pytest -q -p no:cacheprovider "$@"; }

(
  ARM_CPU=cortex-a53 test --noconftest tests/test_kernels.py -k "neon- or forcing"
  ARM_CPU=max test --noconftest tests/test_kernels.py -k "neon_bf16-bfloat16 and not activations"
) > build/arm/kernels.log 2>&1 &
kernels=$!

# The kernels have every shape there: of each op with torch the layouts, dtypes, strides and gradients.
ops='cpu-cpu and not float64 and not drawn and (against_reference and not norm_act and (plain or nchw or sliced or even)
     or as_exact and plain or norm_act_against and sliced and silu or gradients_only or half_x or memory_format or empty_batch)'
blocks='training_then_eval and relu and not relu6 or batch_norm_rule and momentum and separable or one_value and separable'
network='equals_stock and bn_momentum and cpu-cpu or half_network or small_final_map or any_image_layout'
status=0
test tests/test_ops.py tests/test_nn.py tests/test_mobilenet.py -k "${ops//$'\n'/} or $blocks or $network" "$@" || status=1
wait $kernels || status=1
cat build/arm/kernels.log
exit $status
