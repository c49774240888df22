"""mnops.fuse on the block shapes of the mobile networks and on surprises: nothing changes but the time."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from fused_models import NETWORKS, SURPRISES
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


def pair(make):
    """A model, and a fused copy of it."""
    model = made(make)
    return model, mnops.fuse(copy.deepcopy(model))


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
    assert found["1.conv_dw"] == ["made real by adaptive_avg_pool2d"]  # squeeze-excite
    assert found["2.conv_dw"] == ["chained into 2.conv_pwl"]


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
    mnops.fuse(model, filter_fn=lambda conv, name: not name.startswith("1."))
    assert not fused_convs(model[1])
    assert fused_convs(model[2])
    text = str(mnops.fusion_report(model))
    assert "1.conv.0.0       not fused" in text
    assert "2.conv.0.0       fused: pointwise + 1" in text
    assert text.endswith("7 of 12 convolutions fused")


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
    model = mnops.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert type(model(X.float())) is torch.Tensor
    assert type(model[0](X.float())) is LazyTensor
    assert type(model.eval()(X.float())) is torch.Tensor


@pytest.mark.parametrize("bad", [torch.zeros(1), torch.relu, nn.Linear], ids=str)
def test_bad_model(bad):
    with pytest.raises(TypeError, match="fuse: model must be a torch.nn.Module"):
        mnops.fuse(bad)
