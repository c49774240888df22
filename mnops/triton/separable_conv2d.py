"""separable_conv2d: a depthwise convolution, the norm of what it gives and a 1x1 convolution in one kernel.

A program computes the depthwise result of BLOCK_P pixels, BLOCK_C channels at a time, and multiplies it on
tensor cores while it is in registers: it reaches neither memory nor L2. x is read and y written once, the
floor. Neighbouring pixels share the rows around them in L1, so a tile goes through bands of rows, column by
column: with 8 rows a band a pixel is fetched 10/8 times, not 3.

What it costs is arithmetic. x's pending norm is applied at each of the nine taps: some 45 instructions a
value of the depthwise result, where the two ops apart take 12 and two passes over that result. A
multiprocessor issues 128 a cycle and moves about 20 bytes of memory: the two passes take as long as some 25
instructions. So the kernel serves up to MOST_OUTPUTS outputs, which one program holds; beyond, the depthwise
part would be computed again for every block of outputs, and the ops run apart.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnops import reference
from mnops.triton import composed, tiles, tune
from mnops.triton.common import (
    ACTS,
    activation,
    block_channels,
    channel_norm,
    load_vectors,
    normalise,
    product,
    store_vectors,
)
from mnops.triton.depthwise_conv2d import depthwise_conv2d
from mnops.triton.finish import BLOCK
from mnops.triton.launch import cdiv, empty_nhwc, launch, nhwc, norm_arguments, out_size, precision, restored
from mnops.triton.pointwise_conv2d import pointwise_conv2d

WIDEST = 7  # kernel: a row of it is unrolled
MOST_OUTPUTS = 256  # 64 accumulators a thread of 8 warps beside 64 pixels
MOST_BAND = 8  # rows: 10 input rows for 8, and 8 columns in a tile of 64 pixels


@triton.jit
def separable_prepare_kernel(
    dw_weight,  # (C, TAPS)
    pw_weight,  # (O, C)
    mean, var, gamma, beta,  # (C,) of x's pending norm
    mid_mean, mid_var, mid_gamma, mid_beta,  # (C,) of the depthwise result's
    taps,  # (TAPS, C), fp32: neighbouring channels are loaded together
    matrix,  # (O, C): pw_weight in x's dtype where CAST
    x,  # only for its dtype
    norm, mid,  # (3, C): mean, scale, shift
    eps, mid_eps, C, O, TAPS: tl.constexpr, CAST: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr,
    BETA: tl.constexpr, MID_NORM: tl.constexpr, MID_GAMMA: tl.constexpr, MID_BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the convolution would work out anew for every tile."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(taps + i, tl.load(dw_weight + i % C * TAPS + i // C, mask=i < TAPS * C), mask=i < TAPS * C)
    if CAST:
        tl.store(matrix + i, tl.load(pw_weight + i, mask=i < O * C), mask=i < O * C)
    if NORM:
        dtype: tl.constexpr = x.dtype.element_ty
        m, scale, shift = channel_norm(mean, var, gamma, beta, eps, i, i < C, NORM, GAMMA, BETA, dtype)
        store_vectors(norm, i, i < C, C, m, scale, shift)
    if MID_NORM:  # of a tensor that is in fp32
        m, scale, shift = channel_norm(
            mid_mean, mid_var, mid_gamma, mid_beta, mid_eps, i, i < C, MID_NORM, MID_GAMMA, MID_BETA,
            tl.float32,
        )  # fmt: skip
        store_vectors(mid, i, i < C, C, m, scale, shift)


@triton.jit(do_not_specialize=["P", "H", "W", "OH", "OW", "pad_top", "pad_left"])
def separable_conv2d_kernel(
    x,  # (N, H, W, C)
    taps,  # (K * K, C)
    matrix,  # (O, C)
    norm, mid,  # (3, C)
    y,  # (P, O), P = N * OH * OW
    P, H, W, OH, OW, pad_top, pad_left,
    C: tl.constexpr, O: tl.constexpr, K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BAND: tl.constexpr,  # rows of a band; it divides OH
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, MID: tl.constexpr, MID_ACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o, o_ok = block_channels(0, O, BLOCK_O)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    n, place = p // (OH * OW), p % (OH * OW)
    band, place = place // (BAND * OW), place % (BAND * OW)
    row, column = band * BAND + place % BAND, place // BAND
    h, w = row * STRIDE_H - pad_top, column * STRIDE_W - pad_left
    corner = x + ((n.to(tl.int64) * H + h) * W + w) * C
    acc = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    for block in range(tl.cdiv(C, BLOCK_C)):
        c, c_ok = block_channels(block, C, BLOCK_C)
        m, scale, shift = load_vectors(norm, c, c_ok, C, NORM)
        z = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for i in tl.range(K, loop_unroll_factor=1, num_stages=1):  # unrolled, its loads take all registers
            row_ok = (p < P) & (h + i * DIL_H >= 0) & (h + i * DIL_H < H)
            for j in tl.static_range(K):
                ok = row_ok & (w + j * DIL_W >= 0) & (w + j * DIL_W < W)
                stored = tl.load(corner + ((i * DIL_H * W + j * DIL_W) * C + c), mask=ok & c_ok, other=0.0)
                tap = tl.load(taps + ((i * K + j) * C + c), mask=c_ok, other=0.0)
                z += normalise(stored, ok, m, scale, shift, NORM, ACT) * tap
        if MID:
            mean, scale, shift = load_vectors(mid, c, c_ok, C, MID)
            z = (z - mean) * scale + shift
        z = activation(z, MID_ACT).to(x.dtype.element_ty)
        part = tl.load(matrix + tl.trans(o) * C + c, mask=tl.trans(o_ok) & c_ok, other=0.0)
        acc = product(z, tl.trans(part), acc, PRECISION)
    at = ((n.to(tl.int64) * OH + row) * OW + column) * O
    tl.store(y + (at + o), acc.to(y.dtype.element_ty), mask=(p < P) & o_ok)


# ---- host ----


def _band(rows: int) -> int:
    return next(band for band in range(MOST_BAND, 0, -1) if rows % band == 0)


def separable_conv2d(
    x: Tensor, depthwise_weight: Tensor, weight: Tensor, mean: Tensor | None, var: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, eps: float, act: str, mid_mean: Tensor | None,
    mid_var: Tensor | None, mid_gamma: Tensor | None, mid_beta: Tensor | None, mid_eps: float, mid_act: str,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    pending, geometry = (mean, var, gamma, beta, eps, act), (stride, padding, dilation)
    mid = mid_mean, mid_var, mid_gamma, mid_beta, mid_eps, mid_act
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.separable_conv2d(x, depthwise_weight, weight, *pending, *mid, *geometry)
    out, channels, kernel = *weight.shape[:2], depthwise_weight.shape[2]
    size = out_size(*x.shape[2:], kernel, stride, padding, dilation)
    few = x.shape[0] * size[0] * size[1] < 2**31
    if not few or out > MOST_OUTPUTS or kernel > WIDEST or composed.better(x):
        y, _, _ = depthwise_conv2d(x, depthwise_weight, *pending, *geometry, False)
        y, _, _ = pointwise_conv2d(y, weight, *mid, False)
        return y

    def run(tile: tiles.Pixels) -> Tensor:
        return forward(x, depthwise_weight, weight, pending, mid, *geometry, size, tile)

    shape = x.dtype, *x.shape[1:], out, kernel, *stride, *dilation
    return run(tune.best("separable_conv2d", shape, x, tiles.separable(channels, out, x.element_size()), run))


def forward(x, depthwise_weight, weight, pending, mid, stride, padding, dilation, size, tile):
    n, channels, height, width = x.shape
    out, kernel, cast = weight.shape[0], depthwise_weight.shape[2], weight.dtype != x.dtype
    *norm, eps, act = pending
    *mid_norm, mid_eps, mid_act = mid
    given = norm_arguments(*norm)
    mid_given = {("MID_" if k.isupper() else "mid_") + k: v for k, v in norm_arguments(*mid_norm).items()}
    weight = weight.contiguous()
    taps = torch.empty((kernel * kernel, channels), dtype=torch.float32, device=x.device)
    norm, mid_norm = (taps.new_empty((3, channels) if v[0] is not None else 0) for v in (norm, mid_norm))
    matrix = torch.empty((out, channels), dtype=x.dtype, device=x.device) if cast else weight.view(
        out, channels
    )
    launch(
        separable_prepare_kernel, (cdiv(max(taps.numel(), cast * matrix.numel()), BLOCK),),
        dw_weight=depthwise_weight.contiguous(), pw_weight=weight, taps=taps, matrix=matrix, x=x, norm=norm,
        mid=mid_norm, eps=eps, mid_eps=mid_eps, C=channels, O=out, TAPS=kernel * kernel, CAST=cast,
        BLOCK=BLOCK, **given, **mid_given,
    )  # fmt: skip
    y, count = empty_nhwc(x, (n, out, *size)), n * size[0] * size[1]
    launch(
        separable_conv2d_kernel, (cdiv(count, tile.pixels),), warps=tile.warps, stages=tile.stages, x=nhwc(x),
        taps=taps, matrix=matrix, norm=norm, mid=mid_norm, y=y, P=count, H=height, W=width, OH=size[0],
        OW=size[1], pad_top=padding[0], pad_left=padding[2], C=channels, O=out, K=kernel, STRIDE_H=stride[0],
        STRIDE_W=stride[1], DIL_H=dilation[0], DIL_W=dilation[1], BAND=_band(size[0]), BLOCK_P=tile.pixels,
        BLOCK_O=max(16, triton.next_power_of_2(out)), BLOCK_C=tile.depth, NORM=given["NORM"], ACT=ACTS[act],
        MID=mid_given["MID_NORM"], MID_ACT=ACTS[mid_act], PRECISION=precision(x),
    )  # fmt: skip
    return restored(y, x)
