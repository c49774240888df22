"""The CUDA kernels against the reference, under the emulation: test_cuda.py runs this file.

Every test runs with the threads of a block first to last, then everything again in other orders, which must
not change a bit: see csrc/cuda/emulation/cuda.h. An access beyond an array stops the process.
"""

import ctypes
import os

import pytest
import torch
from accuracy import assert_as_exact
from cases import ACTS, CASES, DTYPES, Case
from test_ops import (
    by_reference,
    compare_with_reference,
    conv_and_gradients,
    draw,
    draw_norm,
    norm_and_gradients,
    spelled_out,
    stock_pool,
)

import mnops
from mnops import ops

LIBRARY = ctypes.CDLL(os.environ["MNOPS_CUDA_EMULATION"])
ORDERS = (1, 2, 3)  # last to first, and two shuffles


@pytest.fixture(autouse=True)
def _cuda():
    launches = LIBRARY.mnops_cuda_emulation_launches()
    with mnops.backend("cuda"):
        yield
    assert LIBRARY.mnops_cuda_emulation_launches() > launches, "no kernel ran"


def in_every_order(run):
    """run, whose results must be the same bits in whatever order threads run."""

    def checked(*inputs):
        LIBRARY.mnops_cuda_emulation_order(0)
        results = run(*inputs)
        for order in ORDERS:
            LIBRARY.mnops_cuda_emulation_order(order)
            for name, again in run(*inputs).items():
                assert torch.equal(again, results[name]), f"{name} depends on the order of threads ({order})"
        return results

    return checked


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("op", [ops.norm_act, ops.norm_act_pool], ids=["norm_act", "norm_act_pool"])
def test_norm_act(op, act, dtype):
    def run(*inputs):
        return norm_and_gradients(op, act, *inputs)

    def exact(*inputs):
        return norm_and_gradients(stock_pool if op is ops.norm_act_pool else spelled_out, act, *inputs)

    for layout, shape in {"channels_last": (2, 16, 7, 5), "nchw": (3, 13, 1, 1), "sliced": (1, 72, 6, 6)}.items():
        case = Case("", "", shape, layout=layout)
        draws = [draw_norm(op, case, dtype, "cpu")]
        assert_as_exact(in_every_order(run), by_reference(run), exact, draws, shape)


FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
STEMS = (
    *((c, d) for c in CASES for d in (FP32, BF16) if c.op == "stem"),
    *((c, d) for c in CASES for d in (FP16, FP64) if c.op == "stem" and c.label in ("plain", "nchw", "7x7")),
    *((Case("40 out, tiles", "stem", (1, 3, 26, 25), 40, stride=2, layout="nchw"), d) for d in (FP32, BF16)),
    (Case("strides apart", "stem", (2, 4, 5, 37), 9, kernel=2, stride=3, padding=(3, 0, 0, 5), act="silu"), FP16),
)


@pytest.mark.parametrize(("case", "dtype"), STEMS, ids=str)
def test_stem(case, dtype):
    LIBRARY.mnops_cuda_emulation_order(len(case.label) % 4)
    compare_with_reference(case, dtype, "cpu")


def same_bits_in_every_order(case, dtype):
    def run(*inputs):
        return conv_and_gradients(case, case.conv, *inputs)

    in_every_order(run)(*draw(case, dtype, "cpu"))


def test_stem_at_a_mean_of_1000_deviations():
    case = Case("", "stem", (2, 3, 24, 25), 40, stride=2, padding=0)
    weight = case.weight(FP32, "cpu").abs()
    weight = weight / weight.sum((1, 2, 3), keepdim=True)  # an average: mean 1000 stays 1000
    x = torch.randn(case.shape) * weight[0].numel() ** 0.5 + 1000
    y, mean, var = case.conv(x, weight)
    var_of_y, mean_of_y = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), mean_of_y, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), var_of_y, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_stem_keeps_nan(dtype):
    case = Case("", "stem", (2, 3, 9, 9), 8, stride=2)
    x = case.x(dtype, "cpu")
    x[0, :, 1, 1] = torch.nan
    y, mean, var = case.conv(x, case.weight(dtype, "cpu"))
    assert y[0, :, 0, 0].isnan().all() and not y[1].isnan().any() and mean.isnan().all() and var.isnan().all()


def test_stem_of_nothing():
    x, weight = torch.randn(0, 3, 8, 8).requires_grad_(), torch.randn(8, 3, 3, 3).requires_grad_()
    y, _, _ = ops.stem_conv2d(x, weight, 2, 1)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.randn(y.shape))
    assert y.shape == (0, 8, 4, 4) and dx.shape == x.shape and not dweight.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stem_same_bits(dtype):
    same_bits_in_every_order(Case("two tiles", "stem", (1, 3, 31, 23), 12, stride=2), dtype)
