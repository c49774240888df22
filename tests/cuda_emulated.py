"""The CUDA kernels against the reference, under the emulation: test_cuda.py runs this file.

Every test runs with the threads of a block first to last, then everything again in other orders, which must
not change a bit: see csrc/cuda/emulation/cuda.h. An access beyond an array stops the process.
"""

import ctypes
import os

import pytest
import torch
from accuracy import assert_as_exact
from cases import ACTS, DTYPES, Case
from test_ops import by_reference, draw_norm, norm_and_gradients, spelled_out, stock_pool

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
