"""The backward of depthwise_conv2d in one kernel: reads g, y and x, writes dx, the floor.

Around a cell of stride x stride input pixels the same K x K vectors of gy feed both gradients: gz += tap *
gy, dtap += z * gy. dtap and the channel sums stay in registers while cells slide down.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnops import reference
from mnops.triton import tiles, tune
from mnops.triton.common import (
    ACTS,
    NONE,
    activation,
    channel_incoming,
    channel_norm,
    normalise_backward,
    share,
)
from mnops.triton.depthwise_conv2d import serves
from mnops.triton.finish import finish_sums
from mnops.triton.lanes import (
    always_inside,
    cells,
    cut,
    in_row,
    incoming_row,
    lane_position,
    load_incoming,
    load_rows,
    normalise_rows,
)
from mnops.triton.launch import (
    cdiv,
    empty_nhwc,
    incoming_arguments,
    launch,
    multiprocessors,
    nhwc,
    norm_arguments,
    restored,
)


@triton.jit(
    do_not_specialize=[
        "lanes", "bands", "strips", "first_row", "first_column", "H", "W", "OH", "OW", "pad_top", "pad_left",
        "BAND", "values",
    ]
)  # fmt: skip
def depthwise_conv2d_backward_kernel(
    g, y,  # (N, OH, OW, C); y is read where GVAR
    g_mean, g_var, mean_y,  # (C,)
    x,  # (N, H, W, C)
    weight,  # (C, K, K)
    mean, var, gamma, beta,  # (C,) of the pending norm
    dx,  # (N, H, W, C)
    sums,  # (K * K + 2, programs of a channel block, C): dweight by tap, sum gp, sum gp * (x - mean)
    lanes, bands, strips,
    first_row, first_column,  # of the cells
    H, W, OH, OW, pad_top, pad_left, dil_h, dil_w,
    BAND,  # rows of cells of a lane
    values,  # N * OH * OW
    eps,
    C: tl.constexpr, K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    STRIP: tl.constexpr,  # columns of cells of a lane
    LANES: tl.constexpr, BLOCK_C: tl.constexpr,
    IN_FROM: tl.constexpr, IN_TO: tl.constexpr,
    OUT_FROM: tl.constexpr, OUT_TO: tl.constexpr,
    NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, ACT: tl.constexpr,
    GMEAN: tl.constexpr, GVAR: tl.constexpr, NEED_INPUT: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    OPEN_H: tl.constexpr = (K + STRIDE_H - 1) // STRIDE_H
    OPEN_W: tl.constexpr = (K + STRIDE_W - 1) // STRIDE_W
    WINDOW: tl.constexpr = STRIP + OPEN_W - 1
    COLUMNS: tl.constexpr = STRIP * STRIDE_W
    group, groups, c, c_ok = share(C, BLOCK_C)
    taps = ()
    dtaps = ()
    for q in tl.static_range(K * K):
        if NEED_INPUT:
            taps = taps + (tl.load(weight + c * (K * K) + q, mask=c_ok, other=0.0).to(tl.float32),)
        if NEED_WEIGHT:
            dtaps = dtaps + (tl.zeros([LANES, BLOCK_C], tl.float32),)
    m, scale, shift = channel_norm(
        mean, var, gamma, beta, eps, c, c_ok, NORM, GAMMA, BETA, x.dtype.element_ty
    )
    gm, gv, my = channel_incoming(
        g_mean, g_var, mean_y, values, c, c_ok, GMEAN, GVAR, 1.0, x.dtype.element_ty
    )

    sum1 = tl.zeros([LANES, BLOCK_C], tl.float32)
    sum2 = tl.zeros([LANES, BLOCK_C], tl.float32)
    for tile in range(group, tl.cdiv(lanes, LANES), groups):
        lane = tile * LANES + tl.arange(0, LANES)[:, None]
        lane_ok = lane < lanes
        n, phase_h, band, phase_w, strip = lane_position(lane, bands, strips, dil_h, dil_w)
        row, column = first_row + band * BAND, first_column + strip * STRIP
        out_h = phase_h + dil_h * row
        out_w = phase_w + dil_w * (column - (OPEN_W - 1))
        in_h = phase_h * STRIDE_H - pad_top + dil_h * STRIDE_H * row
        in_w = phase_w * STRIDE_W - pad_left + dil_w * STRIDE_W * column
        stop_out = tl.minimum(OH, out_h + dil_h * BAND)
        stop_in = tl.minimum(H, in_h + dil_h * STRIDE_H * BAND)
        out_lane = n.to(tl.int64) * OH * OW * C + out_w * C + c
        in_lane = n.to(tl.int64) * H * W * C + in_w * C + c

        window = ()  # gy of the OPEN_H rows of outputs that a row of cells meets
        for i in tl.static_range(OPEN_H - 1):
            h = out_h + dil_h * (i - (OPEN_H - 1))
            raw = load_incoming(
                g + out_lane, y + out_lane, h, OH, lane_ok, c_ok, out_w, OW, dil_w, C, WINDOW, OUT_FROM,
                OUT_TO, GVAR,
            )  # fmt: skip
            window = window + incoming_row(
                raw, h, lane_ok, gm, gv, my, out_w, OH, OW, dil_w, WINDOW, OUT_FROM, OUT_TO, GMEAN, GVAR
            )
        raw = load_incoming(
            g + out_lane, y + out_lane, out_h, OH, lane_ok, c_ok, out_w, OW, dil_w, C, WINDOW, OUT_FROM,
            OUT_TO, GVAR,
        )  # fmt: skip
        raw_x = load_rows(
            x + in_lane, in_h, H, lane_ok, c_ok, in_w, W, dil_h, dil_w, C, STRIDE_H, COLUMNS, IN_FROM, IN_TO
        )
        for i in tl.range(0, BAND, loop_unroll_factor=UNROLL):
            now, now_x = raw, raw_x
            h = out_h + dil_h * (i + 1)
            raw = load_incoming(
                g + out_lane, y + out_lane, h, stop_out, lane_ok, c_ok, out_w, OW, dil_w, C, WINDOW, OUT_FROM,
                OUT_TO, GVAR,
            )  # fmt: skip
            h = in_h + dil_h * STRIDE_H * (i + 1)
            raw_x = load_rows(
                x + in_lane, h, stop_in, lane_ok, c_ok, in_w, W, dil_h, dil_w, C, STRIDE_H, COLUMNS, IN_FROM,
                IN_TO,
            )  # fmt: skip
            window = window + incoming_row(
                now, out_h + dil_h * i, lane_ok, gm, gv, my, out_w, OH, OW, dil_w, WINDOW, OUT_FROM, OUT_TO,
                GMEAN, GVAR,
            )  # fmt: skip
            pre = normalise_rows(
                now_x, in_h + dil_h * STRIDE_H * i, lane_ok, m, scale, shift, in_w, H, W, dil_h, dil_w,
                STRIDE_H, COLUMNS, IN_FROM, IN_TO, NORM, NONE,
            )  # fmt: skip
            z = ()
            for q in tl.static_range(STRIDE_H * COLUMNS):
                z = z + (activation(pre[q], ACT),)
            if NEED_WEIGHT:
                updated = ()
                for q in tl.static_range(K * K):
                    acc = dtaps[q]
                    for j in tl.static_range(STRIP):
                        gy = window[
                            (OPEN_H - 1 - q // K // STRIDE_H) * WINDOW + j + OPEN_W - 1 - q % K // STRIDE_W
                        ]
                        acc += z[(q // K % STRIDE_H) * COLUMNS + j * STRIDE_W + q % K % STRIDE_W] * gy
                    updated = updated + (acc,)
                dtaps = updated
            if NEED_INPUT:
                for e in tl.static_range(STRIDE_H):
                    h = in_h + dil_h * (STRIDE_H * i + e)
                    row_ok = lane_ok & (h >= 0) & (h < H)
                    dx_row = dx + in_lane + h.to(tl.int64) * W * C
                    row1 = tl.zeros([LANES, BLOCK_C], tl.float32)
                    row2 = tl.zeros([LANES, BLOCK_C], tl.float32)
                    for j in tl.static_range(COLUMNS):
                        gz = tl.zeros([LANES, BLOCK_C], tl.float32)
                        for a in tl.static_range(OPEN_H):
                            for b in tl.static_range(OPEN_W):
                                if e + STRIDE_H * a < K and j % STRIDE_W + STRIDE_W * b < K:
                                    gz += (
                                        taps[(e + STRIDE_H * a) * K + j % STRIDE_W + STRIDE_W * b]
                                        * window[(OPEN_H - 1 - a) * WINDOW + j // STRIDE_W + OPEN_W - 1 - b]
                                    )
                        ok = in_row(row_ok, in_w, W, dil_w, j, IN_FROM, IN_TO)
                        inside = ok if j < IN_FROM or j >= IN_TO else None
                        gp, gp_away, gx = normalise_backward(
                            gz, now_x[e * COLUMNS + j], pre[e * COLUMNS + j], z[e * COLUMNS + j], inside, m,
                            scale, NORM, ACT,
                        )  # fmt: skip
                        if NORM:
                            row1 += gp
                            row2 += gp_away
                        tl.store(dx_row + j * dil_w * C, gx.to(dx.dtype.element_ty), mask=ok & c_ok)
                    if NORM:
                        sum1 += tl.where(row_ok, row1, 0.0)
                        sum2 += tl.where(row_ok, row2, 0.0)
            tail = ()
            for q in tl.static_range((OPEN_H - 1) * WINDOW):
                tail = tail + (window[WINDOW + q],)
            window = tail
    out = sums + group.to(tl.int64) * C + c
    plane = groups.to(tl.int64) * C
    if NEED_WEIGHT:
        for q in tl.static_range(K * K):
            tl.store(out + q * plane, tl.sum(dtaps[q], 0)[None, :], mask=c_ok)
    if NEED_INPUT and NORM:
        tl.store(out + K * K * plane, tl.sum(sum1, 0)[None, :], mask=c_ok)
        tl.store(out + (K * K + 1) * plane, tl.sum(sum2, 0)[None, :], mask=c_ok)


# ---- host ----


def depthwise_conv2d_backward(
    g: Tensor, g_mean: Tensor | None, g_var: Tensor | None, y: Tensor, mean_y: Tensor, x: Tensor,
    weight: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, act: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    # With a common factor of stride and dilation, the phases of the output meet in some pixels of the input
    # and miss the others: a plan of its own, for a shape that no network was seen to have.
    phases_part = all(math.gcd(s, d) == 1 for s, d in zip(stride, dilation))
    if not (serves(x, weight) and phases_part and (need_input or need_weight)):
        return reference.depthwise_conv2d_backward(
            g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act, stride, padding,
            dilation, need_input, need_weight,
        )  # fmt: skip
    args = (
        g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation,
        need_input, need_weight,
    )  # fmt: skip
    kernel = weight.shape[2]
    shape = x.dtype, *x.shape[1:], kernel, *stride, *dilation
    candidates = tiles.depthwise_backward(x.shape[1], kernel, stride[1], x.element_size())
    return backward(
        *args, tune.best(
            "depthwise_conv2d_backward", shape, x, candidates, lambda tile: backward(*args, tile)
        )
    )


def backward(
    g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation,
    need_input, need_weight, tile,
):  # fmt: skip
    n, channels, height, width = x.shape
    kernel, (out_h, out_w) = weight.shape[2], g.shape[2:]
    first_row, rows = cells(height, padding[0], stride[0], dilation[0])
    first_column, columns = cells(width, padding[2], stride[1], dilation[1])
    lanes = cut(n, rows, columns, dilation, channels, tile, multiprocessors(x.device))
    open_w = cdiv(kernel, stride[1])
    last = first_column + tile.strip * (cdiv(columns, tile.strip) - 1)  # first cell of the last strip
    out_from, out_to = always_inside(
        dilation[1] * (first_column - open_w + 1), dilation[1] - 1 + dilation[1] * (last - open_w + 1),
        tile.strip + open_w - 1, dilation[1], out_w,
    )  # fmt: skip
    in_from, in_to = always_inside(
        dilation[1] * stride[1] * first_column - padding[2],
        (dilation[1] - 1) * stride[1] + dilation[1] * stride[1] * last - padding[2],
        tile.strip * stride[1], dilation[1], width,
    )  # fmt: skip
    norm, taps = norm_arguments(mean, var, gamma, beta), kernel * kernel
    sums = x.new_empty((taps + 2, lanes.groups, channels), dtype=torch.float32)
    dx = empty_nhwc(x, x.shape) if need_input else x.new_empty(0)
    launch(
        depthwise_conv2d_backward_kernel, (lanes.groups * lanes.blocks,), warps=tile.warps,
        x=nhwc(x), weight=weight.contiguous(), dx=dx, sums=sums,
        lanes=lanes.lanes, bands=lanes.bands, strips=lanes.strips, first_row=first_row,
        first_column=first_column, H=height, W=width, OH=out_h, OW=out_w, pad_top=padding[0],
        pad_left=padding[2], dil_h=dilation[0], dil_w=dilation[1], BAND=lanes.band, values=n * out_h * out_w,
        eps=eps, C=channels, K=kernel, STRIDE_H=stride[0], STRIDE_W=stride[1], STRIP=tile.strip,
        LANES=tile.lanes, BLOCK_C=tile.block_c, IN_FROM=in_from, IN_TO=in_to, OUT_FROM=out_from,
        OUT_TO=out_to, ACT=ACTS[act], NEED_INPUT=need_input, NEED_WEIGHT=need_weight, UNROLL=tile.unroll,
        **incoming_arguments(g, g_mean, g_var, y, mean_y), **norm,
    )  # fmt: skip
    dweight = torch.empty(weight.shape if need_weight else 0, dtype=weight.dtype, device=x.device)
    vector_grads = finish_sums(sums, dweight, norm, eps, taps, need_input, need_weight)
    return restored(dx, x) if need_input else dx, dweight, *vector_grads
