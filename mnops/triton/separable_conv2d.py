"""separable_conv2d: a depthwise and a 1x1 convolution in one kernel, for inference.

A program computes the depthwise result of BLOCK_P pixels, BLOCK_C channels at a time, and multiplies it on tensor cores
while it is in registers: it reaches neither memory nor L2. x is read and y written once, the floor. Neighbouring pixels
share the rows around them in L1, so a tile goes through bands of rows, column by column: with 8 rows a band a pixel is
fetched 10/8 times, not 3.

A program computes up to 256 outputs of its pixels, what registers hold; beyond, the depthwise part is done O / 256
times over, eighteen operations against 512. It loses where there are few pixels and many channels, as at batch 1:
there are few programs then, and each reads the whole matrix.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnops import reference
from mnops.triton import composed, tune
from mnops.triton.common import ACTS, activation, block_channels, product, to_float
from mnops.triton.depthwise_conv2d import depthwise_conv2d
from mnops.triton.finish import BLOCK
from mnops.triton.launch import cdiv, empty_nhwc, launch, nhwc, precision, restored, vectors
from mnops.triton.norm_act import norm_act
from mnops.triton.pointwise_conv2d import pointwise_conv2d

WIDEST = 7  # kernel: its loads are unrolled
MOST_BAND = 8  # rows: 10 input rows for 8, and 16 columns in a tile of 128 pixels


@triton.jit
def separable_prepare_kernel(
    dw_weight,  # (C, TAPS)
    pw_weight,  # (O, C)
    taps,  # (TAPS, C), fp32: neighbouring channels are loaded together
    matrix,  # (O, C): pw_weight in x's dtype where CAST
    C, O, TAPS: tl.constexpr, CAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(taps + i, tl.load(dw_weight + i % C * TAPS + i // C, mask=i < TAPS * C), mask=i < TAPS * C)
    if CAST:
        tl.store(matrix + i, tl.load(pw_weight + i, mask=i < O * C), mask=i < O * C)


@triton.jit(do_not_specialize=["P", "H", "W", "OH", "OW", "pad_top", "pad_left"])
def separable_conv2d_kernel(
    x,  # (N, H, W, C)
    taps,  # (KH * KW, C)
    dw_bias,  # (C,)
    matrix,  # (O, C)
    pw_bias,  # (O,)
    y,  # (P, O), P = N * OH * OW
    P, H, W, OH, OW, pad_top, pad_left,
    C: tl.constexpr, O: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BAND: tl.constexpr,  # rows of a band; it divides OH
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    DW_BIAS: tl.constexpr, DW_ACT: tl.constexpr, PW_BIAS: tl.constexpr, PW_ACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(O, BLOCK_O)  # innermost: programs that read the same pixels run side by side
    o, o_ok = block_channels(tl.program_id(0) % blocks, O, BLOCK_O)
    p = tl.program_id(0) // blocks * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    n, place = p // (OH * OW), p % (OH * OW)
    band, place = place // (BAND * OW), place % (BAND * OW)
    row, column = band * BAND + place % BAND, place // BAND
    h, w = row * STRIDE_H - pad_top, column * STRIDE_W - pad_left
    corner = x + ((n.to(tl.int64) * H + h) * W + w) * C
    acc = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    for block in range(tl.cdiv(C, BLOCK_C)):
        c, c_ok = block_channels(block, C, BLOCK_C)
        z = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        if DW_BIAS:
            z += tl.load(dw_bias + c, mask=c_ok, other=0.0)
        for i in tl.range(KH, loop_unroll_factor=1, num_stages=1):  # unrolled, its loads take all registers
            row_ok = (p < P) & (h + i * DIL_H >= 0) & (h + i * DIL_H < H)
            for j in tl.static_range(KW):
                ok = row_ok & (w + j * DIL_W >= 0) & (w + j * DIL_W < W) & c_ok
                pixel = tl.load(corner + ((i * DIL_H * W + j * DIL_W) * C + c), mask=ok, other=0.0)
                z += to_float(pixel) * tl.load(taps + ((i * KW + j) * C + c), mask=c_ok, other=0.0)
        z = activation(z, DW_ACT).to(x.dtype.element_ty)
        part = tl.load(matrix + tl.trans(o) * C + c, mask=tl.trans(o_ok) & c_ok, other=0.0)
        acc = product(z, tl.trans(part), acc, PRECISION)
    if PW_BIAS:
        acc += tl.load(pw_bias + o, mask=o_ok, other=0.0)
    out = activation(acc, PW_ACT).to(y.dtype.element_ty)
    at = ((n.to(tl.int64) * OH + row) * OW + column) * O
    tl.store(y + (at + o), out, mask=(p < P) & o_ok)


# ---- host ----


class Tile(NamedTuple):
    """Pixels x outputs of a program, `depth` channels at a time."""

    pixels: int
    outputs: int
    depth: int
    warps: int = 4
    stages: int = 1


def tiles(channels: int, out: int, itemsize: int) -> list[Tile]:
    """Candidates, the first guess first.

    64 accumulators a thread at most and 16 channels at a time take 128 registers (sm_90, bf16), so that 16 warps are
    resident, and the loads of some hide behind the products of others; with 64 outputs 32 channels do, in 70. One
    stage: copies of the taps in shared memory would crowd out the L1 that serves them.
    """
    outputs = max(16, min(256, triton.next_power_of_2(out)))
    depth = 32 if outputs <= 64 and channels > 16 else 16
    warps = 4 if outputs <= 128 else 8
    wide = [Tile(64, outputs, 32, warps), Tile(128, outputs, 32, 2 * warps if outputs > 64 else warps)]
    return list(dict.fromkeys([Tile(64, outputs, depth, warps), *(wide if channels > 16 and itemsize == 2 else [])]))


def _band(rows: int) -> int:
    return next(band for band in range(MOST_BAND, 0, -1) if rows % band == 0)


def separable_conv2d(
    x: Tensor, dw_weight: Tensor, dw_bias: Tensor | None, dw_act: str, pw_weight: Tensor, pw_bias: Tensor | None,
    pw_act: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    args = x, dw_weight, dw_bias, dw_act, pw_weight, pw_bias, pw_act, stride, padding, dilation
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.separable_conv2d(*args)
    kernel = dw_weight.shape[2:]
    out_h, out_w = (
        (size + before + after - d * (k - 1) - 1) // step + 1
        for size, before, after, d, k, step in zip(x.shape[2:], padding[::2], padding[1::2], dilation, kernel, stride)
    )
    if max(kernel) > WIDEST or x.shape[0] * out_h * out_w >= 2**31 or composed.better(x):
        return _two(*args)

    def run(tile: Tile) -> Tensor:
        return forward(*args, out_h, out_w, tile)

    candidates = tiles(x.shape[1], pw_weight.shape[0], x.element_size())
    shape = x.dtype, *x.shape[1:], pw_weight.shape[0], *kernel, *stride, *dilation
    return run(tune.best("separable_conv2d", shape, x, candidates, run))


def _two(x, dw_weight, dw_bias, dw_act, pw_weight, pw_bias, pw_act, stride, padding, dilation) -> Tensor:
    """By the ops apart: y + bias is a norm of mean -bias and variance 1."""

    def pending(bias: Tensor | None, act: str) -> tuple:
        if bias is None:
            return None, None, None, None, 0.0, act
        return -bias, torch.ones_like(bias), None, None, 0.0, act

    nothing = None, None, None, None, 0.0, "none"
    y, _, _ = depthwise_conv2d(x, dw_weight, *nothing, stride, padding, dilation, False)
    y, _, _ = pointwise_conv2d(y, pw_weight, *pending(dw_bias, dw_act), False)
    return y if pw_bias is None and pw_act == "none" else norm_act(y, *pending(pw_bias, pw_act))


def forward(
    x, dw_weight, dw_bias, dw_act, pw_weight, pw_bias, pw_act, stride, padding, dilation, out_h, out_w, tile
):
    n, channels, height, width = x.shape
    out, (kernel_h, kernel_w) = pw_weight.shape[0], dw_weight.shape[2:]
    dw_bias, pw_bias = vectors(dw_bias, pw_bias)
    cast = pw_weight.dtype != x.dtype
    pw_weight = pw_weight.contiguous()
    taps = torch.empty((kernel_h * kernel_w, channels), dtype=torch.float32, device=x.device)
    matrix = torch.empty((out, channels), dtype=x.dtype, device=x.device) if cast else pw_weight.view(out, channels)
    launch(
        separable_prepare_kernel, (cdiv(max(taps.numel(), cast * matrix.numel()), BLOCK),),
        dw_weight=dw_weight.contiguous(), pw_weight=pw_weight, taps=taps, matrix=matrix, C=channels, O=out,
        TAPS=kernel_h * kernel_w, CAST=cast, BLOCK=BLOCK,
    )  # fmt: skip
    y, count = empty_nhwc(x, (n, out, out_h, out_w)), n * out_h * out_w
    launch(
        separable_conv2d_kernel, (cdiv(count, tile.pixels) * cdiv(out, tile.outputs),), warps=tile.warps,
        stages=tile.stages, x=nhwc(x), taps=taps, dw_bias=dw_bias, matrix=matrix, pw_bias=pw_bias, y=y, P=count,
        H=height, W=width, OH=out_h, OW=out_w, pad_top=padding[0], pad_left=padding[2], C=channels, O=out,
        KH=kernel_h, KW=kernel_w, STRIDE_H=stride[0], STRIDE_W=stride[1], DIL_H=dilation[0], DIL_W=dilation[1],
        BAND=_band(out_h), BLOCK_P=tile.pixels, BLOCK_O=tile.outputs, BLOCK_C=tile.depth,
        DW_BIAS=dw_bias is not None, DW_ACT=ACTS[dw_act], PW_BIAS=pw_bias is not None, PW_ACT=ACTS[pw_act],
        PRECISION=precision(x),
    )  # fmt: skip
    return restored(y, x)
