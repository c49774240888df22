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

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnops import reference
from mnops.triton import composed, tune
from mnops.triton.common import (
    ACTS,
    DITHER,
    NONE,
    activation,
    activation_backward,
    block_channels,
    channel_incoming,
    channel_norm,
    incoming,
    load_vectors,
    measure_tile,
    normalise,
    product,
    rounded,
    to_float,
)
from mnops.triton.finish import BLOCK, finish_matrix, finish_statistics
from mnops.triton.launch import cdiv, empty_nhwc, launch, multiprocessors, nhwc, precision, restored, vectors

PROGRAMS = 2  # persistent ones, a multiprocessor


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
    CAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the products would work out anew for every tile: per-channel vectors, and weights in x's dtype."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if CAST:
        tl.store(matrix + i, tl.load(weight + i, mask=i < O * C), mask=i < O * C)
    if NORM:
        m, scale, shift = channel_norm(mean, var, gamma, beta, eps, i, i < C, NORM, GAMMA, BETA, x.dtype.element_ty)
        tl.store(norm + i, m, mask=i < C)
        tl.store(norm + C + i, scale, mask=i < C)
        tl.store(norm + 2 * C + i, shift, mask=i < C)
    if GMEAN or GVAR:
        dtype: tl.constexpr = x.dtype.element_ty
        FACTOR: tl.constexpr = DITHER if dtype != tl.float32 else 1.0
        gm, gv, my = channel_incoming(g_mean, g_var, mean_y, values, i, i < O, GMEAN, GVAR, FACTOR, dtype)
        tl.store(folded + i, gm, mask=i < O)
        tl.store(folded + O + i, gv, mask=i < O)
        tl.store(folded + 2 * O + i, my, mask=i < O)


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
    blocks = tl.cdiv(O, BLOCK_O)  # innermost: programs that read the same pixels run side by side, and share them in L2
    group, groups = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    o, o_ok = block_channels(tl.program_id(0) % blocks, O, BLOCK_O)
    out = stats + group * O + o
    count = 0.0
    mean = tl.zeros([1, BLOCK_O], tl.float32)
    m2 = tl.zeros([1, BLOCK_O], tl.float32)
    if PERSIST:  # all of w stays in shared memory
        c, c_ok = block_channels(0, C, BLOCK_C)
        w = tl.load(matrix + tl.trans(o) * C + c, mask=tl.trans(o_ok) & c_ok, other=0.0)
        for tile in range(group, tl.cdiv(P, BLOCK_P), groups):
            first, left = pixels(tile, P, BLOCK_P)
            z = normalised_tile(x + first * C, norm, left, c, c_ok, C, BLOCK_P, NORM, ACT)
            acc = product(z, tl.trans(w), None, PRECISION)
            count, mean, m2 = store_tile(y + first * O, acc, left, o, o_ok, count, mean, m2, O, BLOCK_P, MEASURE)
    else:
        first, left = pixels(group, P, BLOCK_P)
        acc = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
        for block in range(tl.cdiv(C, BLOCK_C)):
            c, c_ok = block_channels(block, C, BLOCK_C)
            z = normalised_tile(x + first * C, norm, left, c, c_ok, C, BLOCK_P, NORM, ACT)
            w = tl.load(matrix + tl.trans(o) * C + c, mask=tl.trans(o_ok) & c_ok, other=0.0)
            acc = product(z, tl.trans(w), acc, PRECISION)
        count, mean, m2 = store_tile(y + first * O, acc, left, o, o_ok, count, mean, m2, O, BLOCK_P, MEASURE)
    if MEASURE:
        tl.store(out, count + tl.zeros([1, BLOCK_O], tl.float32), mask=o_ok)
        tl.store(out + groups * O, mean, mask=o_ok)
        tl.store(out + 2 * groups * O, m2, mask=o_ok)


@triton.jit
def pixels(tile, P, BLOCK_P: tl.constexpr):
    """The first pixel of a tile (64-bit; within a tile 32 bits do), and how many there are from it on."""
    return tl.cast(tile, tl.int64) * BLOCK_P, P - tile * BLOCK_P


@triton.jit
def normalised_tile(
    x, norm, left, c, c_ok, C: tl.constexpr, BLOCK_P: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr
):
    """z of a tile's pixels and the channels c, in x's dtype for the tensor cores."""
    p = tl.arange(0, BLOCK_P)[:, None]
    m, scale, shift = c, c, c
    if NORM:
        m, scale, shift = load_vectors(norm, c, c_ok, C)
    stored = tl.load(x + (p * C + c), mask=(p < left) & c_ok, other=0.0)
    return normalise(stored, None, m, scale, shift, NORM, ACT).to(x.dtype.element_ty)


@triton.jit
def store_tile(
    y, acc, left, o, o_ok, count, mean, m2, O: tl.constexpr, BLOCK_P: tl.constexpr, MEASURE: tl.constexpr
):
    """Stores acc; count, mean and sum of squared deviations with its pixels among them."""
    p = tl.arange(0, BLOCK_P)[:, None]
    out, stored = rounded(acc, y.dtype.element_ty)
    tl.store(y + (p * O + o), out, mask=(p < left) & o_ok)
    if MEASURE:
        n = tl.minimum(left, BLOCK_P).to(tl.float32)
        count, mean, m2 = measure_tile(stored, p < left, n, count, mean, m2)
    return count, mean, m2


@triton.jit(do_not_specialize=["P"])
def pointwise_dgrad_kernel(
    g, y,  # (P, O)
    folded,  # (3, O)
    x,  # (P, C)
    matrix,  # (O, C)
    norm,  # (3, C)
    dx,  # (P, C)
    gy,  # (P, O): FACTOR * gy is written for wgrad where KEEP
    sums,  # (2, programs of a channel block, C): sum gp, sum gp * (x - mean)
    P,
    C: tl.constexpr, O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, GMEAN: tl.constexpr, GVAR: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK_C)
    tile, tiles = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    c, c_ok = block_channels(tl.program_id(0) % blocks, C, BLOCK_C)
    keep = KEEP & (tl.program_id(0) % blocks == 0)
    first, left = pixels(tile, P, BLOCK_P)
    p = tl.arange(0, BLOCK_P)[:, None]
    FACTOR: tl.constexpr = DITHER if (GMEAN or GVAR) and g.dtype.element_ty != tl.float32 else 1.0
    gz = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for block in range(tl.cdiv(O, BLOCK_O)):
        o, o_ok = block_channels(block, O, BLOCK_O)
        ok = (p < left) & o_ok
        part = incoming_tile(g + first * O, y + first * O, folded, p, o, ok, o_ok, None, O, GMEAN, GVAR, FACTOR)
        if keep:
            tl.store(gy + first * O + (p * O + o), part, mask=ok)
        w = tl.load(matrix + tl.trans(o) * C + c, mask=tl.trans(o_ok) & c_ok, other=0.0)
        gz = product(part, w, gz, PRECISION)
    ok = (p < left) & c_ok
    m, scale, shift = c, c, c
    if NORM:
        m, scale, shift = load_vectors(norm, c, c_ok, C)
    stored = tl.load(x + first * C + (p * C + c), mask=ok, other=0.0)
    pre = normalise(stored, None, m, scale, shift, NORM, NONE)
    gp = activation_backward(gz * (1.0 / FACTOR), pre, activation(pre, ACT), ACT)
    if NORM:
        gp = tl.where(p < left, gp, 0.0)
        tl.store(sums + tile * C + c, tl.sum(gp, 0)[None, :], mask=c_ok)
        tl.store(sums + (tiles + tile) * C + c, tl.sum(gp * (to_float(stored) - m), 0)[None, :], mask=c_ok)
        gp = gp * scale
    tl.store(dx + first * C + (p * C + c), gp.to(dx.dtype.element_ty), mask=ok)


@triton.jit
def incoming_tile(
    g, y, folded, p, o, ok, o_ok, rows_ok, O: tl.constexpr, GMEAN: tl.constexpr, GVAR: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    """FACTOR * gy of a tile's pixels and the channels o, in g's dtype for the tensor cores; 0 where rows_ok
    is not.
    """
    gm, gv, my = o, o, o
    if GMEAN or GVAR:
        gm, gv, my = load_vectors(folded, o, o_ok, O)
    mine = tl.load(g + (p * O + o), mask=ok, other=0.0)
    other = mine
    if GVAR:
        other = tl.load(y + (p * O + o), mask=ok, other=0.0)
    return incoming(mine, other, rows_ok, gm, gv, my, GMEAN, GVAR, FACTOR).to(g.dtype.element_ty)


@triton.jit(do_not_specialize=["P"])
def pointwise_wgrad_kernel(
    g, y,  # (P, O)
    folded,  # (3, O)
    x,  # (P, C)
    norm,  # (3, C)
    partial,  # (splits, O, C)
    P,
    C: tl.constexpr, O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, GMEAN: tl.constexpr, GVAR: tl.constexpr, PRECISION: tl.constexpr,
    KEPT: tl.constexpr,  # g is what dgrad left: gy, scaled
):  # fmt: skip
    """dw, a block a program, over a share of the pixels: split, for few blocks would leave the device idle.
    """
    c_blocks = tl.cdiv(C, BLOCK_C)
    blocks = c_blocks * tl.cdiv(O, BLOCK_O)
    split, splits = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    c, c_ok = block_channels(tl.program_id(0) % c_blocks, C, BLOCK_C)
    o, o_ok = block_channels(tl.program_id(0) % blocks // c_blocks, O, BLOCK_O)
    m, scale, shift = c, c, c
    if NORM:
        m, scale, shift = load_vectors(norm, c, c_ok, C)
    p = tl.arange(0, BLOCK_P)[:, None]
    FACTOR: tl.constexpr = DITHER if (GMEAN or GVAR) and g.dtype.element_ty != tl.float32 else 1.0
    dw = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for tile in range(split, tl.cdiv(P, BLOCK_P), splits):
        first, left = pixels(tile, P, BLOCK_P)
        part = incoming_tile(
            g + first * O, y + first * O, folded, p, o, (p < left) & o_ok, o_ok, p < left, O, GMEAN, GVAR, FACTOR
        )
        stored = tl.load(x + first * C + (p * C + c), mask=(p < left) & c_ok, other=0.0)
        z = normalise(stored, None, m, scale, shift, NORM, ACT)
        dw = product(tl.trans(part), z.to(x.dtype.element_ty), dw, PRECISION)
    out = partial + split.to(tl.int64) * (O * C) + tl.trans(o) * C + c
    if KEPT and g.dtype.element_ty != tl.float32:
        dw *= 1.0 / DITHER
    tl.store(out, dw * (1.0 / FACTOR), mask=tl.trans(o_ok) & c_ok)


@triton.jit(do_not_specialize=["P"])
def pointwise_backward_kernel(
    g, y,  # (P, O)
    folded,  # (3, O)
    x,  # (P, C)
    matrix,  # (O, C)
    norm,  # (3, C)
    dx,  # (P, C)
    sums,  # (2, programs, C)
    partial,  # (programs, O, C)
    P,
    C: tl.constexpr, O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, GMEAN: tl.constexpr, GVAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dgrad and wgrad of the same pixels, all channels in one block each: every tensor is read once."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    c, c_ok = block_channels(0, C, BLOCK_C)
    o, o_ok = block_channels(0, O, BLOCK_O)
    dtype: tl.constexpr = x.dtype.element_ty
    FACTOR: tl.constexpr = DITHER if (GMEAN or GVAR) and g.dtype.element_ty != tl.float32 else 1.0
    w = tl.load(matrix + tl.trans(o) * C + c, mask=tl.trans(o_ok) & c_ok, other=0.0)
    sum1 = tl.zeros([1, BLOCK_C], tl.float32)
    sum2 = tl.zeros([1, BLOCK_C], tl.float32)
    dw = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    p = tl.arange(0, BLOCK_P)[:, None]
    for tile in range(program, tl.cdiv(P, BLOCK_P), programs):
        first, left = pixels(tile, P, BLOCK_P)
        ok = (p < left) & c_ok
        part = incoming_tile(
            g + first * O, y + first * O, folded, p, o, (p < left) & o_ok, o_ok, p < left, O, GMEAN, GVAR, FACTOR
        )
        stored = tl.load(x + first * C + (p * C + c), mask=ok, other=0.0)
        m, scale, shift = c, c, c
        if NORM:
            m, scale, shift = load_vectors(norm, c, c_ok, C)
        pre = normalise(stored, None, m, scale, shift, NORM, NONE)
        z = activation(pre, ACT)
        gz = product(part, w, None, PRECISION)
        dw = product(tl.trans(part), z.to(dtype), dw, PRECISION)
        gp = activation_backward(gz * (1.0 / FACTOR), pre, z, ACT)  # 0 where p is not, as part is
        if NORM:
            sum1 += tl.sum(gp, 0)[None, :]
            sum2 += tl.sum(gp * (to_float(stored) - m), 0)[None, :]
            gp = gp * scale
        tl.store(dx + first * C + (p * C + c), gp.to(dtype), mask=ok)
    out = partial + program.to(tl.int64) * (O * C) + tl.trans(o) * C + c
    tl.store(out, dw * (1.0 / FACTOR), mask=tl.trans(o_ok) & c_ok)
    if NORM:
        tl.store(sums + program * C + c, sum1, mask=c_ok)
        tl.store(sums + (programs + program) * C + c, sum2, mask=c_ok)


# ---- host ----


class Tile(NamedTuple):
    """A block of the product: pixels x columns (outputs, or in dgrad channels), `depth` of the sum at a time.
    """

    pixels: int
    columns: int
    depth: int
    warps: int = 8
    stages: int = 3


WHOLE = 128  # up to so many channels a block holds all of them


def _power(size: int, most: int) -> int:
    """The block that holds size, within what a product takes."""
    return max(16, min(most, triton.next_power_of_2(size)))


def forward_tiles(channels: int, out: int, itemsize: int) -> list[Tile]:
    """Candidates, the first guess first.

    Few channels: bound by memory; all of them in one step, so that the loads of the next pixels are under way
    while these are multiplied. Many: 128 x 128 and a depth of 128 bytes a row, at most 145 registers of 8
    warps.
    """
    columns = _power(out, 128)
    if channels <= WHOLE:
        depth = _power(channels, WHOLE)
        pixels = 64 if depth * itemsize > 128 else 128
        return [Tile(pixels, columns, depth), Tile(64, columns, depth), Tile(64, columns, depth, 4), Tile(128, columns, depth)]
    depth = 128 // itemsize
    if itemsize == 4:
        return [Tile(128, columns, depth), Tile(64, columns, depth)]
    tiles = [Tile(128, columns, depth), Tile(128, columns, depth // 2, 8, 4), Tile(64, columns, depth, 4, 3)]
    return tiles + [Tile(128, 256, depth), Tile(64, 256, depth)] if out >= 256 else tiles


def dgrad_tiles(channels: int, out: int, itemsize: int) -> list[Tile]:
    """As forward_tiles; two operands are loaded for gy, and the stored x joins at the end."""
    columns, depth = _power(channels, 128), min(128 // itemsize, _power(out, 128))
    tiles = [Tile(128, columns, depth), Tile(128, columns, max(16, depth // 2)), Tile(64, columns, depth)]
    return tiles + [Tile(64, 256, depth)] if itemsize == 2 and channels >= 256 else tiles


def wgrad_tiles(channels: int, out: int, itemsize: int) -> list[Tile]:
    """pixels is the depth here, and columns x depth the block of dw."""
    rows, columns, pixels = _power(out, 128), _power(channels, 128), 128 // itemsize
    return [Tile(pixels, rows, columns), Tile(pixels // 2, rows, columns, 8, 4), Tile(pixels, rows, columns, 4, 3)]


def backward_tiles(channels: int, out: int, itemsize: int) -> list[Tile]:
    """columns holds the channels, depth the outputs; both gradients are in registers."""
    columns, depth = _power(channels, WHOLE), _power(out, WHOLE)
    small = 32 if columns * depth > 64 * 64 else 64
    return [Tile(small, columns, depth), Tile(64, columns, depth, 8, 2), Tile(64, columns, depth), Tile(small, columns, depth, 8, 2)]


class Both(NamedTuple):
    """Tiles of the two gradients, a kernel each."""

    dgrad: Tile
    wgrad: Tile


class Prepared(NamedTuple):
    """What pointwise_prepare_kernel writes."""

    matrix: Tensor
    norm: Tensor
    folded: Tensor


def _prepare(x, weight, given, eps, g_mean=None, g_var=None, mean_y=None, values=1) -> Prepared:
    out, channels = weight.shape[:2]
    mean, var, gamma, beta = given
    cast = weight.dtype != x.dtype
    weight = weight.contiguous()
    matrix = torch.empty((out, channels), dtype=x.dtype, device=x.device) if cast else weight.view(out, channels)
    affine = g_mean is not None or g_var is not None
    norm = x.new_empty((3, channels) if mean is not None else 0, dtype=torch.float32)
    folded = x.new_empty((3, out) if affine else 0, dtype=torch.float32)
    size = max(cast * out * channels, norm.numel() // 3, folded.numel() // 3)
    if size:
        launch(
            pointwise_prepare_kernel, (cdiv(size, BLOCK),), weight=weight, mean=mean, var=var, gamma=gamma, beta=beta,
            g_mean=g_mean, g_var=g_var, mean_y=mean_y, matrix=matrix, x=x, norm=norm, folded=folded, values=values,
            eps=eps, C=channels, O=out, NORM=mean is not None, GAMMA=gamma is not None, BETA=beta is not None,
            GMEAN=g_mean is not None, GVAR=g_var is not None, CAST=cast, BLOCK=BLOCK,
        )  # fmt: skip
    return Prepared(matrix, norm, folded)


def pointwise_conv2d(
    x: Tensor, weight: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, act: str, measure: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    args = x, weight, mean, var, gamma, beta, eps, act
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.pointwise_conv2d(*args, measure)
    if composed.better(x):
        return composed.forward(*args, (1, 1), (0, 0, 0, 0), (1, 1), measure)
    out, channels = weight.shape[:2]
    tiles = forward_tiles(channels, out, x.element_size())
    shape = x.dtype, *x.shape[1:], out
    return forward(
        *args, measure, tune.best("pointwise_conv2d", shape, x, tiles, lambda tile: forward(*args, measure, tile))
    )


def forward(x, weight, mean, var, gamma, beta, eps, act, measure, tile):
    n, channels, height, width = x.shape
    out, count = weight.shape[0], n * height * width
    given = vectors(mean, var, gamma, beta)
    matrix, norm, _ = _prepare(x, weight, given, eps)
    blocks, tiles = cdiv(out, tile.columns), cdiv(count, tile.pixels)
    persist = channels <= tile.depth
    groups = min(tiles, cdiv(PROGRAMS * multiprocessors(x.device), blocks)) if persist else tiles
    y = empty_nhwc(x, (n, out, height, width))
    stats = x.new_empty((3, groups, out) if measure else 0, dtype=torch.float32)
    launch(
        pointwise_conv2d_kernel, (groups * blocks,), warps=tile.warps, stages=tile.stages,
        x=nhwc(x), matrix=matrix, norm=norm, y=y, stats=stats, P=count, C=channels, O=out, BLOCK_P=tile.pixels,
        BLOCK_O=tile.columns, BLOCK_C=tile.depth, NORM=mean is not None, ACT=ACTS[act], MEASURE=measure,
        PRECISION=precision(x), PERSIST=persist,
    )  # fmt: skip
    return restored(y, x), *finish_statistics(stats, out, measure)


def pointwise_conv2d_backward(
    g: Tensor, g_mean: Tensor | None, g_var: Tensor | None, y: Tensor, mean_y: Tensor, x: Tensor, weight: Tensor,
    mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, act: str,
    need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    args = g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act
    if x.dtype == torch.float64 or x.numel() == 0 or not (need_input or need_weight):
        return reference.pointwise_conv2d_backward(*args, need_input, need_weight)
    if composed.better(x):
        return composed.backward(*args, (1, 1), (0, 0, 0, 0), (1, 1), need_input, need_weight)
    args = *args, need_input, need_weight
    out, channels = weight.shape[:2]
    itemsize, whole = x.element_size(), need_input and need_weight and max(channels, out) <= WHOLE
    tiles = dgrad_tiles(channels, out, itemsize), wgrad_tiles(channels, out, itemsize)
    candidates = [Both(*pair) for pair in zip(*tiles)]
    if whole:
        candidates = backward_tiles(channels, out, itemsize) + candidates[:1]
    shape = x.dtype, *x.shape[1:], out, need_input, need_weight
    return backward(
        *args, tune.best("pointwise_conv2d_backward", shape, x, candidates, lambda tile: backward(*args, tile))
    )


def backward(
    g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act, need_input, need_weight, tile
):
    """tile: Tile for both gradients in one kernel, or Both for one each."""
    n, channels, height, width = x.shape
    out, count = weight.shape[0], n * height * width
    mp = multiprocessors(x.device)
    given = vectors(mean, var, gamma, beta)
    matrix, norm, folded = _prepare(x, weight, given, eps, *vectors(g_mean, g_var), mean_y, count)
    g, x_in = nhwc(g), nhwc(x)
    y = g if g_var is None else nhwc(y)
    common = dict(
        folded=folded, x=x_in, norm=norm, P=count, C=channels, O=out, NORM=mean is not None, ACT=ACTS[act],
        PRECISION=precision(x),
    )  # fmt: skip
    affine = dict(GMEAN=g_mean is not None, GVAR=g_var is not None)
    dx = empty_nhwc(x, x.shape) if need_input else x.new_empty(0)
    dweight = torch.empty(weight.shape if need_weight else 0, dtype=weight.dtype, device=x.device)
    partial = sums = None
    if isinstance(tile, Tile):
        groups = min(cdiv(count, tile.pixels), mp)  # one a multiprocessor: each keeps a dw of its own
        sums = x.new_empty((2, groups, channels), dtype=torch.float32)
        partial = x.new_empty((groups, out, channels), dtype=torch.float32)
        launch(
            pointwise_backward_kernel, (groups,), warps=tile.warps, stages=tile.stages, g=g, y=y, matrix=matrix,
            dx=dx, sums=sums, partial=partial, BLOCK_P=tile.pixels, BLOCK_C=tile.columns, BLOCK_O=tile.depth,
            **common, **affine,
        )  # fmt: skip
    else:
        kept = need_input and need_weight and any(affine.values())
        dgrad, wgrad = tile
        if need_input:
            gy = torch.empty_like(g) if kept else g
            groups = cdiv(count, dgrad.pixels)
            sums = x.new_empty((2, groups, channels), dtype=torch.float32)
            launch(
                pointwise_dgrad_kernel, (groups * cdiv(channels, dgrad.columns),), warps=dgrad.warps,
                stages=dgrad.stages, g=g, y=y, matrix=matrix, dx=dx, gy=gy, sums=sums, BLOCK_P=dgrad.pixels,
                BLOCK_C=dgrad.columns, BLOCK_O=dgrad.depth, KEEP=kept, **common, **affine,
            )  # fmt: skip
            if kept:
                g, y, affine = gy, gy, dict(GMEAN=False, GVAR=False)
        if need_weight:
            blocks = cdiv(out, wgrad.columns) * cdiv(channels, wgrad.depth)
            splits = max(1, min(cdiv(count, 4 * wgrad.pixels), mp // blocks))  # one program a multiprocessor
            partial = x.new_empty((splits, out, channels), dtype=torch.float32)
            launch(
                pointwise_wgrad_kernel, (splits * blocks,), warps=wgrad.warps, stages=wgrad.stages, g=g, y=y,
                partial=partial, BLOCK_P=wgrad.pixels, BLOCK_O=wgrad.columns, BLOCK_C=wgrad.depth, KEPT=kept, **common,
                **affine,
            )  # fmt: skip
    sums = sums if mean is not None else None
    vector_grads = finish_matrix(partial, dweight, sums, given, eps, x, channels)
    return restored(dx, x) if need_input else dx, dweight, *vector_grads
