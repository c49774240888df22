"""The second stage of every reduction: one small kernel, in a fixed order, so that results repeat bit by bit.

A kernel that reduces over pixels runs `groups` programs over the same channels; each writes its partial
result once, and these kernels put them together: about a percent of the bytes of the kernel before them.
BLOCK_C = 8 channels are one 32-byte sector of a row, and make many programs; ROWS rows are read at once.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnops.triton.common import merge_statistics
from mnops.triton.launch import cdiv, launch

BLOCK_C = 8
MOST_ROWS = 512  # with 8 channels 16 values a thread of 8 warps, three of them for statistics
BLOCK = 1024  # elements of a program that only copies
# A weight gradient is summed over as many splits at once as are 16 values a thread: one after the other each would be
# waited for, 264 of them at 32 x 64. Below LARGE elements 32 are a program's, so that there are programs enough.
AT_ONCE = 4096
LARGE = 1 << 14


@triton.jit(do_not_specialize=["groups"])
def finish_statistics_kernel(
    stats,  # (3, groups, C): count, mean, sum of squared deviations of each program's values
    mean, var,  # (C,)
    groups, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of all values, by merging: |mean| / std of 1000 does not lose the variance."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    count = tl.zeros([1, BLOCK_C], tl.float32)
    merged = tl.zeros([1, BLOCK_C], tl.float32)
    m2 = tl.zeros([1, BLOCK_C], tl.float32)
    for first in range(0, groups, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at, ok = stats + row.to(tl.int64) * C + c, (row < groups) & (c < C)
        n = tl.load(at, mask=ok, other=0.0)
        m = tl.load(at + groups.to(tl.int64) * C, mask=ok, other=0.0)
        squares = tl.load(at + 2 * groups.to(tl.int64) * C, mask=ok, other=0.0)
        n_here = tl.sum(n, 0)[None, :]
        here = tl.sum(n * m, 0)[None, :] / tl.maximum(n_here, 1.0)
        away = m - here
        squares = tl.sum(squares + n * away * away, 0)[None, :]
        count, merged, m2 = merge_statistics(count, merged, m2, n_here, here - merged, squares)
    tl.store(mean + c, merged, mask=c < C)
    tl.store(var + c, m2 / tl.maximum(count, 1.0), mask=c < C)


@triton.jit
def sum_rows(at, groups, C, c_ok, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum of (groups, C) over its rows, [1, BLOCK_C]; `at` points to row 0."""
    total = tl.zeros([1, BLOCK_C], tl.float32)
    for first in range(0, groups, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.sum(tl.load(at + row.to(tl.int64) * C, mask=(row < groups) & c_ok, other=0.0), 0)[None, :]
    return total


@triton.jit
def finish_vectors(
    sum1, sum2,  # sums of gp and of gp * (x - mean) over all pixels
    var, gamma, dmean, dvar, dgamma, dbeta, eps, c, c_ok, GAMMA: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """dbeta = sum1, dgamma = sum2 * rstd, dmean = -gamma * rstd * dbeta, dvar = -1/2 * gamma * rstd^2 *
    dgamma.
    """
    rstd = 1.0 / tl.sqrt_rn(tl.load(var + c, mask=c_ok, other=1.0) + eps)
    scale = rstd
    if GAMMA:
        scale = rstd * tl.load(gamma + c, mask=c_ok, other=0.0)
        tl.store(dgamma + c, sum2 * rstd, mask=c_ok)
    if BETA:
        tl.store(dbeta + c, sum1, mask=c_ok)
    tl.store(dmean + c, -scale * sum1, mask=c_ok)
    tl.store(dvar + c, -0.5 * scale * rstd * (sum2 * rstd), mask=c_ok)


@triton.jit(do_not_specialize=["groups"])
def finish_sums_kernel(
    sums,  # (TAPS + 2, groups, C): dweight by tap, sum gp, sum gp * (x - mean)
    dweight,  # (C, TAPS)
    var, gamma, dmean, dvar, dgamma, dbeta,  # (C,)
    eps, groups, C,
    TAPS: tl.constexpr, FIRST: tl.constexpr,  # the first plane that is wanted: TAPS without a weight gradient
    NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    plane = tl.program_id(1) + FIRST
    size = groups.to(tl.int64) * C
    total = sum_rows(sums + plane * size + c, groups, C, c < C, ROWS, BLOCK_C)
    if plane < TAPS:
        tl.store(dweight + c * TAPS + plane, total, mask=c < C)
    elif NORM:
        sum2 = sum_rows(sums + (TAPS + 1) * size + c, groups, C, c < C, ROWS, BLOCK_C)
        finish_vectors(total, sum2, var, gamma, dmean, dvar, dgamma, dbeta, eps, c, c < C, GAMMA, BETA)


@triton.jit(do_not_specialize=["splits", "groups"])
def finish_matrix_kernel(
    partial,  # (splits, size)
    dweight,  # (size,)
    sums,  # (2, groups, C): sum gp, sum gp * (x - mean)
    var, gamma, dmean, dvar, dgamma, dbeta,  # (C,)
    eps, splits, size, groups, C,
    MATRIX: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,  # elements of a program, and splits that it reads at once
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The first programs sum the weight gradient over its splits, the last ones finish the vectors."""
    matrix = 0
    if MATRIX:
        matrix = tl.cdiv(size, BLOCK)
    if tl.program_id(0) < matrix:
        if MATRIX:
            i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
            tl.store(dweight + i, sum_rows(partial + i, splits, size, i < size, SPLITS, BLOCK), mask=i < size)
    elif NORM:
        c = (tl.program_id(0) - matrix) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        sum1 = sum_rows(sums + c, groups, C, c < C, ROWS, BLOCK_C)
        sum2 = sum_rows(sums + groups.to(tl.int64) * C + c, groups, C, c < C, ROWS, BLOCK_C)
        finish_vectors(sum1, sum2, var, gamma, dmean, dvar, dgamma, dbeta, eps, c, c < C, GAMMA, BETA)


def finish_statistics(stats: Tensor, channels: int, measure: bool) -> tuple[Tensor, Tensor]:
    """mean and var, (C,), from stats (3, groups, C); (0,) without `measure`."""
    mean, var = (stats.new_empty(channels if measure else 0) for _ in range(2))
    if measure:
        launch(
            finish_statistics_kernel, (cdiv(channels, BLOCK_C),), warps=8, stats=stats, mean=mean, var=var,
            groups=stats.shape[1], C=channels, ROWS=_rows(stats.shape[1]), BLOCK_C=BLOCK_C,
        )  # fmt: skip
    return mean, var


def finish_sums(
    sums: Tensor, dweight: Tensor, norm: dict[str, Any], eps: float, taps: int, need_input: bool,
    need_weight: bool,
) -> list[Tensor]:  # fmt: skip
    """Fills dweight (C, taps); returns dmean, dvar, dgamma, dbeta, from sums (taps + 2, groups, C)."""
    _, groups, channels = sums.shape
    grads = vector_grads(sums, norm, channels, need_input)
    planes = taps * need_weight + (need_input and norm["NORM"])
    if planes:
        launch(
            finish_sums_kernel, (cdiv(channels, BLOCK_C), planes), warps=8, sums=sums, dweight=dweight,
            eps=eps, groups=groups, C=channels, TAPS=taps, FIRST=0 if need_weight else taps,
            ROWS=_rows(groups), BLOCK_C=BLOCK_C, **_finished(norm, grads),
        )  # fmt: skip
    return grads


def finish_matrix(
    partial: Tensor | None, dweight: Tensor, sums: Tensor | None, norm: dict[str, Any], eps: float,
    like: Tensor, channels: int,
) -> list[Tensor]:  # fmt: skip
    """Fills dweight from partial (splits, size); returns dmean, dvar, dgamma, dbeta from sums (2, groups, C).
    """
    grads = vector_grads(like, norm, channels, sums is not None)
    splits, size = (1, 1) if partial is None else (partial.shape[0], dweight.numel())
    groups = 1 if sums is None else sums.shape[1]
    block = 32 if size < LARGE else 128
    programs = cdiv(size, block) * (partial is not None) + cdiv(channels, BLOCK_C) * (sums is not None)
    if programs:
        arguments = _finished(norm, grads) | dict(NORM=sums is not None)
        launch(
            finish_matrix_kernel, (programs,), warps=8, partial=partial, dweight=dweight, sums=sums, eps=eps,
            splits=splits, size=size, groups=groups, C=channels, MATRIX=partial is not None, BLOCK=block,
            SPLITS=min(AT_ONCE // block, triton.next_power_of_2(splits)), ROWS=_rows(groups), BLOCK_C=BLOCK_C,
            **arguments,
        )  # fmt: skip
    return grads


def _finished(norm: dict[str, Any], grads: Sequence[Tensor]) -> dict[str, Any]:
    """What finish_vectors reads and writes."""
    read = {name: norm[name] for name in ("var", "gamma", "NORM", "GAMMA", "BETA")}
    return read | dict(zip(("dmean", "dvar", "dgamma", "dbeta"), grads))


def vector_grads(like: Tensor, norm: dict[str, Any], channels: int, need_input: bool) -> list[Tensor]:
    """Where the gradients of mean, var, gamma, beta go: (C,), or (0,) of one that is not given or not needed.
    """
    given = (norm[name] is not None for name in ("mean", "var", "gamma", "beta"))
    return [like.new_empty(channels if need_input and there else 0, dtype=torch.float32) for there in given]


def _rows(groups: int) -> int:
    return max(16, min(MOST_ROWS, triton.next_power_of_2(groups)))
