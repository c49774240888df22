"""What mnops.deploy returns, run by its plan: the same as the network's own forward, whatever is done to it."""

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
import torchvision_support
from fused_models import NETWORKS, PARTLY, SURPRISES, InvertedResidual, conv_norm_act
from small import images, randomise
from torch import nn

import mnops
from mnops import lazy, plan
from mnops.fuse import Conv2d

X = images(2, 16, dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:deploy")


@pytest.fixture
def runs(monkeypatch):
    """Calls of run_layers by plans that are followed, not tried; each as the number of its layers."""
    called, run, holds = [], plan.run_layers, plan._holds

    def hold(*args):
        before = len(called)
        result = holds(*args)
        del called[before:]
        return result

    monkeypatch.setattr(plan, "_holds", hold)
    monkeypatch.setattr(plan, "run_layers", lambda *args: called.append(len(args[1].eps)) or run(*args))
    return called


def deployed(model, x=X):
    model = model.to(x.dtype).eval()
    with torch.no_grad():
        model(x)  # LazyLinear
    return mnops.deploy(mnops.fuse(randomise(model)))


def small():
    return deployed(NETWORKS["v2"]())


def body():
    return nn.Sequential(conv_norm_act(3, 8, 3, 2), conv_norm_act(8, 8, 3, 1, 8))


def with_a_scale():
    class Scaled(nn.Sequential):
        scale = 2.0

        def forward(self, x):
            return super().forward(x) * self.scale

    model = Scaled(*body())
    model.scale = 2.0
    return model


def own(model, *args, **kwargs):
    """The network's own forward, no plan."""
    return torch.utils._pytree.tree_map(lazy.real, type(model).forward(model, *args, **kwargs))


def assert_same(model, *args, tolerance=1e-9):
    found, expected = model(*args), own(model, *args)
    strided = args[0].numel() > 0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_stride=strided)


def assert_planned(model, runs, *args):
    runs.clear()
    assert_same(model, *args)
    assert runs


# ---- networks ----

MODELS = NETWORKS | {name: make for name, (make, _) in (PARTLY | SURPRISES).items()}
UNPLANNED = {"old weight_norm", "view before in-place"}  # hooks; not for torch.fx


@pytest.mark.parametrize("name", MODELS)
def test_networks(name, runs):
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        model(X)
        randomise_norms(model)
        again, stock = mnops.deploy(mnops.fuse(copy.deepcopy(model), lambda conv, name: True)), model
        for x in (X, images(3, 21, dtype=torch.float64), X[:, :, 3:], X[:1], X[:0]):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = x.clone(memory_format=layout)
                given = x.clone()
                assert_same(again, x)
                torch.testing.assert_close(again(x), stock(x), rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(x, given, rtol=0, atol=0)
    assert bool(runs) == (name not in UNPLANNED)


def randomise_norms(model):
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            nn.init.normal_(m.running_mean), nn.init.uniform_(m.running_var, 0.5, 2)
            if m.weight is not None:
                nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.normal_(m.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, runs):
    model, x = small(), X.to(dtype)
    exact = model(X)
    with torch.no_grad():
        model = model.to(dtype)
        runs.clear()
        errors = [(y.double() - exact).norm() for y in (model(x), own(model, x))]
    assert runs
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * exact.norm()


def test_a_network_that_is_a_plan_of_few_calls(runs):
    """Everything up to the classifier is one; the profiler sees no other call of the ops."""
    model = small()
    model(X)
    runs.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(X)
    assert len(runs) == 1
    ops = [event.key for event in profile.key_averages() if event.key.startswith("mnops")]
    assert ops == ["mnops::run_layers"]
    assert not any("convolution" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_torchvision(name, runs):
    torchvision = torchvision_support.load()
    model = deployed(getattr(torchvision.models, name)(num_classes=5, width_mult=0.35), images(2, 33))
    with torch.no_grad():
        for x in (images(2, 33), images(1, 40), images(1, 40).contiguous(memory_format=torch.channels_last)):
            assert_same(model, x, tolerance=1e-4)
    assert runs
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        model(x)
    names = {event.key for event in profile.key_averages()}
    assert "mnops::run_layers" in names
    if name == "mobilenet_v2":
        assert sum("mnops" in name for name in names) == 1


# ---- who else looks on ----


def test_gradient_of_the_input(runs):
    model, x = small(), X.clone().requires_grad_()
    model(X)
    runs.clear()
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    assert not runs
    (expected,) = torch.autograd.grad(own(model, x).square().sum(), x)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert_planned(model, runs, x)
    with torch.inference_mode():
        assert_planned(model, runs, x)


def test_a_first_call_in_inference_mode(runs):
    model = small()
    with torch.inference_mode():
        assert_planned(model, runs, X)
    assert_planned(model, runs, X)
    x = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(x).sum(), x)
    (expected,) = torch.autograd.grad(own(model, x).sum(), x)
    torch.testing.assert_close(found, expected)


def test_random_numbers_are_those_of_the_network(runs):
    """Trying a plan draws none."""
    model = small()
    state = torch.get_rng_state()
    model(X)
    assert runs
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_of_a_parameter(runs):
    """Of one that somebody wants, after all."""
    model = small()
    model(X)
    for parameter in (model[0][0].weight, model[0][0].bias, model[-1].weight):
        parameter.requires_grad_()
        found, expected = (torch.autograd.grad(y.square().sum(), parameter) for y in (model(X), own(model, X)))
        torch.testing.assert_close(found, expected)
        with torch.no_grad():
            assert_planned(model, runs, X)
        parameter.requires_grad_(False)


def test_autocast():
    model, x = deployed(NETWORKS["v2"](), X.float()), X.float()
    model(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        torch.testing.assert_close(found, own(model, x), rtol=0, atol=0)
    assert found.dtype == torch.bfloat16


def test_compile(runs):
    model = small()
    model(X)
    runs.clear()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), own(model, X), rtol=1e-9, atol=1e-9)
    assert not runs


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = InvertedResidual(3, 4), InvertedResidual(3, 4)

    def forward(self, image: torch.Tensor, other: torch.Tensor, *, scale: float = 2.0):
        return {"sum": self.a(image) + self.b(other) * scale, "image": image}


def test_export():
    """Inputs keep their names."""
    model = deployed(nn.Sequential(conv_norm_act(3, 3), conv_norm_act(3, 3, 3, groups=3)))
    assert "input" in torch.export.export(model, (X,)).graph_signature.user_inputs[0]
    model = mnops.deploy(mnops.fuse(TwoInputs().double().eval()))
    model(X, other=X)
    batch = torch.export.Dim("batch")
    shapes = {"image": {0: batch}, "other": {0: batch}, "scale": None}
    program = torch.export.export(model, (X, X.flip(0)), {"scale": 3.0}, dynamic_shapes=shapes)
    assert program.graph_signature.user_inputs[:2] == ("image", "other")
    assert not any("mnops" in str(node.target) for node in program.graph.nodes)
    x, other = torch.randn(2, 5, 3, 16, 16, dtype=torch.float64)
    found, expected = program.module()(x, other, scale=3.0), own(model, x, other, scale=3.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_keywords_and_structure(runs):
    model = mnops.deploy(mnops.fuse(TwoInputs().double().eval()))
    x = X.flip(0)
    with torch.no_grad():
        for call in (lambda f: f(X, x), lambda f: f(other=x, image=X), lambda f: f(X, x, scale=0.5)):
            found, expected = call(model), call(lambda *a, **k: type(model).forward(model, *a, **k))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert runs
        assert found["image"] is X
        with pytest.raises(TypeError, match="other"):
            model(X)


def test_jit_trace(runs):
    model = small()
    model(X)
    runs.clear()
    traced = torch.jit.trace(model, X, check_trace=False)
    assert not runs
    assert not any(node.kind().startswith("mnops") for node in traced.inlined_graph.nodes())
    torch.testing.assert_close(traced(X[:1]), model(X[:1]), rtol=1e-9, atol=1e-9)


def test_fx():
    model = small()
    model(X)
    traced = torch.fx.symbolic_trace(model)
    assert not any("mnops" in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(X), model(X), rtol=1e-9, atol=1e-9)


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    model, x = deployed(conv_norm_act(3, 3, 3, groups=3), X.float()), X.float()
    model(x)
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(model, (x,), input_names=["image"], dynamic_shapes=(batch,), dynamo=True, verbose=False)
    assert [value.name for value in program.model.graph.inputs] == ["image"]
    assert {node.op_type for node in program.model.graph} <= {"Conv", "Clip", "Relu"}


def test_func(runs):
    model = small()
    expected = model(X)
    runs.clear()
    found = torch.func.vmap(lambda x: model(x[None])[0])(X)
    torch.testing.assert_close(found, expected)
    _, tangent = torch.func.jvp(model, (X,), (torch.ones_like(X),))
    assert tangent.shape == expected.shape
    assert not runs
    parameters = {name: p * 2 for name, p in model.named_parameters()}
    twice = copy.deepcopy(model)
    with torch.no_grad():
        for p in twice.parameters():
            p.mul_(2)
    torch.testing.assert_close(torch.func.functional_call(model, parameters, (X,)), own(twice, X))
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)


def test_report_and_warnings(runs):
    """They tell what the fused layers do; so these run."""
    model = small()
    model(X)
    runs.clear()
    report = mnops.fusion_report(model, X)
    assert not runs
    assert any("chained into" in event for layer in report for event in layer.events)
    with warnings.catch_warnings(), mnops.fallback_warnings():
        warnings.simplefilter("error")
        model(X)
    assert not runs
    assert_planned(model, runs, X)


def test_another_backend(runs):
    model = small()
    expected = model(X)
    runs.clear()
    with mnops.backend("reference"):
        torch.testing.assert_close(model(X), expected, rtol=1e-9, atol=1e-9)
    assert not runs
    assert_planned(model, runs, X)


def test_threads():
    model, inputs = small(), [X, X.flip(0), images(5, 19, dtype=torch.float64)]
    expected = [own(model, x) for x in inputs]
    found, start = {}, threading.Barrier(len(inputs))

    def run(i):
        start.wait()
        found[i] = [model(inputs[i]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, y in enumerate(expected):
        torch.testing.assert_close(found[i], [y] * 5, rtol=1e-9, atol=1e-9)


# ---- what is changed after a call ----


def load(model):
    model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()})


def assign(model):
    model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()}, assign=True)


def in_place(model):
    model[0][0].weight.mul_(2)
    model[1].conv[1][0].bias.add_(1)


def data(model):
    model[0][0].weight.data = model[0][0].weight.data * 2
    model[1].conv[1][0].bias.data.add_(1)


def other_parameter(model):
    conv = model[1].conv[1][0]
    conv.weight = nn.Parameter(conv.weight * 2, requires_grad=False)


def no_bias(model):
    model[1].conv[1][0].bias = None


def other_stride(model):
    model[1].conv[1][0].stride = (2, 2)
    model[1].add = None


def other_child(model):
    model[1] = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid()).double().eval().requires_grad_(False)


def other_act(model):
    model[0][2] = nn.Hardswish()


def one_less(model):
    del model[3]
    model[-1] = nn.Linear(12, 5).double()


def one_more(model):
    model.append(nn.Sigmoid())


def own_forward(model):
    conv = model[1].conv[1][0]
    conv.forward = lambda x: 2 * Conv2d.forward(conv, x)


def parametrised(model):
    torch.nn.utils.parametrizations.weight_norm(model[1].conv[1][0])


def channels_last(model):
    model.to(memory_format=torch.channels_last)


def attribute(model):
    """A flag that the forward of one of its modules asks for."""
    model[1].add = None


def activation(model):
    model[0][2].max_val = 2.0


def unfused(model):
    mnops.unfuse(model)


CHANGES = (
    load, assign, in_place, data, other_parameter, no_bias, other_stride, other_child, other_act, one_less, one_more,
    own_forward, parametrised, channels_last, attribute, activation, unfused,
)  # fmt: skip
SAME_VALUES = {channels_last, unfused, parametrised}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_change_is_seen(change, runs):
    model = small()
    before = model(X)
    assert runs
    change(model)
    runs.clear()
    assert_same(model, X)
    assert runs or change in (unfused, own_forward)
    assert not runs or change is not unfused
    assert_same(model, X.contiguous(memory_format=torch.channels_last))
    if change not in SAME_VALUES:
        assert not torch.allclose(model(X), before)


def test_an_attribute_of_the_network_itself(runs):
    model = mnops.deploy(mnops.fuse(with_a_scale().double().eval()))
    with torch.no_grad():
        assert_planned(model, runs, X)
        before, model.scale = model(X), 3.0
        assert_planned(model, runs, X)
        torch.testing.assert_close(model(X), before * 1.5)


def test_another_memory_format(runs):
    """That of a dense weight is the output's too."""
    model = deployed(body())
    with torch.no_grad():
        for layout in (torch.channels_last, torch.contiguous_format):
            assert_planned(model, runs, X)
            model.to(memory_format=layout)
            assert_planned(model, runs, X)
            assert model(X).is_contiguous(memory_format=layout)


def test_another_dtype(runs):
    model = deployed(NETWORKS["v2"](), X.float())
    model(X.float())
    model.double()
    runs.clear()
    exact = own(model, X)
    torch.testing.assert_close(model(X), exact, rtol=1e-12, atol=1e-12)
    assert runs


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("where", ["conv", "block", "activation", "root"])
def test_hooks(register, where, runs):
    model, seen = small(), []
    module = {"conv": model[1].conv[1][0], "block": model[1], "activation": model[0][2], "root": model}[where]
    expected = model(X)
    for _ in range(2):
        runs.clear()
        hook = getattr(module, register)(lambda m, args, *out: seen.append(m))
        torch.testing.assert_close(model(X), expected, rtol=1e-9, atol=1e-9)
        assert seen == [module]
        assert bool(runs) == (where == "root")
        hook.remove()
        seen.clear()
        assert_planned(model, runs, X)
        assert not seen


def test_global_hooks(runs):
    model, seen = small(), []
    model(X)
    hook = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m)))
    try:
        model(X)
    finally:
        hook.remove()
    assert seen.count(Conv2d) == sum(type(m) is Conv2d for m in model.modules())
    assert_planned(model, runs, X)


@pytest.mark.parametrize("before", [False, True], ids=["first", "after a run"])
def test_copies(before, runs):
    model = small()
    expected = model(X) if before else own(model, X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        runs.clear()
        torch.testing.assert_close(copied(X), expected, rtol=1e-9, atol=1e-9)
        assert runs
        with torch.no_grad():
            copied[0][0].weight.zero_()
        assert not torch.allclose(copied(X), expected)
        torch.testing.assert_close(model(X), expected, rtol=1e-9, atol=1e-9)
        assert_planned(copied, runs, X)


def test_a_plan_does_not_keep_its_network():
    model = small()
    model(X)
    assert plan._plans[model][1] is not None
    gone, size = weakref.ref(model), len(plan._plans)
    del model
    gc.collect()
    assert gone() is None
    assert len(plan._plans) < size


# ---- errors are stock's ----


@pytest.mark.parametrize(
    "x",
    [X[:, :2], X[0, 0], X.float(), X.bfloat16(), X.int(), X[..., :0], None, "image"],
    ids=lambda x: f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else str(x),
)
def test_errors(x):
    model = small()
    model(X)
    errors = []
    for run in (model, mnops.unfuse(copy.deepcopy(model))):
        with pytest.raises(Exception) as caught, torch.no_grad():
            run(x)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
    assert "mnops" not in errors[0][1]


def test_half_beside_float32_is_refused_as_by_stock():
    model = deployed(body(), X.float())
    model(X.float())
    with pytest.raises(RuntimeError, match="should be the same"):
        model(X.half())


def test_one_image_without_a_batch():
    model = deployed(nn.Sequential(conv_norm_act(3, 4), conv_norm_act(4, 4, 3, groups=4)))
    model(X)
    torch.testing.assert_close(model(X[0]), model(X)[0], rtol=1e-9, atol=1e-9)


# ---- forwards that surprise ----


class Layers(nn.Module):
    """Two fused layers, for a forward to be given."""

    def __init__(self, channels=8):
        super().__init__()
        self.a, self.b = conv_norm_act(3, channels, act=None), conv_norm_act(channels, channels, 3, 1, channels, None)
        self.c = conv_norm_act(channels, channels, act=None)
        self.d, self.e = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)  # squeeze-and-excite's


def forwards(function):
    return function.__name__, type(function.__name__, (Layers,), {"forward": function, "__module__": __name__})


def in_place_on_what_is_read(self, x):
    y = self.a(x)
    z = F.relu_(y)
    return self.b(z) + y


def in_place_sum_on_what_is_read(self, x):
    y = self.a(x)
    z = self.b(y)
    w = z
    w += y
    return self.c(w) + z


def in_place_behind_dropout(self, x):
    """In eval dropout gives what it was given."""
    y = self.a(x)
    z = F.relu_(F.dropout(y, training=self.training))
    return self.b(z) + y


def in_place_sum_behind_dropout(self, x):
    y = self.a(x)
    z = F.dropout(y, training=self.training)
    z += self.b(y)
    return self.c(z) + y


def in_place_on_a_part(self, x):
    y = self.a(x)
    first, second = y[:, :4], y[:, 4:]
    z = self.b(y)
    first += z[:, :4]
    F.relu_(second)
    return self.c(y)


def in_place_sum_on_a_part(self, x):
    y = self.a(x)
    part = y[:]
    part += self.b(self.a(x))
    return y


def in_place_on_the_input(self, x):
    z = self.b(self.a(x))
    x += z[:, :3]
    return z


def in_place_on_a_view_of_the_input(self, x):
    part = x[:, :]
    part.add_(self.b(self.a(x))[:, :3])
    return x * 2


def in_place_outside(self, x):
    y = self.a(x)
    z = F.relu(self.b(y))
    y.mul_(2)
    return self.c(y) + z


def sum_with_a_number(self, x):
    return 1 + self.b(2.0 + F.relu(self.a(x)) + 1)


def sum_with_a_size(self, x):
    return F.relu(self.a(x) + x.shape[0]) + x.size(2)


def sum_of_other_shapes(self, x):
    y = self.a(x)
    return self.c(y + F.adaptive_avg_pool2d(y, 1))


def gate(self, y):
    return self.e(F.silu(self.d(y.mean((2, 3), keepdim=True))))


def squeeze_and_excite(self, x):
    y = F.silu(self.a(x))
    return self.c(y * gate(self, y).sigmoid())


def hard_gate_in_place(self, x):
    y = F.hardswish(self.a(x))
    return self.c(F.hardsigmoid(self.e(F.relu(self.d(F.adaptive_avg_pool2d(y, 1)), inplace=True)), inplace=True) * y)


def gate_without_a_convolution(self, x):
    y = self.a(x)
    return self.c(y) * torch.sigmoid(gate(self, y))


def gated_twice_read(self, x):
    y = self.a(x)
    z = y * torch.sigmoid(gate(self, y))
    return self.c(z) + z


def gate_read_elsewhere(self, x):
    y = self.a(x)
    s = torch.sigmoid(gate(self, y))
    return self.c(s * y) + s


def gate_over_a_distance(self, x):
    y = self.a(x)
    z = y * torch.sigmoid(gate(self, y))
    other = torch.fft.fft(x).real[:, :1]
    return self.c(z) + other


def gate_of_two(self, x):
    y = self.a(x)
    s = torch.sigmoid(gate(self, y))
    return self.c(s * y) + self.c(F.relu(y) * s)


def gate_of_a_gate(self, x):
    y = self.a(x)
    s = torch.sigmoid(gate(self, y))
    return self.c((y * s) * s)


def gate_not_pooled(self, x):
    y = self.a(x)
    return self.c(y * torch.sigmoid(self.b(y)))


def mean_over_more(self, x):
    y = self.a(x)
    return self.c(y * torch.sigmoid(y.mean((1, 2, 3), keepdim=True))) + y.mean((2, 3))[:, :, None, None]


def sum_with_alpha(self, x):
    y = self.a(x)
    return torch.add(y, self.b(y), alpha=3)


def sum_with_itself(self, x):
    y = self.a(x)
    y += y
    return self.b(y)


def keywords(self, x):
    y = F.relu(input=self.a[0](input=x))
    return F.hardtanh(self.b(input=y), max_val=6.0, min_val=0.0)


def other_activations(self, x):
    y = F.hardtanh(self.a(x), -2, 2)
    return F.gelu(self.b(F.leaky_relu(y))).relu().sigmoid()


def several_results(self, x):
    y = self.a(x)
    z = F.silu(self.b(y))
    return [y, {"z": z, "w": (self.c(z), x, 3)}, z]


def one_value_twice(self, x):
    y = F.dropout(F.relu(self.a(x)), training=self.training)
    return y, y, self.b(y)


def views(self, x):
    """Where the memory format is seen."""
    n = x.shape[0]
    y = self.b(self.a(x))
    return y.reshape(n, -1) + self.c(y).flatten(1), y.permute(0, 2, 3, 1).reshape(n, -1)


def pools(self, x):
    y = self.b(self.a(x))
    z = F.relu(F.adaptive_avg_pool2d(F.relu(self.c(y)), output_size=1))
    return z, F.adaptive_avg_pool2d(y, (1, 2)), F.adaptive_avg_pool2d(y, (1, 1)).view(-1, 8)


def one_layer_often(self, x):
    y = self.a(x)
    for _ in range(3):
        y = y + F.relu(self.b(y))
    return y


def runs_apart(self, x):
    y = torch.tanh(self.a(x))
    z = torch.tanh(self.b(y) + y)
    return F.relu(z) + self.c(z)


def unused(self, x):
    self.b(self.a(x))
    F.relu(self.a(x))
    return self.c(self.a(x))


def dictionary(self, x, options={"scale": 2}):  # noqa: B006
    return self.b(self.a(x)) * options.get("scale")


def keeps(self, x):
    """It leaves something on itself, and on a part."""
    self.seen = self.a(x)
    self.b.times = x.shape[0]
    return self.b(self.seen)


def records(self, x):
    self.seen = self.a(x)
    self.times = getattr(self, "times", 0) + 1
    return self.b(self.seen) * self.times


def lists(self, x):
    self.__dict__.setdefault("all", []).append(x)
    return self.b(self.a(x)) + len(self.all)


def is_a_tensor(self, x):
    return self.b(self.a(x * 2 if isinstance(x, torch.Tensor) else x))


def draws(self, x):
    return self.b(self.a(x)) + torch.rand(8, 1, 1)


def asks_for_gradients(self, x):
    y = self.b(self.a(x))
    return y if torch.is_grad_enabled() else y * 2


def branches(self, x):
    return self.b(self.a(x)) if x.sum() > 0 else self.c(self.a(x))


SURPRISING = dict(map(forwards, (
    in_place_on_what_is_read, in_place_sum_on_what_is_read, in_place_behind_dropout, in_place_sum_behind_dropout,
    in_place_on_a_part, in_place_sum_on_a_part, in_place_on_the_input, in_place_on_a_view_of_the_input,
    in_place_outside, sum_with_a_number, sum_with_a_size, sum_of_other_shapes, sum_with_alpha, sum_with_itself,
    keywords, other_activations, several_results, one_value_twice, views, pools, one_layer_often, runs_apart, unused,
    squeeze_and_excite, hard_gate_in_place, gate_without_a_convolution, gated_twice_read, gate_read_elsewhere,
    gate_over_a_distance, gate_of_two, gate_of_a_gate, gate_not_pooled, mean_over_more,
    dictionary, keeps, records, lists, is_a_tensor, draws, asks_for_gradients, branches,
)))  # fmt: skip
globals().update(SURPRISING)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", SURPRISING)
def test_forwards(name, layout):
    """As the stock network, call by call: results, inputs, and what it leaves on itself."""
    torch.manual_seed(1)
    stock = randomise(SURPRISING[name]()).double().eval()
    model = mnops.deploy(mnops.fuse(copy.deepcopy(stock)))
    for attribute in ("seen", "times", "all"):  # torch.fx has run it
        model.__dict__.pop(attribute, None), model.b.__dict__.pop(attribute, None)
    for grad, x in ((False, X * 0), (False, X), (True, X), (False, -X), (False, images(1, 11, dtype=torch.float64))):
        given = [x.clone(memory_format=layout) for _ in range(2)]
        with torch.set_grad_enabled(grad):
            results = []
            for m, t in zip((model, stock), given):
                torch.manual_seed(0)
                results.append(m(t))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(*given, rtol=1e-9, atol=1e-9)
    for attribute in ("seen", "times", "all"):
        mine, theirs = (getattr(m, attribute, None) for m in (model, stock))
        torch.testing.assert_close(torch.utils._pytree.tree_map(lazy.real, mine), theirs, rtol=1e-9, atol=1e-9)
    assert getattr(model.b, "times", None) == getattr(stock.b, "times", None)


NOT_PLANNED = {
    "keeps", "records", "lists", "is_a_tensor", "draws", "asks_for_gradients", "gate_over_a_distance",
    "gate_read_elsewhere",
}  # fmt: skip


@pytest.mark.parametrize("name", SURPRISING)
def test_which_forwards_are_planned(name, runs):
    model = mnops.deploy(mnops.fuse(SURPRISING[name]().double().eval()))
    with torch.no_grad():
        for _ in range(2):
            runs.clear()
            model(X.clone())
    assert bool(runs) == (name not in NOT_PLANNED)


def test_parts_of_what_cannot_be_traced_have_plans(runs):
    model = nn.Sequential(conv_norm_act(3, 8), SURPRISING["branches"](3).double())
    model[0] = conv_norm_act(3, 3, 3, groups=3)
    model = mnops.deploy(mnops.fuse(model.double().eval()))
    with torch.no_grad():
        for x in (X, -X):
            assert_same(model, x)
    assert "forward" not in model.__dict__
    assert len(runs) > 3


def test_nothing_fused_no_plan(runs):
    model = NETWORKS["v2"]().double().eval()
    model(X)
    model = mnops.deploy(randomise(model))
    assert not any("forward" in m.__dict__ for m in model.modules())
    expected = model(X)
    assert not runs
    scripted = torch.jit.script(nn.Sequential(model[0], *model[4:-1], nn.Linear(8, 5).double()))
    assert scripted(X).shape == expected.shape
    mobilenet = mnops.deploy(mnops.MobileNet(5, 0.25))
    assert not any("forward" in m.__dict__ for m in mobilenet.modules())


def test_a_fused_part_of_a_network_is_planned(runs):
    """The rest of it was never fused."""
    body, head = NETWORKS["v2"](), nn.Linear(5, 3)
    model = nn.Sequential(nn.Sequential(*body), head).double().eval()
    model(X)
    mnops.fuse(model[0])
    model = mnops.deploy(randomise(model))
    assert_planned(model, runs, X)


def test_a_plan_is_made_once(monkeypatch):
    made, make = [], plan.plan
    monkeypatch.setattr(plan, "plan", lambda module: made.append(module) or make(module))
    model = small()
    for x in (X, X[:1], X.contiguous(memory_format=torch.channels_last)):
        model(x)
    assert made.count(model) == 1 and len(made) == 2  # and that of a copy, to try it
    model[0][2] = nn.ReLU()
    model(X), model(X)
    assert made.count(model) == 2 and len(made) == 4
    for name in ("records", "lists", "draws"):  # each call is another: not asked again
        made.clear()
        other = mnops.deploy(mnops.fuse(SURPRISING[name]().double().eval()))
        other(X), other(X)
        assert len(made) == 1
