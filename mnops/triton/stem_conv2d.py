"""stem_conv2d: a network's first, dense convolution, as a matrix product over the taps gathered from the
image.

With T = K * K * C taps (27 for 3x3 on an RGB image) an output pixel is a product of T numbers with a (T, O)
matrix, on tensor cores; the taps are gathered element by element, neighbours in a row from the same cache
lines, and every image line is fetched from memory once. Forward moves x and y, the weight gradient x, g and
y: the floor. The products pad T to 32, which costs nothing here: 64 outputs a pixel are bound by memory.

For few channels in: T is at most MOST_TAPS. It loses where they are many, as in a dense 3x3 in the middle of
a network: that goes to cuDNN by way of `composed.py`, as does the gradient of the input, which no image
needs.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnops import reference
from mnops.triton import composed
from mnops.triton.common import (
    ACTS,
    channel_incoming,
    channel_norm,
    incoming_tile,
    normalise,
    pixels,
    product,
    share,
    statistics,
    store_measured,
    store_statistics,
    unmeasured,
)
from mnops.triton.finish import finish_matrix, finish_statistics
from mnops.triton.launch import (
    cdiv,
    dither,
    empty_nhwc,
    incoming_arguments,
    launch,
    multiprocessors,
    nhwc,
    norm_arguments,
    out_size,
    precision,
    restored,
)

MOST_TAPS = 256  # K * K * C of one block; 7x7 on RGB has 147
BLOCK_P = 128  # pixels: with 32 taps and 32 outputs 16 to 32 values a thread
# Persistent ones, a multiprocessor: they keep the weights, or their gradient, in registers. A multiple of those that
# are resident (9.0): 2, 3 or 4 forward, by dtype and Triton; 6 of the gradient.
PROGRAMS = {"forward": 12, "gradient": 6}


@triton.jit
def tap_positions(C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr):
    """Row, column, channel of the taps, [1, TAPS], channels innermost as in memory; their place in (C, K, K);
    there?
    """
    t = tl.arange(0, TAPS)[None, :]
    row, column, c = t // (K * C), t // C % K, t % C
    return row, column, c, (c * K + row) * K + column, t < K * K * C


@triton.jit
def gather(
    x, tile, P, H, W, OH, OW, pad_top, pad_left, row, column, c, t_ok, m, scale, shift,
    C: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, BLOCK_P: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """z at the taps of a tile's output pixels, [BLOCK_P, TAPS], in x's dtype for the tensor cores."""
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    n, h, w = p // (OH * OW), p // OW % OH, p % OW
    h, w = h * STRIDE_H - pad_top + row, w * STRIDE_W - pad_left + column
    ok = (p < P) & t_ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    stored = tl.load(x + ((n.to(tl.int64) * H + h) * W + w) * C + c, mask=ok, other=0.0)
    return normalise(stored, ok, m, scale, shift, NORM, ACT).to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["P", "H", "W", "OH", "OW", "pad_top", "pad_left"])
def stem_conv2d_kernel(
    x,  # (N, H, W, C)
    weight,  # (O, C, K, K)
    mean, var, gamma, beta,  # (C,) of the pending norm
    y,  # (P, O), P = N * OH * OW
    stats,  # (3, programs of an output block, O)
    P, H, W, OH, OW, pad_top, pad_left, eps,
    C: tl.constexpr, O: tl.constexpr, K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, TAPS: tl.constexpr,
    NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, ACT: tl.constexpr, MEASURE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    group, groups, o, o_ok = share(O, BLOCK_O)
    row, column, c, place, t_ok = tap_positions(C, K, TAPS)
    m, scale, shift = channel_norm(
        mean, var, gamma, beta, eps, c, t_ok, NORM, GAMMA, BETA, x.dtype.element_ty
    )
    w = tl.load(weight + o * (C * K * K) + tl.trans(place), mask=o_ok & tl.trans(t_ok), other=0.0)
    w = w.to(x.dtype.element_ty)
    measured = unmeasured(BLOCK_P, BLOCK_O)
    for tile in range(group, tl.cdiv(P, BLOCK_P), groups):
        first, left = pixels(tile, P, BLOCK_P)
        z = gather(
            x, tile, P, H, W, OH, OW, pad_top, pad_left, row, column, c, t_ok, m, scale, shift, C, STRIDE_H,
            STRIDE_W, BLOCK_P, NORM, ACT,
        )  # fmt: skip
        acc = product(z, w, None, PRECISION)
        measured = store_measured(y + first * O, acc, left, o, o_ok, measured, O, BLOCK_P, MEASURE)
    if MEASURE:
        store_statistics(stats, group, groups, o, o_ok, O, *statistics(measured))


@triton.jit(do_not_specialize=["P", "H", "W", "OH", "OW", "pad_top", "pad_left"])
def stem_wgrad_kernel(
    g, y,  # (P, O)
    g_mean, g_var, mean_y,  # (O,)
    x,  # (N, H, W, C)
    mean, var, gamma, beta,  # (C,)
    partial,  # (programs of an output block, O, C, K, K)
    P, H, W, OH, OW, pad_top, pad_left, eps,
    C: tl.constexpr, O: tl.constexpr, K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, TAPS: tl.constexpr,
    NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, ACT: tl.constexpr, GMEAN: tl.constexpr,
    GVAR: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group, groups, o, o_ok = share(O, BLOCK_O)
    row, column, c, place, t_ok = tap_positions(C, K, TAPS)
    dtype: tl.constexpr = x.dtype.element_ty
    m, scale, shift = channel_norm(mean, var, gamma, beta, eps, c, t_ok, NORM, GAMMA, BETA, dtype)
    gm, gv, my = channel_incoming(g_mean, g_var, mean_y, P, o, o_ok, GMEAN, GVAR, FACTOR, dtype)
    dw = tl.zeros([BLOCK_O, TAPS], tl.float32)
    for tile in range(group, tl.cdiv(P, BLOCK_P), groups):
        first, left = pixels(tile, P, BLOCK_P)
        part = incoming_tile(
            g + first * O, y + first * O, gm, gv, my, left, o, o_ok, O, BLOCK_P, True, GMEAN, GVAR, FACTOR
        )
        z = gather(
            x, tile, P, H, W, OH, OW, pad_top, pad_left, row, column, c, t_ok, m, scale, shift, C, STRIDE_H,
            STRIDE_W, BLOCK_P, NORM, ACT,
        )  # fmt: skip
        dw = product(tl.trans(part), z, dw, PRECISION)
    out = partial + (group.to(tl.int64) * O + tl.trans(o)) * (C * K * K) + place
    tl.store(out, dw * (1.0 / FACTOR), mask=tl.trans(o_ok) & t_ok)


# ---- host ----


def _serves(x: Tensor, weight: Tensor, count: int) -> bool:
    taps = weight.shape[1] * weight.shape[2] ** 2
    return taps <= MOST_TAPS and count < 2**31 and not composed.better(x)


def _block_o(out: int) -> int:
    return max(16, min(128, triton.next_power_of_2(out)))


def stem_conv2d(
    x: Tensor, weight: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, act: str, stride: Sequence[int], padding: Sequence[int], measure: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    args = x, weight, mean, var, gamma, beta, eps, act, stride, padding
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.stem_conv2d(*args, measure)
    n, channels, height, width = x.shape
    out, kernel = weight.shape[0], weight.shape[2]
    out_h, out_w = out_size(height, width, kernel, stride, padding, (1, 1))
    count = n * out_h * out_w
    if not _serves(x, weight, count):
        return composed.forward(*args, (1, 1), measure)
    blocks = cdiv(out, _block_o(out))
    groups = min(cdiv(count, BLOCK_P), cdiv(PROGRAMS["forward"] * multiprocessors(x.device), blocks))
    y = empty_nhwc(x, (n, out, out_h, out_w))
    stats = x.new_empty((3, groups, out) if measure else 0, dtype=torch.float32)
    launch(
        stem_conv2d_kernel, (groups * blocks,), x=nhwc(x), weight=weight.contiguous(), y=y, stats=stats,
        P=count, H=height, W=width, OH=out_h, OW=out_w, pad_top=padding[0], pad_left=padding[2], eps=eps,
        C=channels, O=out, K=kernel, STRIDE_H=stride[0], STRIDE_W=stride[1], BLOCK_P=BLOCK_P,
        BLOCK_O=_block_o(out), TAPS=_taps(weight), ACT=ACTS[act], MEASURE=measure, PRECISION=precision(x),
        **norm_arguments(mean, var, gamma, beta),
    )  # fmt: skip
    return restored(y, x), *finish_statistics(stats, out, measure)


def _taps(weight: Tensor) -> int:
    return max(16, triton.next_power_of_2(weight.shape[1] * weight.shape[2] ** 2))


def stem_conv2d_backward(
    g: Tensor, g_mean: Tensor | None, g_var: Tensor | None, y: Tensor, mean_y: Tensor, x: Tensor,
    weight: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, act: str, stride: Sequence[int], padding: Sequence[int], need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    args = g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act, stride, padding
    if x.dtype == torch.float64 or x.numel() == 0 or not (need_input or need_weight):
        return reference.stem_conv2d_backward(*args, need_input, need_weight)
    n, out, out_h, out_w = g.shape
    _, channels, height, width = x.shape
    count = n * out_h * out_w
    if not _serves(x, weight, count):
        return composed.backward(*args, (1, 1), need_input, need_weight)
    dx, _, *vector_grads = composed.backward(*args, (1, 1), need_input, False)
    dweight = torch.empty(weight.shape if need_weight else 0, dtype=weight.dtype, device=x.device)
    if need_weight:
        norm = norm_arguments(mean, var, gamma, beta)
        blocks = cdiv(out, _block_o(out))
        groups = min(cdiv(count, BLOCK_P), cdiv(PROGRAMS["gradient"] * multiprocessors(x.device), blocks))
        partial = x.new_empty((groups, weight.numel()), dtype=torch.float32)
        launch(
            stem_wgrad_kernel, (groups * blocks,), x=nhwc(x), partial=partial, P=count, H=height, W=width,
            OH=out_h, OW=out_w, pad_top=padding[0], pad_left=padding[2], eps=eps, C=channels, O=out,
            K=weight.shape[2], STRIDE_H=stride[0], STRIDE_W=stride[1], BLOCK_P=BLOCK_P, BLOCK_O=_block_o(out),
            TAPS=_taps(weight), ACT=ACTS[act], FACTOR=dither(g, g_mean, g_var), PRECISION=precision(x),
            **norm, **incoming_arguments(g, g_mean, g_var, y, mean_y),
        )  # fmt: skip
        finish_matrix(partial, dweight, None, norm, eps, x, channels)
    return dx, dweight, *vector_grads
