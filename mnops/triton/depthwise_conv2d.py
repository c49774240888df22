"""depthwise_conv2d forward and its one-kernel backward."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnops import reference
from mnops.triton import tune
from mnops.triton.common import (
    ACTS,
    NONE,
    activation,
    activation_backward,
    channel_incoming,
    block_channels,
    channel_norm,
    incoming_row,
    lane_position,
    load_row,
    normalise,
    rounded,
    to_float,
)
from mnops.triton.finish import finish_statistics, finish_sums
from mnops.triton.launch import cdiv, empty_nhwc, launch, multiprocessors, nhwc, out_size, restored, vectors

WIDEST = 7  # kernel; the taps live in registers
MOST_GROUPS = 1024  # programs of a channel block: rows of the second stage


@triton.jit(do_not_specialize=["lanes", "bands", "strips", "H", "W", "OH", "OW", "pad_top", "pad_left", "BAND"])
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
    IN_FROM: tl.constexpr, IN_TO: tl.constexpr,  # input columns of a strip that no strip has outside the image
    OUT_TO: tl.constexpr,  # output columns of a strip that every strip has
    NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, ACT: tl.constexpr, MEASURE: tl.constexpr,
):
    NEW: tl.constexpr = min(K, STRIDE_H)
    SEEN: tl.constexpr = K - NEW
    OPEN: tl.constexpr = (K + STRIDE_H - 1) // STRIDE_H
    COLUMNS: tl.constexpr = (STRIP - 1) * STRIDE_W + K
    blocks = tl.cdiv(C, BLOCK_C)
    group, groups = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    c, c_ok = block_channels(tl.program_id(0) % blocks, C, BLOCK_C)
    taps = ()
    for q in tl.static_range(K * K):
        taps = taps + (tl.load(weight + c * (K * K) + q, mask=c_ok, other=0.0).to(tl.float32),)
    m, scale, shift = channel_norm(mean, var, gamma, beta, eps, c, c_ok, NORM, GAMMA, BETA, x.dtype.element_ty)

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

        if MEASURE:  # settled before the rows: count is one value a lane, and would have to change hands in the loop
            width = tl.minimum(tl.cdiv(OW - first_w, dil_w), STRIP)
            height = tl.minimum(tl.maximum(tl.cdiv(OH - out_h, dil_h), 0), BAND)
            inside = tl.where(lane_ok, width * height, 0).to(tl.float32)
            unset = (count == 0.0) & (inside > 0.0)
            count += inside

        partial = ()
        for i in tl.static_range((OPEN - 1) * STRIP):
            partial = partial + (tl.zeros([LANES, BLOCK_C], tl.float32),)
        raw = ()
        for t in tl.static_range(NEW):
            h = in_h + dil_h * (STRIDE_H * (1 - OPEN) + t)
            ok = lane_ok & (h >= 0) & (h < H)
            raw = raw + load_row(x_lane, h, ok, c_ok, in_w, W, dil_w, C, COLUMNS, IN_FROM, IN_TO)
        for i in range(1 - OPEN, BAND):
            now = raw
            raw = ()
            for t in tl.static_range(NEW):
                h = in_h + dil_h * (STRIDE_H * (i + 1) + t)
                ok = lane_ok & (h >= 0) & (h < stop_h)
                raw = raw + load_row(x_lane, h, ok, c_ok, in_w, W, dil_w, C, COLUMNS, IN_FROM, IN_TO)
            z = ()
            for t in tl.static_range(NEW):
                h = in_h + dil_h * (STRIDE_H * i + t)
                row_ok = (h >= 0) & (h < H)
                for j in tl.static_range(COLUMNS):
                    ok = row_ok
                    if j < IN_FROM or j >= IN_TO:
                        ok = row_ok & (in_w + j * dil_w >= 0) & (in_w + j * dil_w < W)
                    z = z + (normalise(now[t * COLUMNS + j], ok, m, scale, shift, NORM, ACT),)
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
                                acc += z[t * COLUMNS + j * STRIDE_W + k] * taps[(SEEN + t - STRIDE_H * r) * K + k]
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
        n_lane = tl.maximum(count, 1.0)
        total = tl.sum(count, 0)[:, None]
        n_all = tl.maximum(total, 1.0)
        mean_all = tl.sum(count * (pivot + sum1 / n_lane), 0)[None, :] / n_all
        away = (pivot - mean_all) + sum1 / n_lane  # in this order the rounding of a large mean drops out
        shift = tl.sum(count * away, 0)[None, :] / n_all
        away -= shift
        m2 = tl.sum(sum2 - sum1 * sum1 / n_lane + count * away * away, 0)[None, :]
        out = stats + group.to(tl.int64) * C + c
        tl.store(out, total + tl.zeros([1, BLOCK_C], tl.float32), mask=c_ok)
        tl.store(out + groups.to(tl.int64) * C, mean_all + shift, mask=c_ok)
        tl.store(out + 2 * groups.to(tl.int64) * C, m2, mask=c_ok)


@triton.jit(
    do_not_specialize=[
        "lanes", "bands", "strips", "first_row", "first_column", "H", "W", "OH", "OW", "pad_top", "pad_left", "BAND",
        "values",
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
):
    OPEN_H: tl.constexpr = (K + STRIDE_H - 1) // STRIDE_H
    OPEN_W: tl.constexpr = (K + STRIDE_W - 1) // STRIDE_W
    WINDOW: tl.constexpr = STRIP + OPEN_W - 1
    COLUMNS: tl.constexpr = STRIP * STRIDE_W
    blocks = tl.cdiv(C, BLOCK_C)
    group, groups = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    c, c_ok = block_channels(tl.program_id(0) % blocks, C, BLOCK_C)
    taps = ()
    dtaps = ()
    for q in tl.static_range(K * K):
        if NEED_INPUT:
            taps = taps + (tl.load(weight + c * (K * K) + q, mask=c_ok, other=0.0).to(tl.float32),)
        if NEED_WEIGHT:
            dtaps = dtaps + (tl.zeros([LANES, BLOCK_C], tl.float32),)
    m, scale, shift = channel_norm(mean, var, gamma, beta, eps, c, c_ok, NORM, GAMMA, BETA, x.dtype.element_ty)
    gm, gv, my = channel_incoming(g_mean, g_var, mean_y, values, c, c_ok, GMEAN, GVAR, 1.0, x.dtype.element_ty)

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

        window = ()
        for i in tl.static_range(OPEN_H - 1):
            h = out_h + dil_h * (i - (OPEN_H - 1))
            ok = lane_ok & (h >= 0) & (h < OH)
            raw = load_row(g + out_lane, h, ok, c_ok, out_w, OW, dil_w, C, WINDOW, OUT_FROM, OUT_TO)
            if GVAR:
                raw = raw + load_row(y + out_lane, h, ok, c_ok, out_w, OW, dil_w, C, WINDOW, OUT_FROM, OUT_TO)
            window = window + incoming_row(raw, ok, gm, gv, my, out_w, OW, dil_w, WINDOW, OUT_FROM, OUT_TO, GMEAN, GVAR)
        ok = lane_ok & (out_h >= 0) & (out_h < OH)
        raw = load_row(g + out_lane, out_h, ok, c_ok, out_w, OW, dil_w, C, WINDOW, OUT_FROM, OUT_TO)
        if GVAR:
            raw = raw + load_row(y + out_lane, out_h, ok, c_ok, out_w, OW, dil_w, C, WINDOW, OUT_FROM, OUT_TO)
        raw_x = ()
        for e in tl.static_range(STRIDE_H):
            h = in_h + dil_h * e
            ok = lane_ok & (h >= 0) & (h < H)
            raw_x = raw_x + load_row(x + in_lane, h, ok, c_ok, in_w, W, dil_w, C, COLUMNS, IN_FROM, IN_TO)

        for i in tl.range(0, BAND, loop_unroll_factor=UNROLL):
            now = raw
            now_x = raw_x
            h = out_h + dil_h * (i + 1)
            ok = lane_ok & (h >= 0) & (h < stop_out)
            raw = load_row(g + out_lane, h, ok, c_ok, out_w, OW, dil_w, C, WINDOW, OUT_FROM, OUT_TO)
            if GVAR:
                raw = raw + load_row(y + out_lane, h, ok, c_ok, out_w, OW, dil_w, C, WINDOW, OUT_FROM, OUT_TO)
            raw_x = ()
            for e in tl.static_range(STRIDE_H):
                h = in_h + dil_h * (STRIDE_H * (i + 1) + e)
                ok = lane_ok & (h >= 0) & (h < stop_in)
                raw_x = raw_x + load_row(x + in_lane, h, ok, c_ok, in_w, W, dil_w, C, COLUMNS, IN_FROM, IN_TO)

            h = out_h + dil_h * i
            ok = lane_ok & (h >= 0) & (h < OH)
            window = window + incoming_row(now, ok, gm, gv, my, out_w, OW, dil_w, WINDOW, OUT_FROM, OUT_TO, GMEAN, GVAR)
            pre = ()
            z = ()
            for e in tl.static_range(STRIDE_H):
                h = in_h + dil_h * (STRIDE_H * i + e)
                row_ok = lane_ok & (h >= 0) & (h < H)
                for j in tl.static_range(COLUMNS):
                    ok = row_ok
                    if j < IN_FROM or j >= IN_TO:
                        ok = row_ok & (in_w + j * dil_w >= 0) & (in_w + j * dil_w < W)
                    p = normalise(now_x[e * COLUMNS + j], ok, m, scale, shift, NORM, NONE)
                    pre = pre + (p,)
                    z = z + (activation(p, ACT),)
            if NEED_WEIGHT:
                updated = ()
                for q in tl.static_range(K * K):
                    acc = dtaps[q]
                    for j in tl.static_range(STRIP):
                        acc += (
                            z[(q // K % STRIDE_H) * COLUMNS + j * STRIDE_W + q % K % STRIDE_W]
                            * window[(OPEN_H - 1 - q // K // STRIDE_H) * WINDOW + j + OPEN_W - 1 - q % K // STRIDE_W]
                        )
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
                        ok = row_ok
                        if j < IN_FROM or j >= IN_TO:
                            ok = row_ok & (in_w + j * dil_w >= 0) & (in_w + j * dil_w < W)
                        gp = activation_backward(gz, pre[e * COLUMNS + j], z[e * COLUMNS + j], ACT)
                        if NORM:
                            if j < IN_FROM or j >= IN_TO:
                                gp = tl.where(ok, gp, 0.0)
                            row1 += gp
                            row2 += gp * (to_float(now_x[e * COLUMNS + j]) - m)
                            gp = gp * scale
                        tl.store(dx_row + j * dil_w * C, gp.to(dx.dtype.element_ty), mask=ok & c_ok)
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


class Tile(NamedTuple):
    """What a program of a depthwise kernel works on at a time."""

    strip: int  # neighbouring output pixels (backward: cells of stride x stride input pixels) of a lane
    vector: int  # channels of a thread
    block_c: int  # channels of a program
    band: int = 14  # rows of a lane, at most
    unroll: int = 1
    warps: int = 4
    programs: int = 8  # a multiprocessor

    @property
    def lanes(self) -> int:
        return max(1, 32 * self.warps * self.vector // self.block_c)


class Cut(NamedTuple):
    """How rows and columns are cut into lanes."""

    bands: int
    strips: int
    band: int
    lanes: int
    groups: int
    blocks: int


def _cut(n: int, rows: int, columns: int, dilation: Sequence[int], channels: int, tile: Tile, mp: int) -> Cut:
    """rows, columns: of one dilation phase. Bands get shorter where the device would not be full."""
    strips = dilation[1] * cdiv(columns, tile.strip)
    blocks = cdiv(channels, tile.block_c)
    full = 4 * mp * tile.lanes  # four programs a multiprocessor
    wanted = cdiv(full, max(1, n * strips * blocks * dilation[0]))
    bands = max(cdiv(rows, tile.band), min(wanted, cdiv(rows, 4)))
    band = cdiv(rows, bands)
    bands = dilation[0] * cdiv(rows, band)
    lanes = n * bands * strips
    groups = min(cdiv(lanes, tile.lanes), cdiv(tile.programs * mp, blocks), MOST_GROUPS)
    return Cut(bands, strips, band, lanes, groups, blocks)


def _always_inside(first: int, last: int, count: int, step: int, size: int) -> tuple[int, int]:
    """Which of `count` pixels, `step` apart, are in [0, size) for every strip, which start at first to last.
    """
    start, stop = max(0, cdiv(-first, step)), min(count, (size - 1 - last) // step + 1)
    return (start, stop) if start < stop else (0, 0)


def depthwise_conv2d(
    x: Tensor, weight: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, act: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], measure: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not _serves(x, weight):
        return reference.depthwise_conv2d(
            x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation, measure
        )
    args = x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation, measure
    kernel = weight.shape[2]
    shape = x.dtype, *x.shape[1:], kernel, *stride, *dilation
    tiles = forward_tiles(x.shape[1], kernel)
    return forward(*args, tune.best("depthwise_conv2d", shape, x, tiles, lambda tile: forward(*args, tile)))


def _serves(x: Tensor, weight: Tensor) -> bool:
    return x.dtype != torch.float64 and x.numel() > 0 and weight.shape[2] <= WIDEST


def forward(x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation, measure, tile):
    n, channels, height, width = x.shape
    kernel = weight.shape[2]
    out_h, out_w = out_size(height, width, kernel, stride, padding, dilation)
    columns = cdiv(out_w, dilation[1])
    cut = _cut(n, cdiv(out_h, dilation[0]), columns, dilation, channels, tile, multiprocessors(x.device))
    # the first output column of the last strip in the last dilation phase
    last = dilation[1] - 1 + dilation[1] * tile.strip * (cdiv(columns, tile.strip) - 1)
    reach = (tile.strip - 1) * stride[1] + kernel
    in_from, in_to = _always_inside(-padding[2], last * stride[1] - padding[2], reach, dilation[1], width)
    _, out_to = _always_inside(0, last, tile.strip, dilation[1], out_w)
    y = empty_nhwc(x, (n, channels, out_h, out_w))
    stats = x.new_empty((3, cut.groups, channels) if measure else 0, dtype=torch.float32)
    mean, var, gamma, beta = vectors(mean, var, gamma, beta)
    launch(
        depthwise_conv2d_kernel, (cut.groups * cut.blocks,), warps=tile.warps,
        x=nhwc(x), weight=weight.contiguous(), mean=mean, var=var, gamma=gamma, beta=beta, y=y, stats=stats,
        lanes=cut.lanes, bands=cut.bands, strips=cut.strips, H=height, W=width, OH=out_h, OW=out_w,
        pad_top=padding[0], pad_left=padding[2], dil_h=dilation[0], dil_w=dilation[1], BAND=cut.band, eps=eps,
        C=channels, K=kernel, STRIDE_H=stride[0], STRIDE_W=stride[1], STRIP=tile.strip, LANES=tile.lanes,
        BLOCK_C=tile.block_c, IN_FROM=in_from, IN_TO=in_to, OUT_TO=out_to, NORM=mean is not None,
        GAMMA=gamma is not None, BETA=beta is not None, ACT=ACTS[act], MEASURE=measure,
    )  # fmt: skip
    return restored(y, x), *finish_statistics(stats, channels, measure)


def depthwise_conv2d_backward(
    g: Tensor, g_mean: Tensor | None, g_var: Tensor | None, y: Tensor, mean_y: Tensor, x: Tensor, weight: Tensor,
    mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, act: str,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    # With a common factor of stride and dilation, the phases of the output meet in some pixels of the input
    # and miss the others: a plan of its own, for a shape that no network was seen to have.
    phases_part = all(math.gcd(s, d) == 1 for s, d in zip(stride, dilation))
    if not (_serves(x, weight) and phases_part and (need_input or need_weight)):
        return reference.depthwise_conv2d_backward(
            g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation,
            need_input, need_weight,
        )  # fmt: skip
    args = (
        g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation,
        need_input, need_weight,
    )  # fmt: skip
    kernel = weight.shape[2]
    shape = x.dtype, *x.shape[1:], kernel, *stride, *dilation
    tiles = backward_tiles(x.shape[1], kernel)
    return backward(*args, tune.best("depthwise_conv2d_backward", shape, x, tiles, lambda tile: backward(*args, tile)))


def backward(
    g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation,
    need_input, need_weight, tile,
):  # fmt: skip
    n, channels, height, width = x.shape
    kernel, (out_h, out_w) = weight.shape[2], g.shape[2:]
    first_row, rows = _cells(height, padding[0], stride[0], dilation[0])
    first_column, columns = _cells(width, padding[2], stride[1], dilation[1])
    cut = _cut(n, rows, columns, dilation, channels, tile, multiprocessors(x.device))
    open_w = cdiv(kernel, stride[1])
    last = first_column + tile.strip * (cdiv(columns, tile.strip) - 1)  # first cell of the last strip
    out_from, out_to = _always_inside(
        dilation[1] * (first_column - open_w + 1), dilation[1] - 1 + dilation[1] * (last - open_w + 1),
        tile.strip + open_w - 1, dilation[1], out_w,
    )  # fmt: skip
    in_from, in_to = _always_inside(
        dilation[1] * stride[1] * first_column - padding[2],
        (dilation[1] - 1) * stride[1] + dilation[1] * stride[1] * last - padding[2],
        tile.strip * stride[1], dilation[1], width,
    )  # fmt: skip
    given = mean, var, gamma, beta = vectors(mean, var, gamma, beta)
    taps = kernel * kernel
    sums = x.new_empty((taps + 2, cut.groups, channels), dtype=torch.float32)
    dx = empty_nhwc(x, x.shape) if need_input else x.new_empty(0)
    launch(
        depthwise_conv2d_backward_kernel, (cut.groups * cut.blocks,), warps=tile.warps,
        g=nhwc(g), y=None if g_var is None else nhwc(y), g_mean=g_mean, g_var=g_var, mean_y=mean_y, x=nhwc(x),
        weight=weight.contiguous(), mean=mean, var=var, gamma=gamma, beta=beta, dx=dx, sums=sums,
        lanes=cut.lanes, bands=cut.bands, strips=cut.strips, first_row=first_row, first_column=first_column,
        H=height, W=width, OH=out_h, OW=out_w, pad_top=padding[0], pad_left=padding[2], dil_h=dilation[0],
        dil_w=dilation[1], BAND=cut.band, values=n * out_h * out_w, eps=eps, C=channels, K=kernel,
        STRIDE_H=stride[0], STRIDE_W=stride[1], STRIP=tile.strip, LANES=tile.lanes, BLOCK_C=tile.block_c,
        IN_FROM=in_from, IN_TO=in_to, OUT_FROM=out_from, OUT_TO=out_to, NORM=mean is not None,
        GAMMA=gamma is not None, BETA=beta is not None, ACT=ACTS[act], GMEAN=g_mean is not None,
        GVAR=g_var is not None, NEED_INPUT=need_input, NEED_WEIGHT=need_weight, UNROLL=tile.unroll,
    )  # fmt: skip
    dweight = torch.empty(weight.shape if need_weight else 0, dtype=weight.dtype, device=x.device)
    vector_grads = finish_sums(sums, dweight, given, eps, taps, need_input, need_weight)
    return restored(dx, x) if need_input else dx, dweight, *vector_grads


def _cells(size: int, before: int, stride: int, dilation: int) -> tuple[int, int]:
    """The first cell and how many there are, along one dimension, in a dilation phase.

    Phase a of the output, a + dilation * i, meets the padded pixels a * stride + dilation * t, t = stride * i
    + tap: cell i holds stride of them. The range is that of the phase with most on either side.
    """
    first = -(((dilation - 1) * stride - before) // dilation)  # ceil of the smallest t of a pixel in the image
    last = (size - 1 + before) // dilation
    return first // stride, last // stride - first // stride + 1


# ---- tiles ----


def _block_c(channels: int) -> int:
    """Channels of a program: 32 (64 bytes of bf16, two sectors), 16 where that wastes an eighth less."""
    return 16 if cdiv(channels, 16) * 16 <= 7 / 8 * cdiv(channels, 32) * 32 else 32


def forward_tiles(channels: int, kernel: int) -> list[Tile]:
    """Candidates, the first guess first.

    Strips of 4 pixels load 6 columns for 4 (3x3), and two channels a thread are 4 or 8 bytes of a row that 16 neighbours
    load together: 86 to 124 registers, 16 to 20 warps resident (sm_90, bf16). A 7x7 holds 49 taps.
    """
    block = _block_c(channels)
    first = Tile(4, 2, block) if kernel < 7 else Tile(2, 2, block)
    return list(dict.fromkeys([first, Tile(2, 2, block), Tile(4, 1, block)]))


def backward_tiles(channels: int, kernel: int) -> list[Tile]:
    """As forward_tiles. With both gradients a thread holds the taps and their gradients: 5x5 and 7x7 take less else."""
    block = _block_c(channels)
    if kernel >= 7:  # 254 registers; strips of 4, or two channels, spill
        return [Tile(2, 1, block), Tile(1, 1, block)]
    first = Tile(4, 2, block) if kernel < 5 else Tile(2, 2, block)  # 5x5: 237 registers, strips of 4 spill
    return list(dict.fromkeys([first, Tile(2, 2, block), Tile(4, 1, block)]))
