"""mnops.fuse on the block shapes of the mobile networks and on surprises: nothing changes but the time."""

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
from fused_models import NETWORKS, PARTLY, SURPRISES, InvertedResidual, conv_norm_act, network
from torch import nn

import mnops
from mnops.fuse import Conv2d
from mnops.lazy import LazyTensor

each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
each_surprise = pytest.mark.parametrize(("make", "count"), SURPRISES.values(), ids=SURPRISES.keys())
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def made(make):
    model = make().double()
    with torch.no_grad():
        model(X)  # LazyLinear
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d) and m.weight is not None:
                m.weight.uniform_(0.5, 1.5), m.bias.normal_()
    return model


def everything(conv, name):
    return True


def pair(make):
    """A model, and a copy of it with everything fused that can be."""
    model = made(make)
    return model, mnops.fuse(copy.deepcopy(model), everything)


def run(model, x=X):
    """Everything a forward and backward leave behind."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    z = model(x)
    model.zero_grad()
    z.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"z": z.detach(), "dx": x.grad, "grads": grads, "state": copy.deepcopy(model.state_dict())}


def assert_same(stock, fused, x=X, **tolerance):
    tolerance = tolerance or {"rtol": 1e-7, "atol": 1e-9}
    for mode in (True, True, False):
        torch.testing.assert_close(run(fused.train(mode), x), run(stock.train(mode), x), **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), stock(x), **tolerance)


def fused_convs(model):
    return [m for m in model.modules() if type(m) is Conv2d]


@each_network
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_networks(make, layout):
    stock, fused = pair(make)
    x = X.contiguous(memory_format=layout)
    assert_same(stock, fused, x)


@each_surprise
def test_surprises(make, count):
    stock, fused = pair(make)
    assert len(fused_convs(fused)) == count
    assert_same(stock, fused)


@pytest.mark.parametrize("name", PARTLY)
def test_networks_in_part(name):
    """What an op serves is fused, the rest left, and both give what they gave."""
    make, counts = PARTLY[name]
    stock, fused = pair(make)
    by_default = mnops.fuse(copy.deepcopy(stock))
    report = mnops.fusion_report(fused)
    assert (len(fused_convs(by_default)), len(fused_convs(fused)), len(report)) == counts
    for model in (fused, by_default):
        assert_same(copy.deepcopy(stock), model, X.contiguous(memory_format=torch.channels_last))


def events(report):
    return {layer.name: list(dict.fromkeys(layer.events)) for layer in report}


def test_inverted_residual_is_chained():
    """Expand, depthwise, project: three stored tensors and their sum."""
    _, fused = pair(NETWORKS["v2"])
    found = events(mnops.fusion_report(fused, X))
    assert found["1.conv.0.0"] == ["chained into 1.conv.1.0"]
    assert found["1.conv.1.0"] == ["chained into 1.conv.2"]
    assert found["2.conv.2"][0] == "chained into 3.conv.0.0"
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused[1](torch.randn(2, 8, 8, 8, dtype=torch.float64))
    assert not any(type(t) is LazyTensor for t in saved)
    maps = {t.untyped_storage().data_ptr(): t for t in saved if t.dim() == 4 and t.shape[2] == 8}
    assert len(maps) == 4  # x, and the three convolutions' outputs


def test_attributes_are_chained():
    _, fused = pair(NETWORKS["attributes"])
    found = events(mnops.fusion_report(fused, X))
    assert found["1.conv_pw"] == ["chained into 1.conv_dw"]
    assert found["1.conv_dw"] == ["made real by adaptive_avg_pool2d", "made real by mul"]  # squeeze-excite
    assert found["2.conv_dw"] == ["chained into 2.conv_pwl"]


def test_concatenated_channels_are_chained():
    """GhostNet: what is pending on the two halves is pending on both."""
    _, fused = pair(NETWORKS["ghost"])
    found = events(mnops.fusion_report(fused, X.contiguous(memory_format=torch.channels_last)))
    assert found["1.cheap.0"] == ["concatenated"]
    assert found["1.primary.0"][:3] == [
        "chained into 1.cheap.0", "concatenated", "chained into 2.ghost1.primary.0"
    ]  # fmt: skip
    assert found["2.ghost2.primary.0"][1:] == ["concatenated", "made real with its sum"]


class Concatenated(nn.Module):
    """What does not go together in one norm, or is no concatenation of channels, or is a part of one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (conv_norm_act(3, 4, act=act) for act in (nn.ReLU, nn.Hardswish))
        self.c, self.d = (conv_norm_act(3, 4, 3, 1, 1, act) for act in (nn.ReLU, nn.ReLU))
        self.d[1].eps = 1e-3
        self.c[1] = nn.BatchNorm2d(4, affine=False)

    def forward(self, x):
        a, b, c, d = self.a(x), self.b(x), self.c(x), self.d(x)
        same = torch.cat([a, c, a], 1)
        parts = same[:, 2:], same[:, :, ::2], same[:, :12, :], same[..., None], same[0]
        others = torch.cat((a, b), 1), torch.cat((a, d), 1), torch.cat((a, c)), torch.cat((a, x), 1)
        return torch.stack([(t * t).mean() for t in (*parts, *others, torch.cat((c, c), -1))])


def test_what_is_concatenated():
    assert_same(*pair(Concatenated))


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format(layout, weights):
    """Every tensor that somebody looks at lies as stock's does."""
    x, found = X.contiguous(memory_format=layout), []
    for model in pair(NETWORKS["v3"]):
        model.to(memory_format=weights)
        strides = []
        for module in model.modules():
            module.register_forward_hook(lambda m, args, out, strides=strides: strides.append(out.stride()))
        model(x)
        found.append(strides)
    assert found[0] == found[1]


# ---- what stays ----


@each_network
def test_nothing_but_the_class_changes(make):
    model = made(make)
    before = {
        "state": {k: v.data_ptr() for k, v in model.state_dict().items()},
        "parameters": [id(p) for p in model.parameters()],
        "modules": [(name, id(m)) for name, m in model.named_modules()],
        "types": [type(m) for m in model.modules()],
        "hooks": [dict(m._forward_hooks) for m in model.modules()],
        "dicts": [set(m.__dict__) for m in model.modules()],
    }

    def now():
        return {
            "state": {k: v.data_ptr() for k, v in model.state_dict().items()},
            "parameters": [id(p) for p in model.parameters()],
            "modules": [(name, id(m)) for name, m in model.named_modules()],
            "types": [type(m) for m in model.modules()],
            "hooks": [dict(m._forward_hooks) for m in model.modules()],
            "dicts": [set(m.__dict__) for m in model.modules()],
        }

    assert mnops.fuse(model) is model
    fused = now()
    for what in ("state", "parameters", "modules"):
        assert fused[what] == before[what]
    assert fused["types"] != before["types"]
    mnops.fuse(model)  # again: nothing
    assert now() == fused
    assert mnops.unfuse(model) is model
    assert now() == before


def test_unfused_is_bitwise_stock():
    stock, fused = pair(NETWORKS["v2"])
    run(fused)
    fused.load_state_dict(stock.state_dict())
    torch.testing.assert_close(run(mnops.unfuse(fused)), run(stock), rtol=0, atol=0)


def test_optimiser_made_before():
    stock = made(NETWORKS["v2"])
    fused = copy.deepcopy(stock)
    optimisers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (stock, fused)]
    mnops.fuse(fused)
    for _ in range(3):
        for model, optimiser in zip((stock, fused), optimisers):
            run(model)
            optimiser.step()
    torch.testing.assert_close(fused.state_dict(), stock.state_dict())


@each_network
def test_copies(make):
    stock, fused = pair(make)
    saved = io.BytesIO()
    torch.save(fused, saved)
    saved.seek(0)
    for copied in (
        copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(saved, weights_only=False)
    ):  # fmt: skip
        assert len(fused_convs(copied)) == len(fused_convs(fused))
        torch.testing.assert_close(copied.eval()(X), stock.eval()(X))


def test_filter_and_report():
    model = made(NETWORKS["v3"])
    mnops.fuse(model, filter_fn=lambda conv, name: not name.startswith("1."))  # of all that can be
    assert not fused_convs(model[1])
    assert fused_convs(model[2])
    text = str(mnops.fusion_report(model))
    assert "1.conv.0.0       not fused" in text
    assert "2.conv.0.0       fused: pointwise + 1" in text
    assert text.endswith("7 of 12 convolutions fused")


class Bottleneck(nn.Sequential):
    """1x1, dense 3x3, 1x1, as in a ResNet."""

    def __init__(self, channels):
        super().__init__(
            conv_norm_act(channels, 20, act=nn.ReLU),
            conv_norm_act(20, 20, 3, act=nn.ReLU),
            conv_norm_act(20, channels, act=None),
        )


@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        ([Bottleneck(8), Bottleneck(8)], []),
        ([conv_norm_act(8, 8), conv_norm_act(8, 8)], []),
        ([conv_norm_act(8, 8, 3, 1, 8)], ["0.0", "1.0"]),
        ([conv_norm_act(8, 8), Bottleneck(8), conv_norm_act(8, 8, 3, 1, 8)], ["2.2.0", "3.0"]),
        ([conv_norm_act(8, 8, 3, 1, 8), *(conv_norm_act(8, 8) for _ in "ab")], ["0.0", "1.0", "2.0", "3.0"]),
        ([InvertedResidual(8, 8, squeeze=True)], ["0.0", "1.conv.0.0", "1.conv.1.0", "1.conv.3"]),
    ],
    ids=["dense", "1x1", "depthwise", "both", "1x1 behind 1x1", "squeeze-excite"],
)
def test_what_gains_is_fused(blocks, names):
    report = mnops.fusion_report(mnops.fuse(network(*blocks)))
    assert [layer.name for layer in report if type(layer.conv) is Conv2d] == names
    if not names:
        assert "left alone: no depthwise convolution is beside it" in str(report)
        assert str(report).endswith(f"0 of {len(report)} convolutions fused")


def test_report_leaves_the_model_alone():
    _, fused = pair(NETWORKS["v2"])
    fused[1].eval()
    modes, state = [m.training for m in fused.modules()], copy.deepcopy(fused.state_dict())
    mnops.fusion_report(fused, X)
    assert [m.training for m in fused.modules()] == modes
    torch.testing.assert_close(fused.state_dict(), state, rtol=0, atol=0)


def test_fallback_warning():
    _, fused = pair(NETWORKS["v2"])
    fused.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(X)
        with mnops.fallback_warnings(), pytest.raises(mnops.FallbackWarning, match="0.0 ran as stock.*trans"):
            torch.func.grad(lambda x: fused(x).sum())(X)
        torch.func.grad(lambda x: fused(x).sum())(X)


def test_nothing_pending_leaves_the_model():
    model = mnops.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), everything)
    assert type(model(X.float())) is torch.Tensor
    assert type(model[0](X.float())) is LazyTensor
    assert type(model.eval()(X.float())) is torch.Tensor


@pytest.mark.parametrize("bad", [torch.zeros(1), torch.relu, nn.Linear], ids=["tensor", "function", "class"])
def test_bad_model(bad):
    with pytest.raises(TypeError, match="fuse: model must be a torch.nn.Module"):
        mnops.fuse(bad)


def test_what_is_fused_already():
    """mnops' own blocks are left to chain themselves, alone or inside a model."""
    net = mnops.MobileNet(num_classes=3, width_mult=0.25)
    assert not mnops.fusion_report(mnops.fuse(net))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), mnops.nn.DepthwiseSeparable(8, 4)).double()
    fused = mnops.fuse(copy.deepcopy(model), everything)
    assert [layer.name for layer in mnops.fusion_report(fused)] == ["0"]
    assert_same(model, fused)


# ---- the ecosystem of a module ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["v2", "v3", "attributes"])
def test_autocast(name, dtype):
    """As near to fp64 as stock is under autocast."""
    stock, fused = pair(NETWORKS[name])
    exact = copy.deepcopy(stock)
    stock, fused = stock.float(), fused.float()

    def statistics(model):
        return [b for b in model.buffers() if b.is_floating_point()]

    def run_cast(model):
        with torch.autocast("cpu", dtype):
            z = model(X.float().contiguous(memory_format=torch.channels_last))
        z.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        return [z, *(p.grad for p in model.parameters()), *statistics(model)]

    def error(found):
        errors = [(a.double() - b).norm() / (b.norm() + 1e-3) for a, b in zip(found, expected)]
        return sum(errors).item() / len(errors)

    found = run(exact, X)
    expected = [found["z"], *found["grads"].values(), *statistics(exact)]
    found = run_cast(fused)
    assert found[0].dtype == dtype
    ours, theirs = error(found), error(run_cast(stock))
    assert ours <= 2 * theirs + torch.finfo(dtype).eps


def test_gradient_scaler():
    stock, fused = (m.float() for m in pair(NETWORKS["v2"]))
    for model in (stock, fused):
        optimiser, scaler = torch.optim.SGD(model.parameters(), 0.01), torch.amp.GradScaler("cpu")
        for _ in range(2):
            optimiser.zero_grad()
            scaler.scale(model(X.float()).square().mean()).backward()
            scaler.step(optimiser)
            scaler.update()
    torch.testing.assert_close(fused.state_dict(), stock.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_model(dtype):
    stock, fused = (m.to(dtype) for m in pair(NETWORKS["v3"]))
    exact = copy.deepcopy(stock).double()
    z, z_stock = run(fused, X.to(dtype))["z"], run(stock, X.to(dtype))["z"]
    expected = run(exact, X.to(dtype).double())["z"]
    error, error_stock = ((t.double() - expected).norm() for t in (z, z_stock))
    assert z.dtype == dtype
    assert error <= 2 * error_stock + torch.finfo(dtype).eps * expected.norm()


def test_fx():
    stock, fused = pair(NETWORKS["v2"])
    traced = torch.fx.symbolic_trace(fused.eval())
    torch.testing.assert_close(traced(X), stock.eval()(X))


def test_func():
    """torch.func gets stock operations, which have all its rules."""
    stock, fused = (m.eval() for m in pair(NETWORKS["v2"]))

    def derivatives(model):
        parameters = dict(model.named_parameters())

        def loss(parameters, x):
            return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
        return each, torch.func.jvp(model, (X,), (X.flip(0),))

    torch.testing.assert_close(derivatives(fused), derivatives(stock))
    called = torch.func.functional_call(fused, dict(stock.named_parameters()), (X,))  # no transform: fused
    torch.testing.assert_close(called, stock(X))


def test_dropout_between():
    """The same elements are dropped: what it sees lies in memory as stock's."""
    stock, fused = pair(SURPRISES["dropout between"][0])
    results = []
    for model in (stock, fused):
        model[3].p = 0.5
        torch.manual_seed(0)
        results.append(run(model))
    torch.testing.assert_close(*results)


def test_forward_mode():
    stock, fused = (m.eval() for m in pair(NETWORKS["v2"]))

    def tangent(model):
        with torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(X, X.flip(0)))
            return torch.autograd.forward_ad.unpack_dual(dual).tangent

    torch.testing.assert_close(tangent(fused), tangent(stock))


def test_double_backward():
    def penalty(model):
        x = X[:, :, :6, :6].clone().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        wanted = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(dx.square().sum(), wanted, allow_unused=True)

    stock, fused = pair(NETWORKS["attributes"])
    torch.testing.assert_close(penalty(fused), penalty(stock))


def test_inference_mode():
    stock, fused = pair(NETWORKS["v3"])
    for mode in (True, False):
        with torch.inference_mode():
            torch.testing.assert_close(fused.train(mode)(X), stock.train(mode)(X))
    assert_same(stock, fused)


def test_weight_averaging():
    averages = []
    for model in pair(NETWORKS["v2"]):
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
        )
        optimiser = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(2):
            run(model)
            optimiser.step()
            average.update_parameters(model)
        averages.append(average)
        average.module.train()
        torch.optim.swa_utils.update_bn([X], average)
    torch.testing.assert_close(averages[1].state_dict(), averages[0].state_dict())
    assert fused_convs(averages[1])


def test_freezing_layer_by_layer():
    stock, fused = pair(NETWORKS["v2"])
    for i in range(3):
        for model in (stock, fused):
            model[i].requires_grad_(False)
        torch.testing.assert_close(run(fused), run(stock))


def test_parametrised_after_fusing():
    stock, fused = pair(NETWORKS["v2"])
    for model in (stock, fused):
        torch.manual_seed(0)  # spectral_norm starts from a random vector
        nn.utils.parametrizations.weight_norm(model[1].conv[2])
        nn.utils.parametrizations.spectral_norm(model[2].conv[0][0])
    assert_same(stock, fused)


HOOKED = ["", "1", "1.conv.0", "1.conv.0.0", "1.conv.0.1", "1.conv.0.2", "1.conv.2", "1.conv.3", "2"]


@pytest.mark.parametrize("name", HOOKED)
def test_hooks(name):
    """Forward and backward hooks on any module see, and may change, what they would without mnops."""
    stock, fused = pair(NETWORKS["v2"])

    def results(model):
        module, seen = model.get_submodule(name), []
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach() + 0))
        module.register_forward_hook(lambda m, args, out: seen.append(out.detach() + 0))
        module.register_forward_hook(lambda m, args, out: out * 2)
        for m in model.modules():  # full backward hooks do not go with in-place activations, nor in stock
            if isinstance(m, nn.ReLU6):
                m.inplace = False
        module.register_full_backward_hook(lambda m, gin, gout: seen.extend([*gin, *gout]))
        return run(model), seen

    torch.testing.assert_close(results(fused), results(stock))


def test_hook_that_keeps_the_output():
    _, fused = pair(NETWORKS["v2"])
    kept = []
    fused[1].conv[0][1].register_forward_hook(lambda m, args, out: kept.append(out))
    fused(X)
    (z,) = kept
    assert isinstance(z, torch.Tensor)
    again = pickle.loads(pickle.dumps(z.detach()))
    for other in (again, copy.deepcopy(z.detach()), torch.from_numpy(z.detach().numpy()), z.clone(), z.cpu()):
        torch.testing.assert_close(other, z)
        assert type(other) is torch.Tensor
    assert repr(z).startswith("tensor(")


def test_synchronised_norms_alone():
    stock, fused = pair(NETWORKS["v2"])
    before = mnops.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(stock)), everything)
    after = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    expected = run(stock)
    for model in (before, after):
        torch.testing.assert_close(run(model), expected)
    assert type(mnops.unfuse(before)[0][1]) is nn.SyncBatchNorm


def test_a_residual_is_added_as_it_is_made_real():
    """x + conv(x) and y += x: one pass, the normalised tensor is not stored."""
    for name in ("v2", "v3"):
        _, fused = pair(NETWORKS[name])
        x = X.contiguous(memory_format=torch.channels_last)
        found = events(mnops.fusion_report(fused, x))
        assert "made real with its sum" in found["3.conv.2"]
        calls = []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fused.eval()(x)
        calls = [e.name for e in profile.events()]
        assert not any(c in ("aten::add", "aten::add_") for c in calls)


class PartlyWithoutGrad(nn.Module):
    """A backbone without gradients, whose last activation and head have them, and the other way round."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (conv_norm_act(3, 3, act=None) for _ in range(2))
        self.head = conv_norm_act(3, 4)

    def forward(self, x):
        with torch.no_grad():
            a = self.a(x)
        b = self.b(x)
        with torch.no_grad():
            c = torch.relu(b)
            d = torch.relu_(b)
        return self.head(a) + self.head(torch.relu(a)) * self.head(c) - self.head(d) * self.head(b)


def test_parts_without_gradients():
    stock, fused = pair(PartlyWithoutGrad)
    assert_same(stock, fused)
    assert all(p.grad is None for p in fused.a.parameters())


def test_nothing_is_kept():
    """No cycle of references holds a tensor of the step beyond it."""

    def alive():
        return sum(type(o) is LazyTensor for o in gc.get_objects())

    _, fused = pair(NETWORKS["v3"])
    run(fused)
    gc.collect()
    gc.disable()
    try:
        before = alive()  # a compiler's examples, where other tests compiled
        run(fused)
        assert alive() == before
    finally:
        gc.enable()


def test_pending_tensor_inside_a_transform():
    """A pending tensor from outside, used inside torch.func.grad, is a constant there."""
    stock, fused = (m.eval()[:2] for m in pair(NETWORKS["v2"]))

    def derivative(model):
        z = model(X)
        assert z.requires_grad
        return torch.func.grad(lambda s: (z.detach() * s).square().sum())(torch.tensor(2.0).double())

    torch.testing.assert_close(derivative(fused), derivative(stock))
    y = {model: model[0][0](X) for model in (stock, fused)}

    def normalised(model):
        return lambda w: torch.relu(nn.functional.batch_norm(y[model], None, None, w, None, True)).pow(3).sum()

    weight = torch.rand(8, dtype=torch.float64)
    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacfwd):
        weights = weight.expand(2, 8) if transform is torch.func.vmap else weight
        torch.testing.assert_close(transform(normalised(fused))(weights), transform(normalised(stock))(weights))
