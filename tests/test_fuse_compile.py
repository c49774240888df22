"""torch.compile of a fused model: one graph, its layers chained, with the numbers of stock compiled."""

import copy
import functools
import operator

import pytest
import torch
import torchvision_support
from fused_models import NETWORKS, SURPRISES
from test_fuse import Concatenated, PartlyWithoutGrad, X, assert_same, everything, fused_convs, pair, run
from test_fuse_models import prepared
from test_lazy import Layers, keywords, seen_before_it_changed
from torch import nn

import mnops
from mnops.lazy import LazyTensor

CONVOLUTIONS = {"depthwise_conv2d.default", "pointwise_conv2d.default", "stem_conv2d.default"}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, seen=None, backend="aot_eager", **options):
    """The model compiled in one graph; the graphs that the backend got are added to seen."""

    def recorded(gm, inputs):
        seen.append(gm.graph)
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    return torch.compile(model, fullgraph=True, backend=backend if seen is None else recorded, **options)


def assert_compiles(stock, fused, x=X, seen=None, modes=(True, False), expected=None, **options):
    """Two steps in training, and eval, against stock in eager mode, or as `expected` runs it."""
    both = compiled(fused, seen, **options), stock if expected is None else expected
    for mode in modes:
        stock.train(mode), fused.train(mode)
        for _ in range(2):
            found, wanted = (run(model, x) for model in both)
            for names in ("grads", "state"):
                for values in (found, wanted):
                    values[names] = {n.removeprefix("_orig_mod."): t for n, t in values[names].items()}
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def calls(graph):
    return [getattr(n.target, "__name__", n.target) for n in graph.nodes if n.op.startswith("call")]


@pytest.mark.parametrize("name", ["v3", "functional", "shuffle", "ghost"])
def test_networks(name):
    """No BatchNorm and no activation is left beside a convolution."""
    stock, fused = pair(NETWORKS[name])
    layout = torch.contiguous_format if name in ("functional", "shuffle") else torch.channels_last
    seen = []
    assert_compiles(stock, fused, X.contiguous(memory_format=layout), seen)
    assert len(seen) == 2
    for graph in seen:
        found = calls(graph)
        assert sum(call in CONVOLUTIONS for call in found) == len(fused_convs(fused))
        assert "batch_norm" not in found


def test_chained():
    """As in eager mode: expand, depthwise, project, and the sum in the pass that makes it real."""
    _, fused = pair(NETWORKS["v2"])
    seen = []
    compiled(fused, seen)(X.contiguous(memory_format=torch.channels_last))
    found = calls(seen[0])
    assert found.count("norm_act.default") == 4  # two sums, the strided block's output, the last
    assert not {"add", "hardtanh", operator.add} & set(found)
    inputs = [n.args[0] for n in seen[0].nodes if getattr(n.target, "__name__", "") in CONVOLUTIONS]
    assert sum(n.target is operator.getitem for n in inputs) == 8  # of 10: what another convolution stored


SUBTLE = [
    "called twice", "with its norm and bare", "in-place relu whose input is used", "view before in-place",
    "convolution's output changed", "norm in training", "no running statistics", "gelu", "weight_norm",
]  # fmt: skip


@pytest.mark.parametrize("name", SUBTLE)
def test_surprises(name):
    assert_compiles(*pair(SURPRISES[name][0]), modes=(True,))


def test_checkpoint():
    """As stock compiled, which counts the batches of what runs again once."""
    stock, fused = pair(SURPRISES["checkpoint"][0])
    assert_compiles(stock, fused, modes=(True,), expected=compiled(stock))


@pytest.mark.parametrize(
    "make", [PartlyWithoutGrad, Concatenated, lambda: Layers(keywords), lambda: Layers(seen_before_it_changed)]
)
def test_hard_parts(make):
    assert_compiles(*pair(make), modes=(True,))


def test_inductor():
    assert_compiles(*pair(lambda: NETWORKS["attributes"]()[:2]), backend="inductor")


def test_dynamic_shapes():
    """One graph for every batch size and image size."""
    _, fused = pair(NETWORKS["v3"])
    run = compiled(fused.eval(), dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for shape in ((4, 3, 48, 40), (3, 3, 64, 80), (6, 3, 96, 96)):
            x = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(run(x), fused(x))


def test_autocast():
    """As near to fp64 as eager is."""
    stock, fused = pair(NETWORKS["v3"])
    exact, fused, x = stock(X), fused.float(), X.float().contiguous(memory_format=torch.channels_last)

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return fused(x)

    eager, seen = forward(x), []
    found = compiled(forward, seen)(x)
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in fused.parameters())
    assert "batch_norm" not in calls(seen[0])
    assert (found - exact).norm() <= 2 * (eager - exact).norm() + 0.01 * exact.norm()


def test_filter():
    """Only what was fused is in the graph as an op."""
    stock = pair(NETWORKS["v2"])[0][:2].eval()
    fused = mnops.fuse(copy.deepcopy(stock), lambda conv, name: name.startswith("1."))
    seen = []
    torch.testing.assert_close(compiled(fused, seen)(X), stock(X))
    found = calls(seen[0])
    assert sum(call in CONVOLUTIONS for call in found) == 3
    assert found.count("batch_norm") == 1


def test_a_forced_backend():
    _, fused = pair(NETWORKS["v2"])
    seen = []
    with mnops.backend("reference"):
        compiled(fused, seen)(X)
    ops = {n.target.namespace for n in seen[0].nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert ops == {"mnops_reference"}


def test_hooks():
    stock, fused = (m[:2] for m in pair(NETWORKS["v2"]))
    for model in (stock, fused):
        for i in range(3):
            model[1].conv[0][i].register_forward_hook(lambda m, args, out: out * 2)
    assert_compiles(stock, fused, modes=(True,))


# ---- a part compiled by itself, that is handed a pending tensor ----


def module(model, name, **options):
    setattr(model.get_submodule(name.rpartition(".")[0]), name[-1], torch.compile(model.get_submodule(name), **options))


def in_place(model, name, **options):
    model.get_submodule(name).compile(**options)


def forward(model, name, **options):
    part = model.get_submodule(name)
    part.forward = torch.compile(part.forward, **options)


@pytest.mark.parametrize(
    ("compile_it", "name"),
    [
        (module, "1"), (in_place, "1"), (forward, "1"), (module, "1.conv.1"), (module, "1.conv.1.0"),
        (module, "1.conv.1.1"), (module, "1.conv.1.2"),
    ],
    ids=lambda p: getattr(p, "__name__", p),
)  # fmt: skip
def test_compiled_part(compile_it, name):
    """A block, its layers, the convolution, norm or in-place activation alone: one graph, as stock runs."""
    stock, fused = pair(NETWORKS["v2"])
    inputs = []

    def backend(gm, args):
        inputs.extend(type(a) for a in args if not isinstance(a, nn.Parameter))
        return torch._dynamo.lookup_backend("aot_eager")(gm, args)

    compile_it(fused, name, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            found, expected = run(fused), run(stock)
            torch.testing.assert_close([*found["grads"].values()], [*expected["grads"].values()])
            torch.testing.assert_close((found["z"], found["dx"]), (expected["z"], expected["dx"]))
    assert inputs.count(LazyTensor) == 1
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(X), stock.eval()(X))


def test_compiled_before_it_is_fused():
    stock = pair(NETWORKS["v2"])[0]
    model = copy.deepcopy(stock)
    model[1].compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(mnops.fuse(model)), run(stock))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("change", [True, False])
def test_compiled_part_that_changes_its_input(backend, change):
    """What reads the tensor after sees it, whoever wrote it, and in whatever mode."""

    def part(z):
        if change:
            z.mul_(2)
            z.relu_()
        return z * 2, z.detach(), z[:, 1:]

    def call(m, x, part=part):
        a = m.first(x)
        b, c, d = part(a)
        return m.second(a) + b * c + d.square().sum(1, keepdim=True)

    stock, fused = pair(lambda: Layers(call))
    compiled = torch.compile(part, fullgraph=True, dynamic=not change, backend=backend)
    fused.call = functools.partial(call, part=compiled)
    assert_same(stock, fused)
    with torch.inference_mode():
        torch.testing.assert_close(fused(X), stock(X))


def test_graph_break():
    """On both sides of it stands a real tensor."""

    class Breaks(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x

    stock, fused = pair(lambda: nn.Sequential(NETWORKS["v2"]()[0], Breaks(), NETWORKS["v2"]()[1]))
    torch.testing.assert_close(torch.compile(fused, backend="aot_eager")(X), stock(X))


def test_torchvision():
    stock = prepared(torchvision_support.load().models.mobilenet_v3_small(num_classes=4)).eval()
    fused, seen = mnops.fuse(copy.deepcopy(stock), everything), []
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(fused, seen)(x), stock(x))
    assert "batch_norm" not in calls(seen[0])


def test_not_chained(monkeypatch):
    """Under a torch whose compiler has other insides the graph stays as it was traced: right too."""

    def cannot():
        return None

    cannot._dynamo_marked_constant = True
    monkeypatch.setattr("mnops.compiled.chain_this_graph", cannot)
    stock, fused = pair(NETWORKS["functional"])
    seen = []
    assert_compiles(stock, fused, seen=seen, modes=(True,))
    assert any("batch_norm" in call for call in calls(seen[0]))
