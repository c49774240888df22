"""torch.compile, and torch.export with a forced backend, see one graph of the ops, with eager's numbers."""

import copy

import pytest
import torch

import mnops
from mnops import Pending, ops
from mnops.models import mobilenet


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def short(monkeypatch):
    """Five layers in place of 27, each kind among them: compiling takes its time per layer."""
    monkeypatch.setattr(mobilenet, "STAGES", (((64, 1),), ((128, 2),)))


def network(**options):
    torch.manual_seed(0)
    return mnops.MobileNet(num_classes=5, width_mult=0.25, **options).double()


X = torch.randn(4, 3, 48, 48, dtype=torch.float64)


def step(model, run, x=X):
    """Logits, gradients, buffers of a training step."""
    model.zero_grad()
    logits = run(x)
    logits.square().sum().backward()
    return [logits, [p.grad.clone() for p in model.parameters()], [b.clone() for b in model.buffers()]]


def assert_compiles(model, backend):
    eager, compiled = model, copy.deepcopy(model)
    run = torch.compile(compiled, fullgraph=True, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(step(compiled, run), step(eager, eager), rtol=1e-6, atol=1e-9)
    eager.eval(), compiled.eval()
    torch.testing.assert_close(run(X), eager(X))
    with torch.no_grad():
        torch.testing.assert_close(run(X), eager(X))


def test_whole_network():
    assert_compiles(network(), "aot_eager")


def test_inductor(short):
    assert_compiles(network(), "inductor")


@pytest.mark.parametrize(
    "options",
    [{"padding": "same"}, {"bn_momentum": None}, {"act": "hardswish", "in_chans": 3}, {"fused": False}],
    ids=str,
)
def test_options(short, options):
    assert_compiles(network(**options), "aot_eager")


def test_dynamic_shapes(short):
    """One graph for every batch size and image size."""
    model = network().eval()
    run = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for shape in ((4, 3, 48, 40), (3, 3, 64, 80), (6, 3, 96, 96)):
            x = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(run(x), model(x))


def test_blocks_and_functions():
    block = mnops.nn.DepthwiseSeparable(4, 6).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert torch._dynamo.explain(block)(x).graph_break_count == 0
    weight, gamma, beta = torch.randn(4, 1, 3, 3).double(), torch.rand(4).double(), torch.rand(4).double()
    stats = torch.zeros(4).double(), torch.ones(4).double()
    compiled = torch.compile(mnops.depthwise_conv_bn_act, fullgraph=True, backend="aot_eager")
    mine = [s.clone() for s in stats]
    torch.testing.assert_close(
        compiled(x, weight, gamma, beta, *mine), mnops.depthwise_conv_bn_act(x, weight, gamma, beta, *stats)
    )
    torch.testing.assert_close(mine, list(stats))


def namespaces_of(function, *args):
    """Which backends' ops the compiler saw."""
    seen = []

    def backend(graph, inputs):
        seen.extend(str(n.target).split(".")[0] for n in graph.graph.nodes if "mnops" in str(n.target))
        return graph

    torch.compile(function, fullgraph=True, backend=backend)(*args)
    return set(seen)


def test_backend_in_and_around_a_graph():
    x, w = torch.randn(1, 4, 6, 6), torch.randn(4, 1, 3, 3)

    def inside(x, w):
        with mnops.backend("reference"):
            return ops.norm_act(Pending(ops.depthwise_conv2d(x, w)[0], act="relu"))

    def plain(x, w):
        return ops.depthwise_conv2d(x, w)[0]

    assert namespaces_of(inside, x, w) == {"mnops_reference"}
    assert namespaces_of(plain, x, w) == {"mnops"}
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    expected = compiled(x, w)
    with mnops.backend("reference"):
        assert namespaces_of(plain, x, w) == {"mnops_reference"}
        torch.testing.assert_close(compiled(x, w), expected)


def test_autocast_in_a_graph(short):
    model = mnops.MobileNet(num_classes=5, width_mult=0.25)
    x = X.float()

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    run = torch.compile(forward, fullgraph=True, backend="aot_eager")
    logits = run(x)
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"padding": "same"}], ids=str)
def test_export(options):
    """Batch and image size stay free; not the size with "same": padding depends on it, and is an int."""
    model, free = network(**options).eval(), torch.export.Dim.DYNAMIC
    sizes = {0: free} if options else {0: free, 2: free, 3: free}
    with mnops.backend("cpu"):
        program = torch.export.export(model, (X,), dynamic_shapes=(sizes,))
    exported = program.module()
    for shape in ((4, 3, 48, 48), (2, 3, 48, 48) if options else (2, 3, 64, 80)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(exported(x), model(x))
    names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert "mnops.depthwise_conv2d.default" in names
    assert not any("convolution" in n or "batch_norm" in n for n in names)
