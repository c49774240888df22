"""The backward of pointwise_conv2d, whose file tells what each kernel reads and writes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnops import reference
from mnops.triton import composed, tiles, tune
from mnops.triton.common import (
    ACTS,
    NONE,
    activation,
    add_pairs,
    block_channels,
    incoming_tile,
    load_tile,
    load_vectors,
    normalise,
    normalise_backward,
    pixels,
    product,
    share,
    store_sums,
    store_tile,
    sum_pairs,
)
from mnops.triton.finish import finish_matrix
from mnops.triton.launch import (
    cdiv,
    dither,
    empty_nhwc,
    gpu,
    incoming_arguments,
    launch,
    multiprocessors,
    nhwc,
    norm_arguments,
    precision,
    restored,
)
from mnops.triton.pointwise_conv2d import load_weight, normalised_tile, prepare


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
    NORM: tl.constexpr, ACT: tl.constexpr, GMEAN: tl.constexpr, GVAR: tl.constexpr, FACTOR: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, tiles, c, c_ok = share(C, BLOCK_C)
    keep = KEEP & (tl.program_id(0) % tl.cdiv(C, BLOCK_C) == 0)
    first, left = pixels(tile, P, BLOCK_P)
    gz = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for block in range(tl.cdiv(O, BLOCK_O)):
        o, o_ok = block_channels(block, O, BLOCK_O)
        gm, gv, my = load_vectors(folded, o, o_ok, O, GMEAN or GVAR)
        part = incoming_tile(
            g + first * O, y + first * O, gm, gv, my, left, o, o_ok, O, BLOCK_P, False, GMEAN, GVAR, FACTOR
        )
        if keep:
            store_tile(gy + first * O, part, left, o, o_ok, O, BLOCK_P)
        gz = product(part, load_weight(matrix, o, o_ok, c, c_ok, C), gz, PRECISION)
    m, scale, shift = load_vectors(norm, c, c_ok, C, NORM)
    stored = load_tile(x + first * C, left, c, c_ok, C, BLOCK_P)
    pre = normalise(stored, None, m, scale, shift, NORM, NONE)
    ok = tl.arange(0, BLOCK_P)[:, None] < left  # beyond, gz is not 0
    gp, gp_away, gx = normalise_backward(
        gz * (1.0 / FACTOR), stored, pre, activation(pre, ACT), ok, m, scale, NORM, ACT
    )
    if NORM:
        store_sums(sums, tile, tiles, c, c_ok, C, tl.sum(gp, 0)[None, :], tl.sum(gp_away, 0)[None, :])
    store_tile(dx + first * C, gx.to(dx.dtype.element_ty), left, c, c_ok, C, BLOCK_P)


@triton.jit(do_not_specialize=["P"])
def pointwise_wgrad_kernel(
    g, y,  # (P, O)
    folded,  # (3, O)
    x,  # (P, C)
    norm,  # (3, C)
    partial,  # (splits, O, C)
    P,
    C: tl.constexpr, O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, GMEAN: tl.constexpr, GVAR: tl.constexpr, FACTOR: tl.constexpr,
    KEPT: tl.constexpr,  # g is what dgrad left: FACTOR * gy
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dw, a block a program, over a share of the pixels: split, for few blocks would leave the device idle.
    """
    c_blocks = tl.cdiv(C, BLOCK_C)
    blocks = c_blocks * tl.cdiv(O, BLOCK_O)
    split, splits = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    c, c_ok = block_channels(tl.program_id(0) % c_blocks, C, BLOCK_C)
    o, o_ok = block_channels(tl.program_id(0) % blocks // c_blocks, O, BLOCK_O)
    dw = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for tile in range(split, tl.cdiv(P, BLOCK_P), splits):
        first, left = pixels(tile, P, BLOCK_P)
        gm, gv, my = load_vectors(folded, o, o_ok, O, GMEAN or GVAR)
        part = incoming_tile(
            g + first * O, y + first * O, gm, gv, my, left, o, o_ok, O, BLOCK_P, True, GMEAN, GVAR,
            1.0 if KEPT else FACTOR,
        )  # fmt: skip
        z = normalised_tile(x + first * C, norm, left, c, c_ok, C, BLOCK_P, NORM, ACT)
        dw = product(tl.trans(part), z, dw, PRECISION)
    out = partial + split.to(tl.int64) * (O * C) + tl.trans(o) * C + c
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
    NORM: tl.constexpr, ACT: tl.constexpr, GMEAN: tl.constexpr, GVAR: tl.constexpr, FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dgrad and wgrad of the same pixels, all channels in one block each: every tensor is read once."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    c, c_ok = block_channels(0, C, BLOCK_C)
    o, o_ok = block_channels(0, O, BLOCK_O)
    w = load_weight(matrix, o, o_ok, c, c_ok, C)
    sum1 = tl.zeros([BLOCK_P // 16, 8, BLOCK_C], tl.float32)
    sum2 = tl.zeros([BLOCK_P // 16, 8, BLOCK_C], tl.float32)
    dw = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for tile in range(program, tl.cdiv(P, BLOCK_P), programs):
        first, left = pixels(tile, P, BLOCK_P)
        gm, gv, my = load_vectors(folded, o, o_ok, O, GMEAN or GVAR)
        part = incoming_tile(
            g + first * O, y + first * O, gm, gv, my, left, o, o_ok, O, BLOCK_P, True, GMEAN, GVAR, FACTOR
        )
        stored = load_tile(x + first * C, left, c, c_ok, C, BLOCK_P)
        m, scale, shift = load_vectors(norm, c, c_ok, C, NORM)
        pre = normalise(stored, None, m, scale, shift, NORM, NONE)
        z = activation(pre, ACT)
        # dw first: its operands end in shared memory before gz takes registers (178, not 255, at 128 x 128 on 9.0)
        dw = product(tl.trans(part), z.to(x.dtype.element_ty), dw, PRECISION)
        gz = product(part, w, None, PRECISION)
        gp, gp_away, gx = normalise_backward(gz * (1.0 / FACTOR), stored, pre, z, None, m, scale, NORM, ACT)
        if NORM:
            sum1 = add_pairs(sum1, gp)
            sum2 = add_pairs(sum2, gp_away)
        store_tile(dx + first * C, gx.to(dx.dtype.element_ty), left, c, c_ok, C, BLOCK_P)
    out = partial + program.to(tl.int64) * (O * C) + tl.trans(o) * C + c
    tl.store(out, dw * (1.0 / FACTOR), mask=tl.trans(o_ok) & c_ok)
    if NORM:
        store_sums(sums, program, programs, c, c_ok, C, sum_pairs(sum1), sum_pairs(sum2))


# ---- host ----


def pointwise_conv2d_backward(
    g: Tensor, g_mean: Tensor | None, g_var: Tensor | None, y: Tensor, mean_y: Tensor, x: Tensor,
    weight: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, act: str, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    args = g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act
    if x.dtype == torch.float64 or x.numel() == 0 or not (need_input or need_weight):
        return reference.pointwise_conv2d_backward(*args, need_input, need_weight)
    if composed.better(x):
        return composed.backward(*args, (1, 1), (0, 0, 0, 0), (1, 1), need_input, need_weight)
    args = *args, need_input, need_weight
    out, channels = weight.shape[:2]
    both = need_input and need_weight
    candidates = tiles.pointwise_backward(channels, out, x.element_size(), both, gpu(x.device))
    shape = x.dtype, *x.shape[1:], out, need_input, need_weight
    return backward(
        *args, tune.best(
            "pointwise_conv2d_backward", shape, x, candidates, lambda tile: backward(*args, tile)
        )
    )


def backward(
    g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act, need_input, need_weight,
    tile: tiles.Block | tiles.Both,
):  # fmt: skip
    n, channels, height, width = x.shape
    out, count = weight.shape[0], n * height * width
    mp, factor = multiprocessors(x.device), dither(g, g_mean, g_var)
    given = norm_arguments(mean, var, gamma, beta)
    incoming = incoming_arguments(g, g_mean, g_var, y, mean_y)
    per_channel = (incoming.pop(name) for name in ("g_mean", "g_var", "mean_y"))
    matrix, norm, folded = prepare(x, weight, given, eps, *per_channel, factor, count)
    common = dict(
        folded=folded, x=nhwc(x), norm=norm, P=count, C=channels, O=out, NORM=mean is not None, ACT=ACTS[act],
        FACTOR=factor, PRECISION=precision(x),
    )  # fmt: skip
    dx = empty_nhwc(x, x.shape) if need_input else x.new_empty(0)
    dweight = torch.empty(weight.shape if need_weight else 0, dtype=weight.dtype, device=x.device)
    partial = sums = None
    if isinstance(tile, tiles.Block):
        # As many as are resident, no more: each keeps a dw of its own.
        groups = min(cdiv(count, tile.pixels), mp * 8 // tile.warps)
        sums = x.new_empty((2, groups, channels), dtype=torch.float32)
        partial = x.new_empty((groups, out, channels), dtype=torch.float32)
        launch(
            pointwise_backward_kernel, (groups,), warps=tile.warps, stages=tile.stages, matrix=matrix, dx=dx,
            sums=sums, partial=partial, BLOCK_P=tile.pixels, BLOCK_C=tile.columns, BLOCK_O=tile.depth,
            **common, **incoming,
        )  # fmt: skip
    else:
        dgrad, wgrad = tile
        kept = need_input and need_weight and bool(folded.numel())
        if need_input:
            gy = torch.empty_like(incoming["g"]) if kept else incoming["g"]
            groups = cdiv(count, dgrad.pixels)
            sums = x.new_empty((2, groups, channels), dtype=torch.float32)
            launch(
                pointwise_dgrad_kernel, (groups * cdiv(channels, dgrad.columns),), warps=dgrad.warps,
                stages=dgrad.stages, matrix=matrix, dx=dx, gy=gy, sums=sums, BLOCK_P=dgrad.pixels,
                BLOCK_C=dgrad.columns, BLOCK_O=dgrad.depth, KEEP=kept, **common, **incoming,
            )  # fmt: skip
            if kept:
                incoming = dict(g=gy, y=gy, GMEAN=False, GVAR=False)
        if need_weight:
            blocks = cdiv(out, wgrad.columns) * cdiv(channels, wgrad.depth)
            splits = max(1, min(cdiv(count, 4 * wgrad.pixels), mp // blocks))  # one program a multiprocessor
            partial = x.new_empty((splits, out, channels), dtype=torch.float32)
            launch(
                pointwise_wgrad_kernel, (splits * blocks,), warps=wgrad.warps, stages=wgrad.stages,
                partial=partial, BLOCK_P=wgrad.pixels, BLOCK_O=wgrad.columns, BLOCK_C=wgrad.depth, KEPT=kept,
                **common, **incoming,
            )  # fmt: skip
    sums = sums if mean is not None else None
    vector_grads = finish_matrix(partial, dweight, sums, given, eps, x, channels)
    return restored(dx, x) if need_input else dx, dweight, *vector_grads
