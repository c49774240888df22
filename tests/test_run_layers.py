"""run_layers: every kind of layer, and programs of them that are drawn, against the reference and stock PyTorch."""

import functools
import random

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact
from cases import ACTS, DTYPES, vectors
from test_ops import STOCK_ACTS, multiplies_bf16
from torch.utils.flop_counter import FlopCounterMode

import mnops
from mnops import Pending, ops, reference
from mnops.ops import _register
from mnops.ops.run_layers import Layers, run_layers

NAMESPACES = ("mnops", "mnops_reference")
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])


class Program:
    """Layers to be: of each its kind, the values that it reads and what else `Layers` takes; an int there that
    follows "t" is the index of a tensor."""

    def __init__(self, *shapes, layout=torch.channels_last, dtype=torch.float32, weight=None):
        self.dtype, self.weight_dtype = dtype, weight or dtype
        self.inputs = [torch.randn(s).to(dtype).contiguous(memory_format=layout) for s in shapes]
        self.tensors, self.steps, self.shapes = [], [], list(shapes)

    def _tensor(self, t):
        self.tensors.append(t)
        return len(self.inputs) + len(self.tensors) - 1

    def _step(self, kind, x, tensors, rest, shape):
        self.steps.append((kind, x, tensors, rest))
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def conv(self, kind, x, out=4, kernel=3, stride=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1)):
        n, channels, *size = self.shapes[x]
        shape = {"depthwise": (channels, 1), "pointwise": (out, channels), "stem": (out, channels)}[kind]
        if kind == "pointwise":
            kernel, rest = 1, ()
        else:
            reach = [d * (kernel - 1) + 1 for d in dilation]
            size = [(s + a + b - r) // t + 1 for s, a, b, r, t in zip(size, padding[::2], padding[1::2], reach, stride)]
            rest = (stride, padding, dilation) if kind == "depthwise" else (stride, padding)
        weight = torch.randn(*shape, kernel, kernel) / (shape[1] * kernel * kernel) ** 0.5
        return self._step(kind, x, (self._tensor(weight.to(self.weight_dtype)),), rest, (n, shape[0], *size))

    def gated(self, x, gate, gating, out=5):
        y = self.conv("pointwise", x, out)
        self.steps[-1] = *self.steps[-1][:3], (gate, gating)
        return y

    def norm(self, x, have="mean var weight bias", act="relu", eps=1e-3, half=False):
        drawn = dict(zip(("mean", "var", "weight", "bias"), vectors(self.shapes[x][1], self.dtype, "cpu")))
        dtype = self.dtype if half else reference.wide(self.inputs[0])
        tensors = tuple(self._tensor(v.to(dtype)) if name in have.split() else None for name, v in drawn.items())
        return self._step("norm", x, tensors, (eps, act), self.shapes[x])

    def sum(self, x, other):
        return self._step("sum", x, (), (other,), self.shapes[x])

    def pool(self, x):
        return self._step("pool", x, (), (), (*self.shapes[x][:2], 1, 1))

    def all_tensors(self):
        return [*self.inputs, *self.tensors]

    def layers(self, tensors):
        layers = Layers(len(self.inputs))
        for kind, x, indices, rest in self.steps:
            getattr(layers, kind)(x, *(i if i is None else tensors[i] for i in indices), *rest)
        return layers

    def run(self, results, *tensors):
        inputs = tensors[: len(self.inputs)]
        found = run_layers(inputs, self.layers(tensors), results)
        assert all(y.is_contiguous(memory_format=torch.channels_last) for y in found)
        return {f"value {i}": y for i, y in zip(results, found)}

    def by_reference(self, results, *tensors):
        with mnops.backend("reference"):
            return self.run(results, *tensors)

    def stock(self, results, *tensors):
        """Layer by layer, each result stored."""
        values = list(tensors[: len(self.inputs)])
        for kind, x, indices, rest in self.steps:
            x, given = values[x], [i if i is None else tensors[i] for i in indices]
            if kind == "norm":
                mean, var, weight, bias = given
                if mean is not None:
                    x = F.batch_norm(x, mean, var, weight, bias, False, 0.0, rest[0])
                elif bias is not None:
                    x = x + bias.to(x)[:, None, None]
                y = STOCK_ACTS[rest[1]](x)
            elif kind == "sum":
                y = x + values[rest[0]]
            elif kind == "pool":
                y = F.adaptive_avg_pool2d(x, 1)
            elif kind == "pointwise":
                if rest:
                    x = x * {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}[rest[1]](values[rest[0]])
                y = F.conv2d(x, given[0].to(x))
            else:
                stride, padding, dilation = (*rest, *((1, 1), (0, 0, 0, 0), (1, 1))[len(rest) :])
                top, bottom, left, right = padding
                groups = x.shape[1] if kind == "depthwise" else 1
                padded = F.pad(x, (left, right, top, bottom))
                y = F.conv2d(padded, given[0].to(x), None, stride, 0, dilation, groups)
            values.append(y)
        return {f"value {i}": values[i] for i in results}


@torch.no_grad()
def compare(program, results, draws=4):
    """With both backends and stock PyTorch, all held against stock PyTorch in fp64."""
    ours, by_reference, stock = (
        functools.partial(f, results) for f in (program.run, program.by_reference, program.stock)
    )
    tensors = program.all_tensors()
    inputs = [
        [torch.randn_like(t) if i < len(program.inputs) else t for i, t in enumerate(tensors)] for _ in range(draws)
    ]
    what = [step[0] for step in program.steps], results, program.dtype
    assert_as_exact(ours, stock, stock, inputs, what)
    assert_as_exact(by_reference, stock, stock, inputs, what)
    if not multiplies_bf16("pointwise_conv2d", tensors[0]):
        assert_as_exact(ours, by_reference, stock, inputs, what)


# ---- every kind of layer ----

LAYERS = {
    "stem": lambda p: p.conv("stem", 0, 8, 3, (2, 2), (0, 1, 1, 0)),
    "stem on a norm": lambda p: p.conv("stem", p.norm(0), 8, 5, (1, 2), (2, 2, 2, 2)),
    "depthwise": lambda p: p.conv("depthwise", 0, stride=(2, 1)),
    "depthwise on a norm": lambda p: p.conv("depthwise", p.norm(0), kernel=5, padding=(2, 4, 1, 3), dilation=(2, 1)),
    "pointwise": lambda p: p.conv("pointwise", 0, 5),
    "pointwise on a norm": lambda p: p.conv("pointwise", p.norm(0, act="hardswish"), 9),
    "norm": lambda p: p.norm(0),
    "norm without affine": lambda p: p.norm(0, "mean var"),
    "norm without weight": lambda p: p.norm(0, "mean var bias"),
    "norm without bias": lambda p: p.norm(0, "mean var weight"),
    "bias alone": lambda p: p.norm(0, "bias", "relu6"),
    "bias alone, no activation": lambda p: p.norm(0, "bias", "none"),
    "bias behind a convolution": lambda p: p.conv("pointwise", p.norm(p.conv("pointwise", 0), "bias", "silu")),
    "activation alone": lambda p: p.norm(0, "", "silu"),
    "norm of a norm": lambda p: p.norm(p.norm(0, act="silu"), act="hardswish"),
    "vectors as half modules have them": lambda p: p.norm(p.conv("stem", p.norm(0, half=True)), "bias", half=True),
    "sum": lambda p: p.sum(p.conv("pointwise", 0), p.conv("pointwise", 0)),
    "sum, left pending": lambda p: p.sum(p.norm(p.conv("pointwise", 0)), p.conv("pointwise", 0)),
    "sum, right pending": lambda p: p.sum(p.conv("pointwise", 0), p.norm(p.conv("pointwise", 0))),
    "sum, both pending": lambda p: p.sum(p.norm(p.conv("pointwise", 0)), p.norm(p.conv("pointwise", 0), act="silu")),
    "sum with an input": lambda p: p.sum(0, p.norm(p.conv("pointwise", 0, p.shapes[0][1]))),
    "sum with itself": lambda p: p.sum(*[p.norm(0)] * 2),
    "norm of a sum": lambda p: p.norm(p.sum(p.norm(0), 0), "", "relu"),
    "pool": lambda p: p.pool(0),
    "pool of a norm": lambda p: p.pool(p.norm(0)),
    "convolution on a pool": lambda p: p.conv("pointwise", p.norm(p.pool(p.norm(0)), "bias"), 7),
    "pool of a pool": lambda p: p.pool(p.pool(0)),
    "separable": lambda p: p.conv("pointwise", p.norm(p.conv("depthwise", p.norm(0))), 6),
    "separable on an input": lambda p: p.conv("pointwise", p.norm(p.conv("depthwise", 0, stride=(2, 2)), "bias"), 11),
    "sigmoid gate": lambda p: p.gated(p.norm(0), p.norm(p.pool(0), "bias", "none"), "sigmoid"),
    "hardsigmoid gate": lambda p: p.gated(0, p.pool(p.norm(0)), "hardsigmoid"),
    "squeeze and excite": lambda p: squeeze_and_excite(p, p.norm(p.conv("depthwise", p.norm(0)), act="silu")),
    "depthwise and pointwise without a norm": lambda p: p.conv("pointwise", p.conv("depthwise", p.norm(0))),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer, dtype):
    program = Program((2, 6, 7, 8), dtype=dtype)
    compare(program, [LAYERS[layer](program)])


def squeeze_and_excite(p, z):
    gate = p.conv("pointwise", p.norm(p.conv("pointwise", p.pool(z), 3), "bias"), p.shapes[z][1])
    return p.gated(z, p.norm(gate, "bias", "none"), "sigmoid")


INVERTED = {  # on maps large enough for one kernel
    "plain": lambda p: inverted(p, 0),
    "stride 2, pending": lambda p: inverted(p, p.norm(0), stride=(2, 2), padding=(0, 1, 1, 0)),
    "with its sum": lambda p: p.sum(p.norm(inverted(p, 0, out=6), "bias", "none"), 0),
    "expanded twice read": lambda p: p.pool(inverted(p, 0) - 4),
    "two": lambda p: inverted(p, p.norm(inverted(p, 0), "mean var", "none"), kernel=5, padding=(2, 2, 2, 2)),
}  # fmt: skip


def inverted(p, x, out=5, **geometry):
    y = p.norm(p.conv("pointwise", x, 19), act="relu6")
    return p.conv("pointwise", p.norm(p.conv("depthwise", y, **geometry), "bias", "hardswish"), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 24, 25), (1, 6, 41, 30), (5, 6, 24, 24)], ids=str)
@pytest.mark.parametrize("block", INVERTED)
def test_inverted_residual(block, shape, dtype):
    program = Program(shape, dtype=dtype)
    y = INVERTED[block](program)
    compare(program, [y, y - 4] if "read" in block else [y], draws=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 8), (24, 25)], ids=str)
def test_packed_weights_change_nothing(size, dtype):
    """Of each path: few pixels, one block, a gate, an expansion; and what is packed is what the weights were."""
    program = Program((1, 48, *size), dtype=dtype)
    y = program.conv("pointwise", program.norm(program.conv("depthwise", program.norm(0))), 70)
    z = squeeze_and_excite(program, inverted(program, program.norm(y, "bias"), 40))
    x, *_ = tensors = program.all_tensors()
    layers = program.layers(tensors)
    with torch.no_grad():
        expected, packed = run_layers((x,), layers, [y, z]), layers.packed()
        for t in layers.tensors:
            if t.dim() == 4 and t.shape[2] == 1:
                t.zero_()
        torch.testing.assert_close(run_layers((x,), packed, [y, z]), expected, rtol=0, atol=0)


def test_a_packed_weight_of_another_size_is_refused():
    layers = Layers()
    y = layers.pointwise(0, PW, packed=torch.ops.mnops.pack_pointwise(torch.zeros(40, 8, 1, 1)))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"the packed weight must have \d+ elements, got \d+"):
        run_layers((X,), layers, [y])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_activations(act, dtype):
    program = Program((2, 6, 7, 8), dtype=dtype)
    y = program.conv("pointwise", program.norm(program.conv("depthwise", program.norm(0, act=act)), act=act))
    compare(program, [program.norm(y, "bias", act), program.norm(y, "", act)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", [name for name in LAYERS if "norm" not in name])
def test_float32_weights_beside_half(layer, dtype):
    program = Program((2, 6, 7, 8), dtype=dtype, weight=torch.float32)
    compare(program, [LAYERS[layer](program)])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (2, 1, 5, 4), (2, 13, 1, 6), (0, 6, 5, 5)], ids=str)
def test_shapes_and_layouts(shape, layout):
    program = Program(shape, layout=layout)
    y = program.conv("stem", 0, 5)
    z = program.norm(program.conv("pointwise", program.norm(program.conv("depthwise", program.norm(y))), 5))
    compare(program, [program.sum(z, y), program.pool(z)])


def test_sliced_input():
    program = Program((2, 6, 7, 8))
    y, wide = program.conv("pointwise", program.norm(0)), torch.randn(2, 12, 8, 8)
    with torch.no_grad():
        _, *tensors = program.all_tensors()
        found = program.run([y], wide[:, ::2, 1:], *tensors)
        exact = program.stock([y], *(t.double() for t in (wide[:, ::2, 1:], *tensors)))
    torch.testing.assert_close(found[f"value {y}"].double(), exact[f"value {y}"], rtol=1e-5, atol=1e-5)


# ---- who reads what ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_read_several_times(dtype):
    """Each pending norm by a convolution, a sum, a pool, another norm, the caller."""
    program = Program((2, 6, 7, 8), (2, 6, 7, 8), dtype=dtype)
    z = program.norm(program.sum(0, 1), act="silu")
    others = [
        program.conv("depthwise", z), program.conv("pointwise", z), program.conv("stem", z), program.pool(z),
        program.norm(z), program.sum(z, 0), program.sum(1, z), program.sum(z, z),
    ]  # fmt: skip
    compare(program, [z, *others])
    compare(program, others[::-1])


@pytest.mark.parametrize("reader", ["nobody", "result", "result of its norm", "layer", "layer on its norm"])
def test_a_depthwise_layer_that_somebody_else_reads(reader):
    """Unfused then, and the same."""
    program = Program((2, 6, 7, 8))
    y = program.conv("depthwise", program.norm(0))
    z = program.norm(y, act="silu")
    out = program.conv("pointwise", z)
    read = {"result": y, "result of its norm": z, "layer": program.pool(y), "layer on its norm": program.pool(z)}
    if "layer" not in reader:  # nothing but those who are asked for
        del program.steps[-2:], program.shapes[-2:]
    results = [out, *([read[reader]] if reader in read else [])]
    compare(program, results)
    with torch.no_grad():
        alone = Program((2, 6, 7, 8))
        alone.inputs, alone.tensors, alone.steps = program.inputs, program.tensors, program.steps[:4]
        tensors = program.all_tensors()
        fused, unfused = alone.run([out], *tensors), program.run(results, *tensors)
    torch.testing.assert_close(fused[f"value {out}"], unfused[f"value {out}"], rtol=1e-5, atol=1e-5)


@backends
def test_results_are_inputs_and_named_twice(backend):
    program = Program((2, 6, 7, 8), (2, 6, 7, 8))
    y = program.conv("pointwise", program.norm(0))
    x, other, *_ = tensors = program.all_tensors()
    with torch.no_grad(), mnops.backend(backend):
        found = run_layers((x, other), program.layers(tensors), [1, y, 0, y])
        assert run_layers((x,), Layers(), []) == []
    torch.testing.assert_close(found[::2], [other, x], rtol=0, atol=0)
    torch.testing.assert_close(found[1], found[3], rtol=0, atol=0)


@backends
def test_inputs_stay_as_they_are(backend):
    program = Program((2, 6, 7, 8), layout=torch.contiguous_format)
    y = program.sum(program.norm(0), 0)
    tensors = program.all_tensors()
    before = [t.clone() for t in tensors]
    with torch.no_grad(), mnops.backend(backend):
        program.run([y, 0], *tensors)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0)


# ---- programs that are drawn ----


def drawn_program(draw_int, sample, dtype, weight, layout):
    shape = draw_int(1, 2), draw_int(1, 9), draw_int(1, 9), draw_int(1, 9)
    program = Program(*[shape] * draw_int(1, 2), dtype=dtype, weight=weight, layout=layout)
    for _ in range(draw_int(1, 12)):
        x = draw_int(max(0, len(program.shapes) - 4), len(program.shapes) - 1)
        shape = program.shapes[x]
        kind = sample(("depthwise", "pointwise", "stem", "norm", "norm", "norm", "sum", "pool", "separable"))
        if kind == "separable":
            y = program.conv("depthwise", x, kernel=3, stride=(draw_int(1, 2),) * 2)
            program.conv("pointwise", program.norm(y, act=sample(ACTS)), draw_int(1, 9))
        elif kind in ("depthwise", "stem", "pointwise"):
            kernel = sample((1, 2, 3, 5))
            dilation = (draw_int(1, 2), draw_int(1, 2)) if kind == "depthwise" else (1, 1)
            sides = tuple(draw_int((d * (kernel - 1) + 1) // 2, kernel) for d in dilation for _ in range(2))
            program.conv(kind, x, draw_int(1, 9), kernel, (draw_int(1, 2), draw_int(1, 2)), sides, dilation)
        elif kind == "norm":
            have = sample(("mean var weight bias", "mean var weight", "mean var", "mean var bias", "bias", ""))
            program.norm(x, have, sample(ACTS), sample((0.0, 1e-5, 0.1)))
        elif kind == "sum":
            program.sum(x, sample([i for i, s in enumerate(program.shapes) if s == shape]))
        else:
            program.pool(x)
    first, last = len(program.inputs), len(program.shapes) - 1
    return program, sorted({last, *(draw_int(first, last) for _ in range(draw_int(0, 3)))})


def test_drawn_programs():
    hypothesis = pytest.importorskip("hypothesis", reason="the package hypothesis is not installed")
    st = hypothesis.strategies

    @hypothesis.given(data=st.data())
    def run(data):
        dtype = data.draw(st.sampled_from(DTYPES))
        weight = data.draw(st.sampled_from((dtype, torch.float32))) if dtype.itemsize == 2 else dtype
        layout = data.draw(st.sampled_from((torch.channels_last, torch.contiguous_format)))
        torch.manual_seed(0)
        program, results = drawn_program(
            lambda low, high: data.draw(st.integers(low, high)),
            lambda choices: data.draw(st.sampled_from(choices)), dtype, weight, layout,
        )  # fmt: skip
        hypothesis.note(f"{program.shapes} {[(kind, x, rest) for kind, x, _, rest in program.steps]} {results}")
        compare(program, results)

    run()


# ---- as PyTorch sees it ----


def two_blocks(dtype=torch.float32):
    """(2, 6, 9, 7) to 4 channels at stride 2, to 5, a pool."""
    program = Program((2, 6, 9, 7), dtype=dtype)
    y = program.conv("depthwise", program.norm(0), stride=(2, 2), padding=(0, 1, 1, 1))
    y = program.norm(program.conv("pointwise", program.norm(y, eps=1e-5), 4))
    y = program.norm(program.conv("pointwise", program.norm(program.conv("depthwise", y), "bias")), act="silu")
    return program, y, program.pool(program.norm(program.conv("stem", 0, 3)))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cpu", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16), ("reference", torch.float32)], ids=str,
)  # fmt: skip
def test_blocks_are_separable_conv2d_one_by_one(backend, dtype):
    program, y, _ = two_blocks(dtype)
    x, *tensors = program.all_tensors()
    norms = [tensors[0:4], tensors[5:9], tensors[10:14], (None, None, None, tensors[15])]
    with torch.no_grad(), mnops.backend(backend):
        found = program.run([y], x, *tensors)[f"value {y}"]
        mid = (*norms[1], 1e-5, "relu")
        z = ops.separable_conv2d(Pending(x, *norms[0], 1e-3, "relu"), tensors[4], mid, tensors[9], 2, (0, 1, 1, 1))
        bias = tensors[15]
        mid = (-bias, torch.ones_like(bias), None, None, 0.0, "relu")
        z = ops.separable_conv2d(Pending(z, *norms[2], 1e-3, "relu"), tensors[14], mid, tensors[16], 1, 1)
        z = ops.norm_act(Pending(z, *tensors[17:21], 1e-3, "silu"))
    torch.testing.assert_close(found, z, rtol=0, atol=0)


def schema_arguments(program, results):
    tensors = program.all_tensors()
    layers = program.layers(tensors)
    x, *others = tensors[: len(program.inputs)]
    return x, others, layers.tensors, layers.eps, layers.ints, list(results)


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)], ids=str
)
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_opcheck(namespace, dtype, layout):
    program, y, pooled = two_blocks(dtype)
    z = program.sum(program.norm(y), y)
    program.inputs = [x.contiguous(memory_format=layout) for x in program.inputs]
    op = getattr(torch.ops, namespace).run_layers.default
    torch.library.opcheck(op, schema_arguments(program, [y, pooled, y - 1, z]))


def test_flops_are_those_of_the_ops_one_by_one():
    program, y, pooled = two_blocks()
    tensors = program.all_tensors()
    totals = []
    for run in (program.run, program.by_reference, program.stock):
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            run([y, pooled], *tensors)
        totals.append(flops.get_total_flops())
    assert totals[0] == totals[1] == totals[2] > 0


# ---- bad input: the rule and the value received ----

X = torch.zeros(2, 8, 6, 6)
DW, PW, STEM, V = torch.zeros(8, 1, 3, 3), torch.zeros(4, 8, 1, 1), torch.zeros(4, 8, 3, 3), torch.ones(8)
SAME = (1, 1), (1, 1, 1, 1)


def bad(write, message, *values):
    return write, message, values or (X,)


BAD = {
    "x": bad(lambda a: a.pointwise(0, PW), r"x must be \(N, C, H, W\), got \(8, 6, 6\)", X[0]),
    "dtype": bad(lambda a: a.pointwise(0, PW), "x must be float32, float64, .* got torch.int32", X.int()),
    "weight's dtype": bad(
        lambda a: a.pointwise(0, PW.double()), "weight must be torch.float32 as x, got torch.float64"
    ),
    "weight's device": bad(lambda a: a.pointwise(0, PW.to("meta")), "weight must be on cpu as x, got meta"),
    "depthwise": bad(lambda a: a.depthwise(0, DW[:4], *SAME, (1, 1)), r"with C = 8 as in x, got \(4, 1, 3, 3\)"),
    "pointwise": bad(
        lambda a: a.pointwise(0, STEM), r"weight must be \(O, C, 1, 1\) with C = 8 as in x, got \(4, 8, 3, 3\)"
    ),
    "stem": bad(lambda a: a.stem(0, DW, *SAME), r"weight must be \(O, C, K, K\) with C = 8 as in x"),
    "behind a layer": bad(
        lambda a: a.pointwise(a.norm(a.pointwise(0, PW), act="relu"), PW), r"with C = 4 as in x, got \(4, 8"
    ),
    "fused": bad(
        lambda a: a.pointwise(a.norm(a.depthwise(0, DW, *SAME, (1, 1)), V, V), PW[:, :4]),
        r"C = 8 as in x, got \(4, 4, 1, 1\)",
    ),
    "fused norm": bad(
        lambda a: a.pointwise(a.norm(a.depthwise(0, DW, *SAME, (1, 1)), V, V[:3]), PW),
        r"var must be \(C,\) .* got \(3,\)",
    ),
    "stride": bad(lambda a: a.depthwise(0, DW, (0, 1), (1,) * 4, (1, 1)), r"stride must be positive, got \[0, 1\]"),
    "padding": bad(
        lambda a: a.stem(0, STEM, (1, 1), (1, 1, -1, 1)), r"padding must not be negative, got \[1, 1, -1, 1\]"
    ),
    "dilation": bad(lambda a: a.depthwise(0, DW, *SAME, (9, 9)), r"the kernel must fit the padded input"),
    "mean": bad(lambda a: a.norm(0, V[:4], V), r"mean must be \(C,\) with C = 8 as in x, got \(4,\)"),
    "mean without var": bad(lambda a: a.norm(0, V), "mean and var must be given together"),
    "var without mean": bad(lambda a: a.norm(0, None, V, None, V), "mean and var must be given together"),
    "weight without mean": bad(lambda a: a.norm(0, None, None, V, V), "mean and var must be given together"),
    "weight alone": bad(lambda a: a.norm(0, None, None, V), "mean and var must be given together"),
    "bias": bad(lambda a: a.norm(0, bias=V[:4]), r"must be \(C,\) with C = 8 as in x, got \(4,\)"),
    "bias's device": bad(lambda a: a.norm(0, bias=V.to("meta")), "must be on cpu as x, got meta"),
    "act": bad(lambda a: a.norm(0, V, V, act="gelu"), "run_layers: act must be one of none, relu, .* got 'gelu'"),
    "sum": bad(
        lambda a: a.sum(0, 1), r"the values of a sum must have one shape, .* got \(\(2, 8.* and \(\(1, 8", X, X[:1]
    ),
    "sum's dtype": bad(
        lambda a: a.sum(0, 1), r"of a sum must have one .* torch.float32, .* torch.float64", X, X.double()
    ),
    "gate": bad(lambda a: a.pointwise(0, PW, 0), r"a gate must be \(N, C, 1, 1\) with x"),
    "value of a gate": bad(lambda a: a.pointwise(0, PW, 3), "run_layers: value 3 is read where 1 are known"),
    "value": bad(lambda a: a.norm(1), "run_layers: value 1 is read where 1 are known"),
    "value of a sum": bad(lambda a: a.sum(0, -1), "run_layers: value -1 is read where 1 are known"),
    "negative value": bad(lambda a: a.pointwise(-1, PW), "run_layers: value -1 is read where 1 are known"),
    "how many inputs": bad(lambda a: a.pointwise(0, PW), "run_layers: these layers have 1 inputs, got 2 values", X, X),
}


@backends
@pytest.mark.parametrize("what", BAD)
def test_refusals(what, backend):
    write, message, values = BAD[what]

    def run():
        layers = Layers(2 if "sum" in what and "value" not in what else 1)
        run_layers(values, layers, [write(layers)])

    with torch.no_grad(), mnops.backend(backend), pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        run()


@backends
def test_a_result_that_there_is_not(backend):
    for result in (1, -1):
        with mnops.backend(backend), pytest.raises(ValueError, match=f"value {result} is read where 1 are known"):
            run_layers((X,), Layers(), [result])


def test_it_has_no_gradient():
    program, y, _ = two_blocks()
    x, weight = program.inputs[0], program.tensors[4]
    for t in (x, weight):
        t.requires_grad_()
        with pytest.raises(
            RuntimeError, match=r"for inference, under torch.no_grad\(\), got a tensor that requires grad"
        ):
            program.run([y], *program.all_tensors())
        with torch.no_grad():
            program.run([y], *program.all_tensors())
        t.requires_grad_(False)


MALFORMED = {
    "a layer has 11 ints and an eps": lambda ints, eps: (ints[:-1], eps),
    "a layer has 11 ints and an eps, got 11 and 2": lambda ints, eps: (ints, [*eps, 0.0]),
    "unknown kind of layer 6": lambda ints, eps: ([6, *ints[1:]], eps),
    "unknown kind of layer -1": lambda ints, eps: ([-1, *ints[1:]], eps),
    "value 3 is read where 1 are known": lambda ints, eps: ([ints[0], 3, *ints[2:]], eps),
    "there is no weight 5": lambda ints, eps: ([*ints[:2], 5, *ints[3:]], eps),
    "there is no weight -1": lambda ints, eps: ([*ints[:2], -1, *ints[3:]], eps),
}


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_layers(message):
    layers = Layers()
    y = layers.pointwise(0, PW)
    ints, eps = MALFORMED[message](layers.ints, layers.eps)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mnops.run_layers(X, [], layers.tensors, eps, ints, [y])
    with torch.no_grad(), pytest.raises(ValueError, match=message):  # as the fake kernel and the reference word it
        layers.ints, layers.eps = ints, eps
        _register.run("run_layers", (X, [], layers.tensors, eps, ints, [y]), mnops.ops.run_layers.check)


def test_malformed_norms():
    layers = Layers()
    y = layers.norm(0, V, V)
    for at, value, message in (
        (2, 7, "there is no tensor 7"),
        (6, 5, "unknown activation 5"),
        (6, -1, "activation -1"),
    ):
        ints = [*layers.ints[:at], value, *layers.ints[at + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            torch.ops.mnops.run_layers(X, [], layers.tensors, layers.eps, ints, [y])
        with pytest.raises(ValueError, match=message):
            mnops.ops.run_layers.check(X, [], layers.tensors, layers.eps, ints, [y])


def test_malformed_ints_are_refused_or_run():
    """Any ints: nothing outside the tensors is read."""
    rng, ran = random.Random(0), 0
    tensors = [torch.randn(s) for s in ((6, 1, 3, 3), (6, 6, 1, 1), (6, 6, 3, 3), (6,), (6,), (4,), (0,), (6, 1, 1, 0))]
    x = torch.randn(2, 6, 5, 5)
    usual, odd = (0, 0, 1, 1, 1, 2, 3), (-1, -2, 4, 5, 6, 9, 2**50, -(2**63), 2**63 - 1)
    for round in range(1000):
        count = rng.randint(0, 5)
        wild = round % 3  # how many ints of the layers are odd
        ints = []
        for i in range(count):
            kind, source = rng.choice((0, 1, 2, 3, 3, 4, 5)), rng.randint(0, i)
            if kind == 3:
                rest = [*(rng.choice((3, 4, -1)) for _ in range(4)), rng.randint(0, 4), *[0] * 4]
            elif kind == 4:
                rest = [rng.randint(0, i), *[0] * 8]
            elif kind == 2:
                gate, packed = rng.choice((-1, -1, rng.randint(0, i))), rng.choice((-1, -1, 3))
                rest = [1, gate, rng.randint(0, 1), packed, *[0] * 5]
            else:
                rest = [{0: 2, 1: 0, 2: 1}.get(kind, 0), 1, 1, *(rng.randint(0, 2) for _ in range(4)), 1, 1]
            ints += (kind, source, *rest)
        for _ in range(wild if ints else 0):
            ints[rng.randrange(len(ints))] = rng.choice((*usual, *odd))
        eps = [rng.choice((1e-5, 0.0, float("nan")))] * (count + (rng.random() < 0.05))
        results = [rng.randint(0, count) for _ in range(rng.randint(0, 3))]
        if rng.random() < 0.1:
            results.append(rng.choice(odd))
        try:
            found = torch.ops.mnops.run_layers(x, [x] * rng.randint(0, 1), tensors, eps, ints, results)
        except (RuntimeError, MemoryError):
            continue
        ran += 1
        assert len(found) == len(results)
    assert 200 < ran < 900
