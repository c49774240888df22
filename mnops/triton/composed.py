"""Convolutions left to torch's libraries, with kernels of ours around them.

    forward    norm_act, the library's convolution, statistics            I + 4O passes instead of I + O
    backward   gy, norm_act again, the library's gradients, norm_act's

For what a fused Triton kernel does not do well: fp32 products without tf32, which leave the tensor cores
idle, and which BLAS does at three times Triton's rate, bound by arithmetic, so that more passes over memory
do not matter; and dense convolutions with many channels. The z in between is rounded to x's dtype, as stock
PyTorch stores it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mnops.triton.common import (
    channel_incoming,
    incoming,
    load_tile,
    measure_tile,
    pixels,
    share,
    statistics,
    store_statistics,
    to_float,
    unmeasured,
)
from mnops.triton.finish import finish_statistics
from mnops.triton.launch import (
    cdiv,
    dither,
    empty_nhwc,
    incoming_arguments,
    launch,
    multiprocessors,
    nhwc,
    precision,
    restored,
)
from mnops.triton.norm_act import PROGRAMS, WARPS, block, norm_act
from mnops.triton.norm_act import backward as norm_act_gradients


@triton.jit(do_not_specialize=["P"])
def statistics_kernel(
    y,  # (P, C)
    stats,  # (3, programs of a channel block, C): count, mean, sum of squared deviations
    P, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    group, groups, c, c_ok = share(C, BLOCK_C)
    measured = unmeasured(BLOCK_P, BLOCK_C)
    for tile in range(group, tl.cdiv(P, BLOCK_P), groups):
        first, left = pixels(tile, P, BLOCK_P)
        values = to_float(load_tile(y + first * C, left, c, c_ok, C, BLOCK_P))
        n = tl.minimum(left, BLOCK_P).to(tl.float32)
        ok = tl.arange(0, BLOCK_P)[:, None] < left
        measured = measure_tile(values, ok, n, measured)
    store_statistics(stats, group, groups, c, c_ok, C, *statistics(measured))


@triton.jit(do_not_specialize=["P", "values"])
def incoming_kernel(
    g, y,  # (P, C)
    g_mean, g_var, mean_y,  # (C,)
    gy,  # (P, C): FACTOR times gy
    P, values, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, GMEAN: tl.constexpr,
    GVAR: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    tile, _, c, c_ok = share(C, BLOCK_C)
    gm, gv, my = channel_incoming(
        g_mean, g_var, mean_y, values, c, c_ok, GMEAN, GVAR, FACTOR, g.dtype.element_ty
    )
    p = tile.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    ok = (p < P) & c_ok
    mine = tl.load(g + p * C + c, mask=ok, other=0.0)
    other = mine
    if GVAR:
        other = tl.load(y + p * C + c, mask=ok, other=0.0)
    out = incoming(mine, other, None, gm, gv, my, GMEAN, GVAR, FACTOR)
    tl.store(gy + p * C + c, out.to(gy.dtype.element_ty), mask=ok)


# ---- host ----


def better(x: Tensor) -> bool:
    """Whether a 1x1 convolution of x is BLAS's; on a CPU kernels are interpreted, to be tested."""
    return x.device.type != "cpu" and x.dtype == torch.float32 and precision(x) != "tf32"


def measured(y: Tensor, measure: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of y over N, H, W; (0,) without `measure`."""
    channels, count = y.shape[1], y.numel() // y.shape[1]
    if not measure:
        return finish_statistics(y.new_empty(0, dtype=torch.float32), channels, measure)
    block_p, block_c = block(channels)
    blocks = cdiv(channels, block_c)
    groups = min(cdiv(count, block_p), cdiv(PROGRAMS * multiprocessors(y.device), blocks))
    stats = y.new_empty((3, groups, channels), dtype=torch.float32)
    launch(
        statistics_kernel, (groups * blocks,), warps=WARPS, y=y, stats=stats, P=count, C=channels,
        BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip
    return finish_statistics(stats, channels, measure)


def incoming_gradient(
    g: Tensor, g_mean: Tensor | None, g_var: Tensor | None, y: Tensor, mean_y: Tensor
) -> tuple[Tensor, float]:
    """factor * gy in channels_last memory, and factor; gy = g + g_mean / P + 2 (y - mean_y) g_var / P."""
    g = nhwc(g)
    if g_mean is None and g_var is None:
        return g, 1.0
    channels, count = g.shape[1], g.numel() // g.shape[1]
    block_p, block_c = block(channels)
    gy, factor = empty_nhwc(g, g.shape), dither(g, g_mean, g_var)
    launch(
        incoming_kernel, (cdiv(count, block_p) * cdiv(channels, block_c),), warps=WARPS, gy=gy, P=count,
        values=count, C=channels, BLOCK_P=block_p, BLOCK_C=block_c, FACTOR=factor,
        **incoming_arguments(g, g_mean, g_var, y, mean_y),
    )  # fmt: skip
    return gy, factor


def _padded(z: Tensor, padding: Sequence[int]) -> tuple[Tensor, list[int]]:
    """z and what padding is left to the convolution, which knows symmetric ones only."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return z, [top, left]
    return nhwc(F.pad(z, (left, right, top, bottom))), [0, 0]


def forward(
    x: Tensor, weight: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, act: str, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], measure: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the reference's convolutions, dense."""
    z = nhwc(x) if mean is None and act == "none" else norm_act(nhwc(x), mean, var, gamma, beta, eps, act)
    z, sides = _padded(z, padding)
    y = nhwc(torch.conv2d(z, weight.to(z.dtype), None, stride, sides, dilation))
    return restored(y, x), *measured(y, measure)


def backward(
    g: Tensor, g_mean: Tensor | None, g_var: Tensor | None, y: Tensor, mean_y: Tensor, x: Tensor,
    weight: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, act: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not (need_input or need_weight):
        return tuple(x.new_empty(0, dtype=t.dtype) for t in (x, weight)) + tuple(
            x.new_empty(0, dtype=torch.float32) for _ in range(4)
        )
    gy, factor = incoming_gradient(g, g_mean, g_var, y, mean_y)
    x_in, pending = nhwc(x), (mean, var, gamma, beta, eps, act)
    z = x_in if mean is None and act == "none" else norm_act(x_in, *pending)
    z, sides = _padded(z, padding)
    gz, gw, _ = torch.ops.aten.convolution_backward(
        gy, z, weight.to(z.dtype), None, stride, sides, dilation, False, [0, 0], 1, [
            need_input, need_weight, False
        ]
    )
    dweight = gw.to(weight.dtype).contiguous() / factor if need_weight else weight.new_empty(0)
    if not need_input:
        return x.new_empty(0), dweight, *(x.new_empty(0, dtype=torch.float32) for _ in range(4))
    if gz.shape != x.shape:
        top, _, left, _ = padding
        gz = gz[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    dx, *vector_grads = norm_act_gradients(nhwc(gz), x_in, *pending, 1 / factor)
    return restored(dx, x), dweight, *vector_grads
