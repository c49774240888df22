"""norm_act and its backward: a pending norm and activation on their own, where no convolution takes them
along.

One pass each: forward reads x and writes z, backward reads g and x and writes dx, the floor. Nothing to win
here but launches; the point of the package is to need these two as little as can be.

Programs take rows of pixels x BLOCK_C channels, 16 bytes a thread. In the backward they are persistent, with
the channel sums kept apart per row of the block until the end: one reduction across threads instead of one a
tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnops import reference
from mnops.triton.common import (
    ACTS,
    NONE,
    activation,
    channel_norm,
    normalise,
    normalise_backward,
    share,
    store_sums,
    to_float,
)
from mnops.triton.finish import finish_matrix
from mnops.triton.launch import cdiv, empty_nhwc, launch, multiprocessors, nhwc, norm_arguments, restored

WARPS = 4
VALUES = 16  # a thread, in two or four 16-byte loads
PROGRAMS = 8  # of the backward, a multiprocessor


@triton.jit(do_not_specialize=["P"])
def norm_act_kernel(
    x,  # (P, C)
    mean, var, gamma, beta,  # (C,)
    residual,  # (P, C)
    z,  # (P, C)
    P, eps,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr,
    BETA: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    tile, _, c, c_ok = share(C, BLOCK_C)
    m, scale, shift = channel_norm(
        mean, var, gamma, beta, eps, c, c_ok, NORM, GAMMA, BETA, x.dtype.element_ty
    )
    p = tile.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    ok = (p < P) & c_ok
    out = normalise(tl.load(x + p * C + c, mask=ok, other=0.0), None, m, scale, shift, NORM, ACT)
    if RESIDUAL:
        out += to_float(tl.load(residual + p * C + c, mask=ok, other=0.0))
    tl.store(z + p * C + c, out.to(z.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["P", "IMAGE"])
def norm_act_backward_kernel(
    g,  # (P, C), or (N, C) where POOL
    x,  # (P, C)
    mean, var, gamma, beta,  # (C,)
    dx,  # (P, C)
    sums,  # (2, programs of a channel block, C): sum gp, sum gp * (x - mean)
    P,
    IMAGE,  # pixels of an image
    factor,  # of g
    eps,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr,
    BETA: tl.constexpr, ACT: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    group, groups, c, c_ok = share(C, BLOCK_C)
    m, scale, shift = channel_norm(
        mean, var, gamma, beta, eps, c, c_ok, NORM, GAMMA, BETA, x.dtype.element_ty
    )
    sum1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tile in range(group, tl.cdiv(P, BLOCK_P), groups):
        p = tl.cast(tile, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
        ok = (p < P) & c_ok
        stored = tl.load(x + p * C + c, mask=ok, other=0.0)
        if POOL:
            gz = tl.load(g + p // IMAGE * C + c, mask=ok, other=0.0)
        else:
            gz = tl.load(g + p * C + c, mask=ok, other=0.0)
        pre = normalise(stored, None, m, scale, shift, NORM, NONE)
        gp, gp_away, gx = normalise_backward(
            to_float(gz) * factor, stored, pre, activation(pre, ACT), None, m, scale, NORM, ACT
        )
        if NORM:
            sum1 += gp
            sum2 += gp_away
        tl.store(dx + p * C + c, gx.to(dx.dtype.element_ty), mask=ok)
    if NORM:
        store_sums(sums, group, groups, c, c_ok, C, tl.sum(sum1, 0)[None, :], tl.sum(sum2, 0)[None, :])


# ---- host ----


def block(channels: int) -> tuple[int, int]:
    """BLOCK_P, BLOCK_C: channels up to 128, which is 256 bytes of bf16 in a row."""
    block_c = min(128, triton.next_power_of_2(channels))
    return max(1, 32 * WARPS * VALUES // block_c), block_c


def norm_act(
    x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    act: str, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.norm_act(x, mean, var, gamma, beta, eps, act, residual)
    z = empty_nhwc(x, x.shape)
    channels, count = x.shape[1], x.numel() // x.shape[1]
    block_p, block_c = block(channels)
    launch(
        norm_act_kernel, (cdiv(count, block_p) * cdiv(channels, block_c),), warps=WARPS, x=nhwc(x),
        residual=None if residual is None else nhwc(residual), z=z, P=count, eps=eps, C=channels,
        BLOCK_P=block_p, BLOCK_C=block_c, ACT=ACTS[act], RESIDUAL=residual is not None,
        **norm_arguments(mean, var, gamma, beta),
    )  # fmt: skip
    return restored(z, x)


def norm_act_backward(
    g: Tensor, x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.norm_act_backward(g, x, mean, var, gamma, beta, eps, act)
    return backward(nhwc(g), x, mean, var, gamma, beta, eps, act, 1.0)


def backward(g, x, mean, var, gamma, beta, eps, act, factor):
    """From factor * g; g (N, C, H, W) in channels_last memory, or (N, C): the same at every pixel of an
    image.
    """
    channels, count = x.shape[1], x.numel() // x.shape[1]
    block_p, block_c = block(channels)
    blocks = cdiv(channels, block_c)
    groups = min(cdiv(count, block_p), cdiv(PROGRAMS * multiprocessors(x.device), blocks))
    norm = norm_arguments(mean, var, gamma, beta)
    dx = empty_nhwc(x, x.shape)
    sums = None if mean is None else x.new_empty((2, groups, channels), dtype=torch.float32)
    launch(
        norm_act_backward_kernel, (groups * blocks,), warps=WARPS, g=g, x=nhwc(x), dx=dx, sums=sums, P=count,
        IMAGE=x.shape[2] * x.shape[3], factor=factor, eps=eps, C=channels, BLOCK_P=block_p, BLOCK_C=block_c,
        ACT=ACTS[act], POOL=g.dim() == 2, **norm,
    )  # fmt: skip
    return restored(dx, x), *finish_matrix(None, dx, sums, norm, eps, x, channels)
