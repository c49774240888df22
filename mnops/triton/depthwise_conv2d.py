"""depthwise_conv2d: lanes slide down a band of rows (`lanes.py`); reads x and writes y, the floor.

Each input row adds to the OPEN output rows that it touches; a row of y is stored, and measured, when the last
of its input rows has been. 9 multiply-adds a value: bound by memory. It loses where an image is a few pixels
wide: strips of 4 columns are then partly masked.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnops import reference
from mnops.triton import tiles, tune
from mnops.triton.common import ACTS, channel_norm, rounded, share, store_statistics
from mnops.triton.finish import finish_statistics
from mnops.triton.lanes import always_inside, cut, lane_position, load_rows, merge_lanes, normalise_rows
from mnops.triton.launch import (
    cdiv,
    empty_nhwc,
    launch,
    multiprocessors,
    nhwc,
    norm_arguments,
    out_size,
    restored,
)

WIDEST = 7  # kernel; the taps live in registers


@triton.jit(
    do_not_specialize=["lanes", "bands", "strips", "H", "W", "OH", "OW", "pad_top", "pad_left", "BAND"]
)
def depthwise_conv2d_kernel(
    x,  # (N, H, W, C)
    weight,  # (C, K, K)
    mean, var, gamma, beta,  # (C,) of the pending norm
    y,  # (N, OH, OW, C)
    stats,  # (3, programs of a channel block, C): count, mean, sum of squared deviations
    lanes, bands, strips,  # N * bands * strips lanes; bands and strips count every dilation phase
    H, W, OH, OW, pad_top, pad_left, dil_h, dil_w,
    BAND,  # output rows of a lane
    eps,
    C: tl.constexpr, K: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    STRIP: tl.constexpr,  # output columns of a lane
    LANES: tl.constexpr, BLOCK_C: tl.constexpr,
    IN_FROM: tl.constexpr, IN_TO: tl.constexpr,  # input columns of a strip that no strip has outside
    OUT_TO: tl.constexpr,  # output columns of a strip that every strip has
    NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, ACT: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    NEW: tl.constexpr = min(K, STRIDE_H)
    SEEN: tl.constexpr = K - NEW
    OPEN: tl.constexpr = (K + STRIDE_H - 1) // STRIDE_H
    COLUMNS: tl.constexpr = (STRIP - 1) * STRIDE_W + K
    group, groups, c, c_ok = share(C, BLOCK_C)
    taps = ()
    for q in tl.static_range(K * K):
        taps = taps + (tl.load(weight + c * (K * K) + q, mask=c_ok, other=0.0).to(tl.float32),)
    m, scale, shift = channel_norm(
        mean, var, gamma, beta, eps, c, c_ok, NORM, GAMMA, BETA, x.dtype.element_ty
    )

    count = tl.zeros([LANES, 1], tl.float32)
    pivot = tl.zeros([LANES, BLOCK_C], tl.float32)
    sum1 = tl.zeros([LANES, BLOCK_C], tl.float32)
    sum2 = tl.zeros([LANES, BLOCK_C], tl.float32)
    for tile in range(group, tl.cdiv(lanes, LANES), groups):
        lane = tile * LANES + tl.arange(0, LANES)[:, None]
        n, phase_h, band, phase_w, strip = lane_position(lane, bands, strips, dil_h, dil_w)
        first_w = phase_w + dil_w * (strip * STRIP)
        lane_ok = (lane < lanes) & (first_w < OW)
        in_w = phase_w * STRIDE_W - pad_left + dil_w * (strip * STRIP * STRIDE_W)
        in_h = phase_h * STRIDE_H - pad_top + dil_h * (band * BAND * STRIDE_H + SEEN)
        stop_h = tl.minimum(H, in_h + dil_h * STRIDE_H * BAND)
        out_h = phase_h + dil_h * (band * BAND)
        x_lane = x + n.to(tl.int64) * H * W * C + in_w * C + c
        y_lane = y + n.to(tl.int64) * OH * OW * C + first_w * C + c

        if MEASURE:  # before the rows: count is one value a lane, and would have to change hands in the loop
            width = tl.minimum(tl.cdiv(OW - first_w, dil_w), STRIP)
            height = tl.minimum(tl.maximum(tl.cdiv(OH - out_h, dil_h), 0), BAND)
            inside = tl.where(lane_ok, width * height, 0).to(tl.float32)
            unset = (count == 0.0) & (inside > 0.0)
            count += inside

        partial = ()
        for _ in tl.static_range((OPEN - 1) * STRIP):
            partial = partial + (tl.zeros([LANES, BLOCK_C], tl.float32),)
        h = in_h + dil_h * STRIDE_H * (1 - OPEN)
        raw = load_rows(x_lane, h, H, lane_ok, c_ok, in_w, W, dil_h, dil_w, C, NEW, COLUMNS, IN_FROM, IN_TO)
        for i in range(1 - OPEN, BAND):
            now = raw  # the rows after it are under way while it is worked on
            h = in_h + dil_h * STRIDE_H * (i + 1)
            raw = load_rows(
                x_lane, h, stop_h, lane_ok, c_ok, in_w, W, dil_h, dil_w, C, NEW, COLUMNS, IN_FROM, IN_TO
            )
            h = in_h + dil_h * STRIDE_H * i
            z = normalise_rows(
                now, h, lane_ok, m, scale, shift, in_w, H, W, dil_h, dil_w, NEW, COLUMNS, IN_FROM, IN_TO,
                NORM, ACT,
            )  # fmt: skip
            rows = ()
            for r in tl.static_range(OPEN):
                for j in tl.static_range(STRIP):
                    if r < OPEN - 1:
                        acc = partial[r * STRIP + j]
                    else:
                        acc = tl.zeros([LANES, BLOCK_C], tl.float32)
                    for t in tl.static_range(NEW):
                        if SEEN + t - STRIDE_H * r >= 0:
                            for k in tl.static_range(K):
                                tap = taps[(SEEN + t - STRIDE_H * r) * K + k]
                                acc += z[t * COLUMNS + j * STRIDE_W + k] * tap
                    rows = rows + (acc,)
            if i >= 0:
                h = out_h + dil_h * i
                row_ok = lane_ok & (h < OH)
                y_row = y_lane + h.to(tl.int64) * OW * C
                row1 = tl.zeros([LANES, BLOCK_C], tl.float32)
                row2 = tl.zeros([LANES, BLOCK_C], tl.float32)
                for j in tl.static_range(STRIP):
                    out, stored = rounded(rows[j], y.dtype.element_ty)
                    ok = row_ok
                    if j >= OUT_TO:
                        ok = row_ok & (first_w + j * dil_w < OW)
                    tl.store(y_row + j * dil_w * C, out, mask=ok & c_ok)
                    if MEASURE:
                        if j == 0:
                            pivot = tl.where(unset & (i == 0), stored, pivot)
                        away = stored - pivot
                        if j >= OUT_TO:
                            away = tl.where(ok, away, 0.0)
                        row1 += away
                        row2 += away * away
                if MEASURE:
                    sum1 += tl.where(row_ok, row1, 0.0)
                    sum2 += tl.where(row_ok, row2, 0.0)
            tail = ()
            for q in tl.static_range((OPEN - 1) * STRIP):
                tail = tail + (rows[STRIP + q],)
            partial = tail
    if MEASURE:
        count, mean_y, m2 = merge_lanes(count, pivot, sum1, sum2)
        store_statistics(stats, group, groups, c, c_ok, C, count, mean_y, m2)


# ---- host ----


def depthwise_conv2d(
    x: Tensor, weight: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, act: str, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], measure: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not serves(x, weight):
        return reference.depthwise_conv2d(
            x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation, measure
        )
    args = x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation, measure
    kernel = weight.shape[2]
    shape = x.dtype, *x.shape[1:], kernel, *stride, *dilation
    candidates = tiles.depthwise(x.shape[1], kernel, stride[1], x.element_size())
    return forward(
        *args, tune.best("depthwise_conv2d", shape, x, candidates, lambda tile: forward(*args, tile))
    )


def serves(x: Tensor, weight: Tensor) -> bool:
    return x.dtype != torch.float64 and x.numel() > 0 and weight.shape[2] <= WIDEST


def forward(x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation, measure, tile):
    n, channels, height, width = x.shape
    kernel = weight.shape[2]
    out_h, out_w = out_size(height, width, kernel, stride, padding, dilation)
    columns = cdiv(out_w, dilation[1])
    lanes = cut(n, cdiv(out_h, dilation[0]), columns, dilation, channels, tile, multiprocessors(x.device))
    # the first output column of the last strip in the last dilation phase
    last = dilation[1] - 1 + dilation[1] * tile.strip * (cdiv(columns, tile.strip) - 1)
    reach = (tile.strip - 1) * stride[1] + kernel
    in_from, in_to = always_inside(-padding[2], last * stride[1] - padding[2], reach, dilation[1], width)
    _, out_to = always_inside(0, last, tile.strip, dilation[1], out_w)
    y = empty_nhwc(x, (n, channels, out_h, out_w))
    stats = x.new_empty((3, lanes.groups, channels) if measure else 0, dtype=torch.float32)
    launch(
        depthwise_conv2d_kernel, (lanes.groups * lanes.blocks,), warps=tile.warps,
        x=nhwc(x), weight=weight.contiguous(), y=y, stats=stats,
        lanes=lanes.lanes, bands=lanes.bands, strips=lanes.strips, H=height, W=width, OH=out_h, OW=out_w,
        pad_top=padding[0], pad_left=padding[2], dil_h=dilation[0], dil_w=dilation[1], BAND=lanes.band,
        eps=eps, C=channels, K=kernel, STRIDE_H=stride[0], STRIDE_W=stride[1], STRIP=tile.strip,
        LANES=tile.lanes, BLOCK_C=tile.block_c, IN_FROM=in_from, IN_TO=in_to, OUT_TO=out_to, ACT=ACTS[act],
        MEASURE=measure, **norm_arguments(mean, var, gamma, beta),
    )  # fmt: skip
    return restored(y, x), *finish_statistics(stats, channels, measure)
