"""pointwise_conv2d: a matrix product over the channels of every pixel, normalised on load and measured on
store.

With P pixels, C channels in and O out, every tensor is a matrix: x (P, C), y (P, O), weight (O, C).

    forward    y = z w^T            reads x, writes y:               C + O numbers a pixel, the floor
    dgrad      gz = gy w, and dx    reads g, y, x, writes dx (, gy): 2C + 2O (+ O)
    wgrad      dw = gy^T z          reads gy, x:                     C + O
    both       in one kernel        reads g, y, x, writes dx:        2C + 2O, the floor

The kernel for both gradients keeps all of dw in registers, so it serves up to 128 x 128 channels: that is
where images are large and the bytes are. Beyond, dgrad leaves gy behind for wgrad, as many bytes as reading g
and y again, and half the arithmetic.

The products run on tensor cores: z and gy are rounded to x's dtype on the way in, as stock PyTorch stores
them. A 512 x 512 layer has 256 FLOP a byte and is bound by them, not by memory; there a tile reads its
operands through L2 BLOCK_O / O times. It loses to a tuned BLAS where C and O are large and the image small
enough that passes over memory are cheap; in fp32 without tf32 tensor cores are out, and `composed.py` hands
the product to BLAS.

Persistent programs: each takes the same output channels through many tiles of pixels, so the second stage of
the statistics has few rows to sum.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnops import reference
from mnops.triton import composed, tiles, tune
from mnops.triton.common import (
    ACTS,
    block_channels,
    channel_incoming,
    channel_norm,
    load_tile,
    load_vectors,
    normalise,
    pixels,
    product,
    share,
    statistics,
    store_measured,
    store_statistics,
    store_vectors,
    unmeasured,
)
from mnops.triton.finish import BLOCK, finish_statistics
from mnops.triton.launch import (
    cdiv,
    empty_nhwc,
    gpu,
    launch,
    multiprocessors,
    nhwc,
    norm_arguments,
    precision,
    restored,
)

# Persistent ones a multiprocessor, by their warps: a multiple of those that are resident, 1 or 2 of 8 warps, 2 or 3
# of 4.
PROGRAMS = {8: 2, 4: 6}


@triton.jit(do_not_specialize=["values"])
def pointwise_prepare_kernel(
    weight,  # (O, C)
    mean, var, gamma, beta,  # (C,) of the pending norm
    g_mean, g_var, mean_y,  # (O,)
    matrix,  # (O, C): weight in x's dtype
    x,  # only for its dtype
    norm,  # (3, C): mean, scale, shift
    folded,  # (3, O): what `incoming` adds
    values, eps, C, O,
    NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, GMEAN: tl.constexpr, GVAR: tl.constexpr,
    FACTOR: tl.constexpr, CAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the products would work out anew for every tile: per-channel vectors, and weights in x's dtype."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if CAST:
        tl.store(matrix + i, tl.load(weight + i, mask=i < O * C), mask=i < O * C)
    dtype: tl.constexpr = x.dtype.element_ty
    if NORM:
        m, scale, shift = channel_norm(mean, var, gamma, beta, eps, i, i < C, NORM, GAMMA, BETA, dtype)
        store_vectors(norm, i, i < C, C, m, scale, shift)
    if GMEAN or GVAR:
        gm, gv, my = channel_incoming(g_mean, g_var, mean_y, values, i, i < O, GMEAN, GVAR, FACTOR, dtype)
        store_vectors(folded, i, i < O, O, gm, gv, my)


@triton.jit(do_not_specialize=["P"])
def pointwise_conv2d_kernel(
    x,  # (P, C)
    matrix,  # (O, C)
    norm,  # (3, C)
    y,  # (P, O)
    stats,  # (3, programs of an output block, O): count, mean, sum of squared deviations
    P,
    C: tl.constexpr, O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, MEASURE: tl.constexpr, PRECISION: tl.constexpr,
    PERSIST: tl.constexpr,  # a program takes many tiles; otherwise one
):  # fmt: skip
    group, groups, o, o_ok = share(O, BLOCK_O)
    measured = unmeasured(BLOCK_P, BLOCK_O)
    if PERSIST:  # all of w stays in shared memory
        c, c_ok = block_channels(0, C, BLOCK_C)
        w = load_weight(matrix, o, o_ok, c, c_ok, C)
        for tile in range(group, tl.cdiv(P, BLOCK_P), groups):
            first, left = pixels(tile, P, BLOCK_P)
            z = normalised_tile(x + first * C, norm, left, c, c_ok, C, BLOCK_P, NORM, ACT)
            acc = product(z, tl.trans(w), None, PRECISION)
            measured = store_measured(y + first * O, acc, left, o, o_ok, measured, O, BLOCK_P, MEASURE)
    else:
        first, left = pixels(group, P, BLOCK_P)
        acc = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
        for block in range(tl.cdiv(C, BLOCK_C)):
            c, c_ok = block_channels(block, C, BLOCK_C)
            z = normalised_tile(x + first * C, norm, left, c, c_ok, C, BLOCK_P, NORM, ACT)
            acc = product(z, tl.trans(load_weight(matrix, o, o_ok, c, c_ok, C)), acc, PRECISION)
        measured = store_measured(y + first * O, acc, left, o, o_ok, measured, O, BLOCK_P, MEASURE)
    if MEASURE:
        store_statistics(stats, group, groups, o, o_ok, O, *statistics(measured))


@triton.jit
def normalised_tile(
    x, norm, left, c, c_ok, C: tl.constexpr, BLOCK_P: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr
):
    """z of a tile's pixels and the channels c, in x's dtype for the tensor cores."""
    m, scale, shift = load_vectors(norm, c, c_ok, C, NORM)
    stored = load_tile(x, left, c, c_ok, C, BLOCK_P)
    return normalise(stored, None, m, scale, shift, NORM, ACT).to(x.dtype.element_ty)


@triton.jit
def load_weight(matrix, o, o_ok, c, c_ok, C: tl.constexpr):
    """The block of w of the outputs o and the channels c, [BLOCK_O, BLOCK_C]."""
    return tl.load(matrix + tl.trans(o) * C + c, mask=tl.trans(o_ok) & c_ok, other=0.0)


# ---- host ----


class Prepared(NamedTuple):
    """What pointwise_prepare_kernel writes."""

    matrix: Tensor
    norm: Tensor
    folded: Tensor


def prepare(
    x: Tensor, weight: Tensor, norm: dict[str, Any], eps: float, g_mean: Tensor | None = None,
    g_var: Tensor | None = None, mean_y: Tensor | None = None, factor: float = 1.0, values: int = 1,
) -> Prepared:  # fmt: skip
    out, channels = weight.shape[:2]
    cast, affine = weight.dtype != x.dtype, g_mean is not None or g_var is not None
    weight = weight.contiguous()
    matrix = torch.empty((out, channels), dtype=x.dtype, device=x.device) if cast else weight.view(
        out, channels
    )
    vectors_of_x = x.new_empty((3, channels) if norm["NORM"] else 0, dtype=torch.float32)
    folded = x.new_empty((3, out) if affine else 0, dtype=torch.float32)
    size = max(cast * out * channels, vectors_of_x.numel() // 3, folded.numel() // 3)
    if size:
        launch(
            pointwise_prepare_kernel, (cdiv(size, BLOCK),), weight=weight, g_mean=g_mean, g_var=g_var,
            mean_y=mean_y, matrix=matrix, x=x, norm=vectors_of_x, folded=folded, values=values, eps=eps,
            C=channels, O=out, GMEAN=g_mean is not None, GVAR=g_var is not None, FACTOR=factor, CAST=cast,
            BLOCK=BLOCK, **norm,
        )  # fmt: skip
    return Prepared(matrix, vectors_of_x, folded)


def pointwise_conv2d(
    x: Tensor, weight: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, act: str, measure: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    args = x, weight, mean, var, gamma, beta, eps, act
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.pointwise_conv2d(*args, measure)
    if composed.better(x):
        return composed.forward(*args, (1, 1), (0, 0, 0, 0), (1, 1), measure)
    out, channels = weight.shape[:2]
    candidates = tiles.pointwise(channels, out, x.element_size(), gpu(x.device))
    shape = x.dtype, *x.shape[1:], out
    return forward(
        *args, measure, tune.best(
            "pointwise_conv2d", shape, x, candidates, lambda tile: forward(*args, measure, tile)
        )
    )


def forward(x, weight, mean, var, gamma, beta, eps, act, measure, tile):
    n, channels, height, width = x.shape
    out, count = weight.shape[0], n * height * width
    matrix, norm, _ = prepare(x, weight, norm_arguments(mean, var, gamma, beta), eps)
    blocks, all_tiles = cdiv(out, tile.columns), cdiv(count, tile.pixels)
    persist = channels <= tile.depth
    groups = min(all_tiles, cdiv(PROGRAMS[tile.warps] * multiprocessors(x.device), blocks)) if persist else all_tiles
    y = empty_nhwc(x, (n, out, height, width))
    stats = x.new_empty((3, groups, out) if measure else 0, dtype=torch.float32)
    launch(
        pointwise_conv2d_kernel, (groups * blocks,), warps=tile.warps, stages=tile.stages,
        x=nhwc(x), matrix=matrix, norm=norm, y=y, stats=stats, P=count, C=channels, O=out,
        BLOCK_P=tile.pixels, BLOCK_O=tile.columns, BLOCK_C=tile.depth, NORM=mean is not None, ACT=ACTS[act],
        MEASURE=measure, PRECISION=precision(x), PERSIST=persist,
    )  # fmt: skip
    return restored(y, x), *finish_statistics(stats, out, measure)
