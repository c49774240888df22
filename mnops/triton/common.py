"""What the kernels share: a pending norm and an incoming gradient applied on load, tiles of a matrix of
pixels x channels, statistics on store.

Every kernel sees channels_last memory: element (n, c, h, w) of a (N, C, H, W) tensor is at
((n * H + h) * W + w) * C + c, with 64-bit offsets. Half precision is computed in fp32, and rounded where a
tensor is stored.
"""

import os

import triton
import triton.language as tl

NONE, RELU, RELU6, HARDSWISH, SILU = (tl.constexpr(i) for i in range(5))
ACTS = {"none": 0, "relu": 1, "relu6": 2, "hardswish": 3, "silu": 4}

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


# ---- in kernels ----


@triton.jit
def to_float(x):
    """x in fp32. bf16 by hand, two to a register: one instruction each, where the compiler takes two."""
    if x.dtype == tl.bfloat16 and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r", [x], tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x (fp32) as it is stored in dtype, and that value in fp32 again."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
            "=r,=r,=r,r,r", [x], (tl.bfloat16, tl.float32), is_pure=True, pack=2,
        )
    else:
        stored = x.to(dtype)
        return stored, stored.to(tl.float32)


@triton.jit
def activation(p, ACT: tl.constexpr):
    """act(p). A NaN stays one, as in torch."""
    if ACT == RELU:
        p = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == RELU6:
        p = tl.clamp(p, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == HARDSWISH:
        p = p * tl.clamp(p + 3.0, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / 6.0)
    elif ACT == SILU:
        p = p * tl.sigmoid(p)
    return p


@triton.jit
def activation_backward(gz, p, z, ACT: tl.constexpr):
    """gz * act'(p), z = act(p); at a kink what torch takes there."""
    if ACT == RELU:  # from z, so that p need not be kept
        gz = tl.where(z > 0.0, gz, 0.0)
    elif ACT == RELU6:
        gz = tl.where((z > 0.0) & (z < 6.0), gz, 0.0)
    elif ACT == HARDSWISH:
        gz = gz * tl.where(p <= -3.0, 0.0, tl.where(p < 3.0, p * (1.0 / 3.0) + 0.5, 1.0))
    elif ACT == SILU:
        s = tl.sigmoid(p)
        gz = gz * s * (1.0 + p * (1.0 - s))
    return gz


@triton.jit
def block_channels(block, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of a block, [1, BLOCK_C], and which of them there are."""
    i = tl.arange(0, BLOCK_C)[None, :]
    c = block * BLOCK_C + i
    return c, c < C if C % BLOCK_C else i >= 0  # what is always true costs nothing


@triton.jit
def share(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which of how many shares of the pixels this program has, its channels, and which of them there are.

    Blocks of channels are innermost: programs that read the same pixels run side by side, and share them in
    L2.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    c, c_ok = block_channels(tl.program_id(0) % blocks, C, BLOCK_C)
    return tl.program_id(0) // blocks, tl.num_programs(0) // blocks, c, c_ok


@triton.jit
def channel_norm(
    mean, var, gamma, beta, eps, c, c_ok, NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """mean, scale and shift of the channels c, for `normalise`."""
    m = tl.zeros(c.shape, tl.float32)
    scale = tl.full(c.shape, 1.0, tl.float32)
    shift = tl.zeros(c.shape, tl.float32)
    if NORM:
        m = tl.load(mean + c, mask=c_ok, other=0.0)
        scale = 1.0 / tl.sqrt_rn(tl.load(var + c, mask=c_ok, other=1.0) + eps)
        if GAMMA:
            scale = scale * tl.load(gamma + c, mask=c_ok, other=0.0)
        if BETA:
            shift = tl.load(beta + c, mask=c_ok, other=0.0)
        if dtype != tl.float32:
            shift = shift - m * scale
    return m, scale, shift


@triton.jit
def normalise(x, ok, m, scale, shift, NORM: tl.constexpr, ACT: tl.constexpr):
    """z of the stored x, 0 where not ok, where x was loaded as 0; every act(0) is 0. ok None: it does not
    matter.

    fp32 subtracts the mean first: |mean| / std may be 1000. In half precision that ratio has cost x its
    digits already, and one FMA serves: shift holds beta - mean * scale, and is what the padding takes out.
    """
    if NORM:
        if x.dtype == tl.float32:
            p = (x - m) * scale + shift
            if ok is not None:
                p = tl.where(ok, p, 0.0)
        else:
            if ok is not None:
                shift = tl.where(ok, shift, 0.0)
            p = to_float(x) * scale + shift
    else:
        p = to_float(x)
    return activation(p, ACT)


@triton.jit
def channel_incoming(
    g_mean, g_var, mean_y, values, c, c_ok, GMEAN: tl.constexpr, GVAR: tl.constexpr, FACTOR: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Of the channels c, for `incoming`: gm and gv of gy = g + gm + (y - my) * gv, times FACTOR, and my.

    gm = g_mean / values, gv = 2 g_var / values, values = N * OH * OW; in half precision gm holds gm - gv *
    my.
    """
    gm = tl.zeros(c.shape, tl.float32)
    gv = tl.zeros(c.shape, tl.float32)
    my = tl.zeros(c.shape, tl.float32)
    if GMEAN:
        gm = tl.load(g_mean + c, mask=c_ok, other=0.0) * FACTOR / values
    if GVAR:
        gv = tl.load(g_var + c, mask=c_ok, other=0.0) * (2.0 * FACTOR) / values
        my = tl.load(mean_y + c, mask=c_ok, other=0.0)
        if dtype != tl.float32:
            gm = gm - gv * my
    return gm, gv, my


@triton.jit
def incoming(g, y, ok, gm, gv, my, GMEAN: tl.constexpr, GVAR: tl.constexpr, FACTOR: tl.constexpr):
    """FACTOR * gy, gy = g + g_mean / P + 2 (y - mean_y) g_var / P; 0 where not ok, where g and y were loaded
    as 0.
    """
    gy = to_float(g)
    if FACTOR != 1.0:
        gy = gy * FACTOR
    if GVAR and g.dtype == tl.float32:
        gy += gm + (y - my) * gv
        if ok is not None:
            gy = tl.where(ok, gy, 0.0)
    elif GMEAN or GVAR:
        if ok is not None:
            gm = tl.where(ok, gm, 0.0)
        if GVAR:
            gm = to_float(y) * gv + gm
        gy += gm
    return gy


@triton.jit
def normalise_backward(gz, stored, pre, z, ok, m, scale, NORM: tl.constexpr, ACT: tl.constexpr):
    """gp = gz * act'(pre), gp * (x - mean), dL/dx = gp * gamma * rstd. gp is 0 where not ok; ok None: gz is.
    """
    gp = activation_backward(gz, pre, z, ACT)
    if NORM:
        if ok is not None:
            gp = tl.where(ok, gp, 0.0)
        return gp, gp * (to_float(stored) - m), gp * scale
    else:
        return gp, gp, gp


# ---- vectors that one kernel leaves for another ----


@triton.jit
def store_vectors(folded, c, c_ok, C, first, second, third):
    """Three vectors of channels into (3, C)."""
    tl.store(folded + c, first, mask=c_ok)
    tl.store(folded + C + c, second, mask=c_ok)
    tl.store(folded + 2 * C + c, third, mask=c_ok)


@triton.jit
def load_vectors(folded, c, c_ok, C: tl.constexpr, GIVEN: tl.constexpr):
    """Three vectors of channels from (3, C); without GIVEN nothing that will be used."""
    if GIVEN:
        return (
            tl.load(folded + c, mask=c_ok, other=0.0),
            tl.load(folded + C + c, mask=c_ok, other=0.0),
            tl.load(folded + 2 * C + c, mask=c_ok, other=0.0),
        )
    else:
        return c, c, c


@triton.jit
def store_sums(sums, group, groups, c, c_ok, C: tl.constexpr, sum1, sum2):
    """This program's sums of gp and of gp * (x - mean), [1, BLOCK_C], into (2, groups, C)."""
    tl.store(sums + group * C + c, sum1, mask=c_ok)
    tl.store(sums + (groups + group) * C + c, sum2, mask=c_ok)


@triton.jit
def store_statistics(stats, group, groups, c, c_ok, C: tl.constexpr, count, mean, m2):
    """This program's count, mean and sum of squared deviations, [1, BLOCK_C], into (3, groups, C)."""
    out = stats + group.to(tl.int64) * C + c
    plane = groups.to(tl.int64) * C
    tl.store(out, count + tl.zeros(c.shape, tl.float32), mask=c_ok)
    tl.store(out + plane, mean, mask=c_ok)
    tl.store(out + 2 * plane, m2, mask=c_ok)


# ---- statistics ----


@triton.jit
def merge_statistics(count, mean, m2, n, delta, squares):
    """Count, mean and sum of squared deviations of two sets of values together; delta: the second mean less
    the first.

    Chan, Golub and LeVeque, 1983: no sum of squares that could swallow the variance.
    """
    total = count + n
    share = n / tl.maximum(total, 1.0)
    return total, mean + delta * share, m2 + squares + delta * delta * (count * share)


@triton.jit
def pairs(values):
    """[P, C] in two halves [P / 16, 8, C]: of every two rows that are 8 apart the first and the second.

    A thread holds both where values come from a product. Sums over the pixels stay in such pairs until all tiles
    are added: across threads they cost a shuffle for each channel and tile, more than all the rest of a tile.
    """
    P: tl.constexpr = values.shape[0]
    C: tl.constexpr = values.shape[1]
    return tl.split(tl.permute(tl.reshape(values, [P // 16, 2, 8, C]), (0, 2, 3, 1)))


@triton.jit
def add_pairs(sums, values):
    a, b = pairs(values)
    return sums + a + b


@triton.jit
def sum_pairs(sums):
    """The sums of `add_pairs`, [1, C]."""
    return tl.sum(tl.sum(sums, 0), 0)[None, :]


@triton.jit
def unmeasured(BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """What `measure_tile` keeps: count, a pivot near the values, sums of y - pivot and of its square in pairs."""
    sums = tl.zeros([BLOCK_P // 16, 8, BLOCK_C], tl.float32)
    return 0.0, tl.zeros([1, BLOCK_C], tl.float32), sums, sums


@triton.jit
def measure_tile(values, ok, n, measured):
    """`measured` with the n rows of values that are ok among them.

    The pivot is the mean of the first tile: where |mean| / std is large so is the rounding of sums of y, and in
    those of y - pivot it drops out.
    """
    count, pivot, sum1, sum2 = measured
    if count == 0.0:
        pivot = tl.sum(tl.where(ok, values, 0.0), 0)[None, :] * (1.0 / n)
    a, b = pairs(tl.where(ok, values - pivot, 0.0))
    return count + n, pivot, sum1 + a + b, sum2 + a * a + b * b


@triton.jit
def statistics(measured):
    """Count, mean and sum of squared deviations, [1, C]."""
    count, pivot, sum1, sum2 = measured
    away = sum_pairs(sum1) * (1.0 / count)
    return count, pivot + away, sum_pairs(sum2) - count * away * away


# ---- tiles of a (P, C) matrix ----


@triton.jit
def pixels(tile, P, BLOCK_P: tl.constexpr):
    """The first pixel of a tile (64-bit; within a tile 32 bits do), and how many there are from it on."""
    return tl.cast(tile, tl.int64) * BLOCK_P, P - tl.cast(tile, P.dtype) * BLOCK_P


@triton.jit
def load_tile(x, left, c, c_ok, C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The channels c of the pixels from x on, 0 beyond `left` of them."""
    p = tl.arange(0, BLOCK_P)[:, None]
    return tl.load(x + (p * C + c), mask=(p < left) & c_ok, other=0.0)


@triton.jit
def store_tile(y, values, left, c, c_ok, C: tl.constexpr, BLOCK_P: tl.constexpr):
    p = tl.arange(0, BLOCK_P)[:, None]
    tl.store(y + (p * C + c), values, mask=(p < left) & c_ok)


@triton.jit
def store_measured(y, acc, left, c, c_ok, measured, C: tl.constexpr, BLOCK_P: tl.constexpr, MEASURE: tl.constexpr):
    """Stores acc; returns `measured` with its pixels among them."""
    out, stored = rounded(acc, y.dtype.element_ty)
    store_tile(y, out, left, c, c_ok, C, BLOCK_P)
    if MEASURE:
        n = tl.minimum(left, BLOCK_P).to(tl.float32)
        measured = measure_tile(stored, tl.arange(0, BLOCK_P)[:, None] < left, n, measured)
    return measured


@triton.jit
def incoming_tile(
    g, y, gm, gv, my, left, o, o_ok, O: tl.constexpr, BLOCK_P: tl.constexpr, MASKED: tl.constexpr,
    GMEAN: tl.constexpr, GVAR: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """FACTOR * gy of a tile, in g's dtype for the tensor cores; with MASKED 0 beyond `left` pixels."""
    mine = load_tile(g, left, o, o_ok, O, BLOCK_P)
    if GMEAN or GVAR or FACTOR != 1.0:
        other = mine
        if GVAR:
            other = load_tile(y, left, o, o_ok, O, BLOCK_P)
        ok = None
        if MASKED:
            ok = tl.arange(0, BLOCK_P)[:, None] < left
        return incoming(mine, other, ok, gm, gv, my, GMEAN, GVAR, FACTOR).to(g.dtype.element_ty)
    else:  # from memory to the tensor cores without a register
        return mine


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in fp32."""
    if INTERPRETED:  # its products know no bf16; the factors are exact in fp32
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
