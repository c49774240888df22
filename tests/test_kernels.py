"""The CPU kernels of every built instruction set that this CPU has, by mnops._C, against plain NumPy in fp64.

No torch: under emulation, where importing torch takes half a minute, run it with pytest --noconftest. The
references are the equations of each op's docstring, written tap by tap and pixel by pixel.
"""

import dataclasses
import importlib.machinery
import importlib.util
import itertools
import pathlib

import numpy as np
import pytest


def _native():
    """mnops._C without importing mnops, which needs torch."""
    package = pathlib.Path(importlib.util.find_spec("mnops").origin).parent
    spec = importlib.machinery.PathFinder.find_spec("_C", [str(package)])
    if spec is None:
        pytest.skip("mnops was not built", allow_module_level=True)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


C = _native()
ACTS = ("none", "relu", "relu6", "hardswish", "silu")
# One rounding of a stored value, and of a value computed in the arithmetic type, with room for a few of them.
STORED = {"float32": 2e-6, "float64": 1e-13, "float16": 2.0**-10, "bfloat16": 2.0**-7}
COMPUTED = {"float32": 2e-6, "float64": 1e-13, "float16": 2e-6, "bfloat16": 2e-6}
# Of a sum of products whose factors are rounded to bf16 first: an error in fp32 may round one the other way.
OF_ROUNDED = 2e-5

RUNS = {c["name"]: c["built"] and c["supported"] for c in C.cpu_capabilities()}
VARIANTS = [
    pytest.param(
        (v["instruction_set"], v["dtype"]),
        id=f"{v['instruction_set']}-{v['dtype']}",
        marks=() if RUNS[v["instruction_set"]] else pytest.mark.skip(reason="this CPU does not have it"),
    )
    for v in C.kernel_variants()
]  # fmt: skip


# ---------------------------------------------------------------- storage


def stored(a, dtype):
    """The array as the kernels take it: bfloat16 as uint16 bits, rounded to nearest even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(a, dtype=dtype)
    bits = np.ascontiguousarray(a, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def wide(a):
    if a.dtype == np.uint16:
        a = (a.astype(np.uint32) << 16).view(np.float32)
    return a.astype(np.float64)


def rms(a):
    return float(np.sqrt(np.mean(np.square(a)))) if np.size(a) else 0.0


def close(got, true, tolerance, what, scale=None):
    """`scale` is the size of what was summed, where the terms may cancel."""
    got = wide(got)
    assert got.shape == true.shape, f"{what}: {got.shape} for {true.shape}"
    assert np.isfinite(got).all(), f"{what} is not finite"
    error, allowed = rms(got - true), tolerance * rms(true if scale is None else scale) + 1e-30
    assert error <= allowed, f"{what} is off by {error:.3g}, allowed {allowed:.3g}"


# ---------------------------------------------------------------- references


def activate(act, p):
    if act == "relu":
        return np.maximum(p, 0)
    if act == "relu6":
        return np.clip(p, 0, 6)
    if act == "hardswish":
        return p * np.clip(p + 3, 0, 6) / 6
    if act == "silu":
        return p / (1 + np.exp(-p))
    return p


def slope(act, p):
    if act == "relu":
        return (p > 0) * 1.0
    if act == "relu6":
        return ((p > 0) & (p < 6)) * 1.0
    if act == "hardswish":
        return np.where(p < -3, 0, np.where(p > 3, 1, p / 3 + 0.5))
    if act == "silu":
        s = 1 / (1 + np.exp(-p))
        return s * (1 + p * (1 - s))
    return np.ones_like(p)


class Norm:
    """A pending norm: what the kernels take and what they should make of it."""

    def __init__(self, rng, channels, act, dtype, identity=False):
        self.arithmetic = np.float64 if dtype == "float64" else np.float32
        mean, var = rng.normal(size=channels), rng.uniform(0.5, 2, channels)
        gamma, beta = rng.normal(size=channels), rng.normal(size=channels) * 0.5
        vectors = [None] * 4 if identity else [v.astype(self.arithmetic) for v in (mean, var, gamma, beta)]
        self.given = dict(zip(("mean", "var", "gamma", "beta"), vectors, strict=True)) | {
            "eps": 1e-3,
            "act": act,
        }
        one, nil = np.ones(channels), np.zeros(channels)
        self.mean, var, self.gamma, self.beta = (
            instead if v is None else v.astype(np.float64)
            for v, instead in zip(vectors, (nil, one, one, nil), strict=True)
        )
        self.rstd = one if identity else (var + 1e-3) ** -0.5
        self.act = act

    def pre(self, x):
        return (x - self.mean) * self.rstd * self.gamma + self.beta

    def z(self, x):
        return activate(self.act, self.pre(x))

    def backward(self, gz, x):
        """dx, (dmean, dvar, dgamma, dbeta) and the sizes of the sums behind these."""
        gp = gz * slope(self.act, self.pre(x))
        axes = tuple(range(x.ndim - 1))
        hat = (x - self.mean) * self.rstd
        vectors = []
        for total in (lambda t: t.sum(axes), lambda t: np.abs(t).sum(axes)):
            dbeta, dgamma = total(gp), total(gp * hat)
            vectors.append(
                (-self.gamma * self.rstd * dbeta, -0.5 * self.gamma * self.rstd**2 * dgamma, dgamma, dbeta)
            )
        return gp * self.gamma * self.rstd, *vectors


def incoming(g, y, g_mean, g_var, mean, count):
    return g + g_mean / count + 2 * (y - mean) * g_var / count


@dataclasses.dataclass(frozen=True)
class Shape:
    label: str
    n: int
    h: int
    w: int
    c: int
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    padding: tuple = (1, 1, 1, 1)
    dilation: tuple = (1, 1)

    def __str__(self):
        return self.label

    def taps(self):
        """For each tap: its index, the padded input positions that it reads."""
        for ky, kx in itertools.product(range(self.kernel[0]), range(self.kernel[1])):
            rows, columns = (
                slice(start, start + (count - 1) * stride + 1, stride)
                for start, count, stride in (
                    (ky * self.dilation[0], self.ho, self.stride[0]),
                    (kx * self.dilation[1], self.wo, self.stride[1]),
                )
            )
            yield (ky, kx), np.s_[:, rows, columns]

    @property
    def ho(self):
        return (self.h + sum(self.padding[:2]) - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[
            0
        ] + 1

    @property
    def wo(self):
        return (self.w + sum(self.padding[2:]) - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[
            1
        ] + 1

    @property
    def arguments(self):
        return {"stride": self.stride, "padding": list(self.padding), "dilation": self.dilation}


def square(k, stride=1, padding=None, dilation=1):
    padding = dilation * (k - 1) // 2 if padding is None else padding
    return {"kernel": (k, k), "stride": (stride,) * 2, "padding": (padding,) * 4, "dilation": (dilation,) * 2}


SHAPES = (
    Shape("plain", 2, 14, 14, 16),
    Shape("one pixel", 3, 1, 1, 16),
    Shape("one row", 1, 1, 19, 16),
    Shape("one column", 1, 19, 1, 16),
    Shape("odd width", 1, 6, 23, 24),
    Shape("wide", 1, 5, 66, 32),
    Shape("channels 1", 2, 9, 8, 1),
    Shape("channels 13", 1, 8, 9, 13),
    Shape("channels 200", 1, 5, 5, 200),
    Shape("channels 531", 1, 4, 5, 531),
    Shape("stride 2 even", 1, 14, 16, 16, **square(3, 2)),
    Shape("stride 2 odd", 1, 15, 13, 24, **square(3, 2)),
    Shape("stride 2 same", 1, 14, 12, 16, (3, 3), (2, 2), (0, 1, 0, 1)),
    Shape("stride 3", 1, 11, 13, 8, **square(3, 3)),
    Shape("stride 1 x 2", 1, 9, 12, 8, (3, 3), (1, 2)),
    Shape("one-sided", 1, 8, 9, 16, (3, 3), (1, 1), (0, 2, 1, 0)),
    Shape("no padding", 1, 8, 21, 16, **square(3, padding=0)),
    Shape("padding wider than the kernel", 1, 4, 4, 8, **square(3, padding=4)),
    Shape("dilation 2", 1, 11, 12, 16, **square(3, dilation=2)),
    Shape("dilation 3 stride 2", 1, 11, 12, 8, **square(3, 2, dilation=3)),
    Shape("5x5", 1, 9, 18, 16, **square(5)),
    Shape("5x5 stride 2", 1, 10, 19, 16, **square(5, 2)),
    Shape("7x7", 1, 9, 18, 16, **square(7)),
    Shape("7x7 stride 2", 1, 10, 9, 8, **square(7, 2)),
    Shape("3x5", 1, 8, 9, 8, (3, 5), (1, 1), (1, 1, 2, 2)),
    Shape("1x1", 1, 5, 6, 12, **square(1)),
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def draw(rng, shape, dtype):
    """A stored tensor, every channel with a mean and a deviation of its own, and what it means."""
    channels = shape[-1]
    a = stored(rng.normal(size=shape) * rng.uniform(0.5, 2, channels) + rng.normal(size=channels), dtype)
    return a, wide(a)


def arithmetic(a, dtype):
    a = a.astype(np.float64 if dtype == "float64" else np.float32)
    return a, wide(a)


def check_measured(y, mean, var, dtype):
    y = wide(y).reshape(-1, y.shape[-1])
    close(mean, y.mean(0), COMPUTED[dtype], "mean", np.abs(y).mean(0))
    close(var, y.var(0), 4 * COMPUTED[dtype], "var", y.var(0) + COMPUTED[dtype] * np.square(y).mean(0))


def check_vectors(got, true, sizes, tolerance):
    for name, g, t, size in zip(("dmean", "dvar", "dgamma", "dbeta"), got, true, sizes, strict=True):
        close(g, t, 8 * tolerance, name, size)


def check_depthwise(rng, isa, dtype, shape, act, identity=False):
    x, xw = draw(rng, (shape.n, shape.h, shape.w, shape.c), dtype)
    w, ww = arithmetic(rng.normal(size=(shape.c, *shape.kernel)), dtype)
    norm = Norm(rng, shape.c, act, dtype, identity)
    edges = ((0, 0), tuple(shape.padding[:2]), tuple(shape.padding[2:]), (0, 0))

    y, mean, var = C.depthwise_conv2d(isa, x, w, norm.given, **shape.arguments)
    z = np.pad(norm.z(xw), edges)
    true = sum(z[at] * ww[:, ky, kx] for (ky, kx), at in shape.taps())
    close(y, true, STORED[dtype], "y")
    check_measured(y, mean, var, dtype)
    again = C.depthwise_conv2d(isa, x, w, norm.given, **shape.arguments, measure=False)
    assert np.array_equal(again[0], y) and again[1] is None, "measuring changes y"

    g, gw = draw(rng, y.shape, dtype)
    g_mean, g_mean_w = arithmetic(rng.normal(size=shape.c), dtype)
    g_var, g_var_w = arithmetic(rng.normal(size=shape.c), dtype)
    got = C.depthwise_conv2d_backward(isa, g, y, g_mean, g_var, mean, x, w, norm.given, **shape.arguments)
    gy = incoming(gw, wide(y), g_mean_w, g_var_w, wide(mean), y.size // shape.c)
    gz, dweight, size = np.zeros_like(z), np.zeros_like(ww), np.zeros_like(ww)
    for (ky, kx), at in shape.taps():
        gz[at] += gy * ww[:, ky, kx]
        dweight[:, ky, kx] = (gy * z[at]).sum((0, 1, 2))
        size[:, ky, kx] = np.abs(gy * z[at]).sum((0, 1, 2))
    (top, _), (left, _) = edges[1:3]
    dx, vectors, sizes = norm.backward(gz[:, top : top + shape.h, left : left + shape.w], xw)
    close(got[0], dx, STORED[dtype], "dx")
    close(got[1], dweight, 4 * COMPUTED[dtype], "dweight", size)
    check_vectors(got[2:], vectors, sizes, COMPUTED[dtype])


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_depthwise(variant, shape, rng):
    check_depthwise(rng, *variant, shape, act="relu")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_depthwise_activations(variant, act, rng):
    for shape in (
        Shape("", 1, 6, 11, 20),
        Shape("", 1, 7, 12, 20, **square(3, 2)),
        Shape("", 1, 6, 7, 5, **square(4)),
    ):
        check_depthwise(rng, *variant, shape, act)
    check_depthwise(rng, *variant, Shape("", 1, 6, 11, 20), act, identity=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_mean_a_thousand_deviations_away(variant, rng):
    """The variance must survive |mean| / deviation = 1000, up to what the storage keeps of it."""
    isa, dtype = variant
    x = stored(rng.normal(size=(1, 24, 24, 16)) + 1000, dtype)
    w, _ = arithmetic(np.zeros((16, 3, 3)), dtype)
    w[:, 1, 1] = 1
    y, mean, var = C.depthwise_conv2d(isa, x, w, {"act": "none"}, padding=[1, 1, 1, 1])
    assert np.array_equal(y, x)
    check_measured(y, mean, var, dtype)
    close(var, wide(y).var((0, 1, 2)), 1e-4, "var")
    one, _ = arithmetic(np.eye(16), dtype)
    y, mean, var = C.pointwise_conv2d(isa, x.reshape(-1, 16), one, {"act": "none"})
    close(y, wide(x.reshape(-1, 16)), STORED[dtype], "y")
    close(var, wide(y).var(0), 1e-4, "var")


def factors(isa, dtype):
    """What a product does to its factors before it multiplies them, and how exact its sums are."""
    if (isa, dtype) == ("neon_bf16", "bfloat16"):
        return lambda a: wide(stored(a, dtype)), OF_ROUNDED
    return np.asarray, COMPUTED[dtype]


def check_pointwise(rng, isa, dtype, pixels, c, o, act, identity=False):
    factor, tolerance = factors(isa, dtype)
    x, xw = draw(rng, (pixels, c), dtype)
    w, ww = arithmetic(rng.normal(size=(o, c)) / c**0.5, dtype)
    ww = factor(ww)
    norm = Norm(rng, c, act, dtype, identity)
    y, mean, var = C.pointwise_conv2d(isa, x, w, norm.given)
    z = factor(norm.z(xw))
    close(y, z @ ww.T, STORED[dtype], "y", np.abs(z) @ np.abs(ww.T) / c**0.5)
    check_measured(y, mean, var, dtype)
    again = C.pointwise_conv2d(isa, x, w, norm.given, measure=False)
    assert np.array_equal(again[0], y) and again[1] is None, "measuring changes y"

    g, gw = draw(rng, y.shape, dtype)
    g_mean, g_mean_w = arithmetic(rng.normal(size=o), dtype)
    g_var, g_var_w = arithmetic(rng.normal(size=o), dtype)
    got = C.pointwise_conv2d_backward(isa, g, y, g_mean, g_var, mean, x, w, norm.given)
    gy = factor(incoming(gw, wide(y), g_mean_w, g_var_w, wide(mean), pixels))
    dx, vectors, sizes = norm.backward(gy @ ww, xw)
    close(got[0], dx, STORED[dtype], "dx")
    close(got[1], gy.T @ z, 4 * tolerance, "dweight", np.abs(gy.T) @ np.abs(z))
    check_vectors(got[2:], vectors, sizes, tolerance)


@pytest.mark.parametrize("size", [(3, 49, 40, 24), (1, 130, 13, 7), (5, 1, 48, 16)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gate(variant, size, rng):
    (isa, dtype), (n, pixels, c, o) = variant, size
    factor, _ = factors(isa, dtype)
    x, xw = draw(rng, (n * pixels, c), dtype)
    w, ww = arithmetic(rng.normal(size=(o, c)) / c**0.5, dtype)
    gate, gatew = arithmetic(rng.uniform(0.1, 1, (n, c)), dtype)
    norm = Norm(rng, c, "hardswish", dtype)
    y, _, _ = C.pointwise_conv2d(isa, x, w, norm.given, measure=False, gate=gate)
    z = factor(factor(norm.z(xw)) * np.repeat(gatew, pixels, 0))
    close(y, z @ factor(ww).T, STORED[dtype], "y", np.abs(z) @ np.abs(ww.T) / c**0.5)


PIXELS = {
    "plain": (98, 32, 64),
    "one pixel": (1, 32, 16),
    "odd": (45, 13, 7),
    "to 1": (16, 16, 1),
    "from 1": (16, 1, 16),
    "deep": (21, 520, 136),
    "long": (1023, 40, 24),
    "blocks": (600, 1024, 8),
    "wide": (7, 8, 1000),
}


@pytest.mark.parametrize("size", PIXELS.values(), ids=PIXELS.keys())
@pytest.mark.parametrize("variant", VARIANTS)
def test_pointwise(variant, size, rng):
    check_pointwise(rng, *variant, *size, act="relu")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pointwise_activations(variant, act, rng):
    check_pointwise(rng, *variant, 30, 20, 24, act)
    check_pointwise(rng, *variant, 30, 20, 24, act, identity=True)


def check_stem(rng, isa, dtype, shape, o, act, identity=False):
    x, xw = draw(rng, (shape.n, shape.h, shape.w, shape.c), dtype)
    w, ww = arithmetic(rng.normal(size=(o, *shape.kernel, shape.c)), dtype)
    norm = Norm(rng, shape.c, act, dtype, identity)
    edges = ((0, 0), tuple(shape.padding[:2]), tuple(shape.padding[2:]), (0, 0))
    arguments = {"stride": shape.stride, "padding": list(shape.padding)}

    y, mean, var = C.stem_conv2d(isa, x, w, norm.given, **arguments)
    z = np.pad(norm.z(xw), edges)
    true, size = (sum(of(z[at]) @ of(ww[:, ky, kx]).T for (ky, kx), at in shape.taps()) for of in (np.asarray, np.abs))
    close(y, true, STORED[dtype], "y", size)
    check_measured(y, mean, var, dtype)
    again = C.stem_conv2d(isa, x, w, norm.given, **arguments, measure=False)
    assert np.array_equal(again[0], y) and again[1] is None, "measuring changes y"

    g, gw = draw(rng, y.shape, dtype)
    g_mean, g_mean_w = arithmetic(rng.normal(size=o), dtype)
    g_var, g_var_w = arithmetic(rng.normal(size=o), dtype)
    given = (isa, g, y, g_mean, g_var, mean, x, w, norm.given)
    got = C.stem_conv2d_backward(*given, **arguments)
    gy = incoming(gw, wide(y), g_mean_w, g_var_w, wide(mean), y.size // o)
    gz, dweight, size = np.zeros_like(z), np.zeros_like(ww), np.zeros_like(ww)
    for (ky, kx), at in shape.taps():
        gz[at] += gy @ ww[:, ky, kx]
        dweight[:, ky, kx] = np.einsum("nhwo,nhwc->oc", gy, z[at])
        size[:, ky, kx] = np.einsum("nhwo,nhwc->oc", np.abs(gy), np.abs(z[at]))
    (top, _), (left, _) = edges[1:3]
    dx, vectors, sizes = norm.backward(gz[:, top : top + shape.h, left : left + shape.w], xw)
    close(got[0], dx, STORED[dtype], "dx")
    close(got[1], dweight, 4 * COMPUTED[dtype], "dweight", size)
    check_vectors(got[2:], vectors, sizes, COMPUTED[dtype])
    alone = C.stem_conv2d_backward(*given, **arguments, need_input=False)
    close(alone, dweight, 4 * COMPUTED[dtype], "dweight without dx", size)


STEMS = (
    Shape("colours", 2, 18, 22, 3, **square(3, 2)),
    Shape("colours same", 1, 14, 12, 3, (3, 3), (2, 2), (0, 1, 0, 1)),
    Shape("stride 1", 1, 9, 11, 3, **square(3)),
    Shape("one pixel", 2, 1, 1, 3, **square(3, 2)),
    Shape("one row", 1, 1, 19, 3, **square(3, 2)),
    Shape("grey 7x7", 1, 13, 16, 1, **square(7, 2)),
    Shape("four channels 5x5", 1, 11, 9, 4, **square(5)),
    Shape("sixteen channels 2x2", 1, 6, 8, 16, **square(2, 2, padding=0)),
    Shape("one-sided 3x5 stride 2 x 3", 1, 10, 23, 5, (3, 5), (2, 3), (0, 2, 3, 1)),
    Shape("padding wider than the kernel", 1, 3, 4, 3, **square(3, 2, padding=4)),
)


@pytest.mark.parametrize("shape", STEMS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_stem(variant, shape, rng):
    for o in (5, 32):
        check_stem(rng, *variant, shape, o, "none", identity=True)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_stem_activations(variant, act, rng):
    check_stem(rng, *variant, STEMS[0], 20, act)


def check_separable(rng, isa, dtype, shape, o, act, mid_act, expanded_from=0):
    x, xw = draw(rng, (shape.n, shape.h, shape.w, expanded_from or shape.c), dtype)
    expand = {}
    if expanded_from:
        first, firstw = arithmetic(rng.normal(size=(shape.c, expanded_from)) / expanded_from**0.5, dtype)
        on_x = Norm(rng, expanded_from, "relu", dtype)
        factor, _ = factors(isa, dtype)
        expand, xw = {"expand_weight": first, "on_x": on_x.given}, factor(on_x.z(xw)) @ factor(firstw).T
    taps, tapsw = arithmetic(rng.normal(size=(shape.c, *shape.kernel)), dtype)
    w, ww = arithmetic(rng.normal(size=(o, shape.c)), dtype)
    norm, mid = Norm(rng, shape.c, act, dtype), Norm(rng, shape.c, mid_act, dtype)
    y = C.separable_conv2d(isa, x, taps, norm.given, mid.given, w, **shape.arguments, **expand)
    edges = ((0, 0), tuple(shape.padding[:2]), tuple(shape.padding[2:]), (0, 0))
    z = np.pad(norm.z(xw), edges)
    between = sum(z[at] * tapsw[:, ky, kx] for (ky, kx), at in shape.taps())
    true, size = mid.z(between) @ ww.T, np.abs(mid.z(between)) @ np.abs(ww.T)
    # the terms of one sum are themselves sums, whose mean the norm takes away again
    close(y, true, STORED[dtype] + 16 * COMPUTED[dtype], "y", size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_separable(variant, shape, rng):
    # few outputs and pixels take the path of few pixels, many channels that of many: both are met
    for o in (5, 40):
        check_separable(rng, *variant, shape, o, "relu", "relu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_inverted_residual(variant, shape, rng):
    for k, o in ((3, 24), (40, 5)):
        check_separable(rng, *variant, shape, o, "relu6", "relu6", expanded_from=k)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_separable_activations(variant, act, rng):
    check_separable(rng, *variant, Shape("plain", 1, 7, 9, 24), 37, "none", act)
    check_separable(rng, *variant, Shape("plain", 2, 7, 9, 24), 37, act, "none", expanded_from=8)
    check_separable(rng, *variant, Shape("weights larger than pixels", 1, 5, 4, 72, **square(3, 2)), 50, act, "relu")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("size", [(2, 49, 16), (1, 1, 8), (3, 5, 13), (1, 130, 37)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_norm_act_and_pool(variant, size, act, rng):
    isa, dtype = variant
    x, xw = draw(rng, size, dtype)
    norm = Norm(rng, size[2], act, dtype)
    z = norm.z(xw)
    close(C.norm_act(isa, x, norm.given), z, STORED[dtype], "z")
    residual, residual_w = draw(rng, size, dtype)
    close(C.norm_act(isa, x, norm.given, residual), z + residual_w, STORED[dtype], "z + residual", np.abs(z))
    close(C.norm_act_pool(isa, x, norm.given), z.mean(1), STORED[dtype], "pooled", np.abs(z).mean(1))

    g, gw = draw(rng, size, dtype)
    pooled, pooled_w = draw(rng, (size[0], size[2]), dtype)
    spread = np.repeat(pooled_w[:, None] / size[1], size[1], axis=1)
    for got, gz in ((C.norm_act_backward(isa, g, x, norm.given), gw),
                    (C.norm_act_pool_backward(isa, pooled, x, norm.given), spread)):  # fmt: skip
        dx, vectors, sizes = norm.backward(gz, xw)
        close(got[0], dx, STORED[dtype], "dx")
        check_vectors(got[1:], vectors, sizes, COMPUTED[dtype])


@pytest.mark.parametrize("variant", VARIANTS)
def test_storage_rounds_to_nearest_even_and_keeps_nan_and_infinity(variant, rng):
    isa, dtype = variant
    values = np.concatenate(
        [rng.normal(size=200), [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-8, 6e-5, 65504, 1 + 2.0**-9]]
    )
    values = values[:, None] * np.ones((1, 5))
    with np.errstate(over="ignore"):
        x, (gamma, _) = stored(values, dtype), arithmetic(np.array([1, -1, 1.001, 0.5, 3.0]), dtype)
        z = C.norm_act(isa, x[None], {"gamma": gamma, "act": "none"})[0]
        expected = wide(stored(wide(x).astype(gamma.dtype) * gamma, dtype))
    with np.errstate(invalid="ignore"):
        assert np.array_equal(np.isnan(wide(z)), np.isnan(expected))
        assert np.array_equal(np.nan_to_num(wide(z)), np.nan_to_num(expected))


def test_forcing_an_instruction_set():
    for capability in C.cpu_capabilities():
        if not (capability["built"] and capability["supported"]):
            with pytest.raises(RuntimeError, match=capability["name"]):
                C.norm_act(capability["name"], np.zeros((1, 1, 1), np.float32), {})
    with pytest.raises(RuntimeError, match="must be one of scalar, .*got mmx"):
        C.norm_act("mmx", np.zeros((1, 1, 1), np.float32), {})
