"""How depthwise kernels walk over an image: in lanes, strips of a few columns that slide down a band of rows.

A lane holds the taps, the rows that are still open, and of the next row what has been loaded: every pixel is
loaded once a strip, and the columns that neighbouring strips share come from L1. A program has LANES lanes of
BLOCK_C channels, every value of theirs a [LANES, BLOCK_C] block. With dilation each phase, every dil_h-th row
and dil_w-th column, is an image of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from mnops.triton.common import incoming, normalise
from mnops.triton.launch import cdiv
from mnops.triton.tiles import Lanes

MOST_GROUPS = 1024  # programs of a channel block: rows of the second stage


# ---- in kernels ----


@triton.jit
def lane_position(lane, bands, strips, dil_h, dil_w):
    """n, row phase, band, column phase and strip of lanes, strips innermost."""
    strip = lane % strips
    band = (lane // strips) % bands
    return lane // (strips * bands), band % dil_h, band // dil_h, strip % dil_w, strip // dil_w


@triton.jit
def in_row(ok, w, W, dil_w, j: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr):
    """ok, of column j of a strip that starts at w, and inside the image: columns FROM to TO always are."""
    if j < FROM or j >= TO:
        ok = ok & (w + j * dil_w >= 0) & (w + j * dil_w < W)
    return ok


@triton.jit
def load_row(
    lane, h, ok, c_ok, w, W, dil_w, C: tl.constexpr, COLUMNS: tl.constexpr, FROM: tl.constexpr,
    TO: tl.constexpr,
):  # fmt: skip
    """The COLUMNS pixels of row h that start at column w, each [LANES, BLOCK_C], 0 outside the image."""
    row = lane + h.to(tl.int64) * W * C
    loaded = ()
    for j in tl.static_range(COLUMNS):
        column_ok = in_row(ok & c_ok, w, W, dil_w, j, FROM, TO)
        loaded = loaded + (tl.load(row + j * dil_w * C, mask=column_ok, other=0.0),)
    return loaded


@triton.jit
def load_rows(
    lane, h, stop, ok, c_ok, w, W, dil_h, dil_w, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FROM: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """ROWS rows from h on, of those before `stop`."""
    loaded = ()
    for e in tl.static_range(ROWS):
        row = h + dil_h * e
        loaded = loaded + load_row(
            lane, row, ok & (row >= 0) & (row < stop), c_ok, w, W, dil_w, C, COLUMNS, FROM, TO
        )
    return loaded


@triton.jit
def normalise_rows(
    raw, h, ok, m, scale, shift, w, H, W, dil_h, dil_w, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FROM: tl.constexpr, TO: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """z of what load_rows loaded: padding pads z, not x."""
    z = ()
    for e in tl.static_range(ROWS):
        row_ok = ok & (h + dil_h * e >= 0) & (h + dil_h * e < H)
        for j in tl.static_range(COLUMNS):
            column_ok = in_row(row_ok, w, W, dil_w, j, FROM, TO)
            z = z + (normalise(raw[e * COLUMNS + j], column_ok, m, scale, shift, NORM, ACT),)
    return z


@triton.jit
def load_incoming(
    g_lane, y_lane, h, stop, ok, c_ok, w, OW, dil_w, C: tl.constexpr, COLUMNS: tl.constexpr,
    FROM: tl.constexpr, TO: tl.constexpr, GVAR: tl.constexpr,
):  # fmt: skip
    """A row of g, and after it of y where GVAR."""
    ok = ok & (h >= 0) & (h < stop)
    raw = load_row(g_lane, h, ok, c_ok, w, OW, dil_w, C, COLUMNS, FROM, TO)
    if GVAR:
        raw = raw + load_row(y_lane, h, ok, c_ok, w, OW, dil_w, C, COLUMNS, FROM, TO)
    return raw


@triton.jit
def incoming_row(
    raw, h, ok, gm, gv, my, w, OH, OW, dil_w, COLUMNS: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    GMEAN: tl.constexpr, GVAR: tl.constexpr,
):  # fmt: skip
    """gy of what load_incoming loaded."""
    ok = ok & (h >= 0) & (h < OH)
    gy = ()
    for j in tl.static_range(COLUMNS):
        column_ok = in_row(ok, w, OW, dil_w, j, FROM, TO)
        y = raw[j]
        if GVAR:
            y = raw[COLUMNS + j]
        gy = gy + (incoming(raw[j], y, column_ok, gm, gv, my, GMEAN, GVAR, 1.0),)
    return gy


@triton.jit
def merge_lanes(count, pivot, sum1, sum2):
    """Count, mean and sum of squared deviations of all lanes, from counts [LANES, 1] and sums of y - pivot
    and (y - pivot)^2, the pivot a value of the lane's own.
    """
    n_lane = tl.maximum(count, 1.0)
    total = tl.sum(count, 0)[:, None]
    n_all = tl.maximum(total, 1.0)
    mean = tl.sum(count * (pivot + sum1 / n_lane), 0)[None, :] / n_all
    away = (pivot - mean) + sum1 / n_lane  # in this order the rounding of a large mean drops out
    shift = tl.sum(count * away, 0)[None, :] / n_all
    away -= shift
    m2 = tl.sum(sum2 - sum1 * sum1 / n_lane + count * away * away, 0)[None, :]
    return total, mean + shift, m2


# ---- host ----


class Cut(NamedTuple):
    """How rows and columns are cut into lanes, and lanes given to programs."""

    bands: int
    strips: int
    band: int
    lanes: int
    groups: int
    blocks: int


def cut(n: int, rows: int, columns: int, dilation: Sequence[int], channels: int, tile: Lanes, mp: int) -> Cut:
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


def always_inside(first: int, last: int, count: int, step: int, size: int) -> tuple[int, int]:
    """Which of `count` pixels, `step` apart, are in [0, size) for every strip, which start at first to last.
    """
    start, stop = max(0, cdiv(-first, step)), min(count, (size - 1 - last) // step + 1)
    return (start, stop) if start < stop else (0, 0)


def cells(size: int, before: int, stride: int, dilation: int) -> tuple[int, int]:
    """The first cell and how many there are, along one dimension, in a dilation phase.

    Phase a of the output, a + dilation * i, meets the padded pixels a * stride + dilation * t, t = stride * i
    + tap: cell i holds stride of them. The range is that of the phase with most on either side.
    """
    first = -(((dilation - 1) * stride - before) // dilation)  # ceil: the smallest t of a pixel inside
    last = (size - 1 + before) // dilation
    return first // stride, last // stride - first // stride + 1
