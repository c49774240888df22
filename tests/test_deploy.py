"""mnops.deploy: the same outputs with the BatchNorms folded, here, copied, and through export."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torchvision_support
from fused_models import NETWORKS, SURPRISES
from small import images, network, randomise
from torch import nn

import mnops
from mnops.models import VARIANTS
from mnops.nn import Folded

X = images(4, 16, dtype=torch.float64)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "same", "bn_eps": 1e-3, "act": "relu"},
        {"stages": VARIANTS["conv"][:2], "act": "hardswish"},
        {"depth_multiplier": 2, "act": "silu", "rho": 0.7},
        {"fused": False},
        {"features_only": True, "stages": VARIANTS["shallow"]},
    ],
    ids=str,
)
def test_mobilenet(options):
    model, x = network(**options).double(), images(2, 48, dtype=torch.float64)
    model.train()
    before = state(model)
    deployed = mnops.deploy(model)
    assert model.training
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert not norms(deployed)
    assert not deployed.training
    assert not any(p.requires_grad for p in deployed.parameters())
    torch.testing.assert_close(deployed(x), model.eval()(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(deployed(x[:0]), model(x[:0]))


def test_it_runs_fused_here():
    deployed, x = mnops.deploy(network()), images()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        deployed(x)
    names = {event.key for event in profile.key_averages()}
    assert {"mnops::stem_conv2d", "mnops::run_layers"} <= names
    assert not any("batch_norm" in name or "convolution" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half(dtype):
    """As near to fp64 as the network in half precision with its norms: folded in fp64, rounded once."""
    model, x = network().to(dtype), images().to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    error, stock = ((m(x).double() - exact).norm() for m in (mnops.deploy(model), model))
    assert error <= 2 * stock


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_other_networks(make, fused):
    model = make().double().eval()
    model(X)  # LazyLinear
    randomise(model)
    deployed = mnops.deploy(mnops.fuse(copy.deepcopy(model)) if fused else model)
    assert not norms(deployed)
    torch.testing.assert_close(deployed(X), model(X), rtol=1e-9, atol=1e-9)
    names = {str(n.target) for n in torch.export.export(deployed, (X,)).graph.nodes}
    assert not any("norm" in name or "mnops" in name for name in names)


LEFT = {  # norms that cannot be folded
    "view before in-place": 1,  # not for torch.fx
    "with its norm and bare": 1,
    "convolution's output changed": 1,
    "no running statistics": 1,
    "norm in training": 2,
    "weight_norm": 1,
    "old weight_norm": 1,
    "LoRA": 1,
}


@pytest.mark.parametrize("name", SURPRISES)
@pytest.mark.filterwarnings("ignore:deploy")
def test_surprises(name):
    model = randomise_norms(SURPRISES[name][0]().double().eval())
    with torch.no_grad():
        expected, deployed = model(X), mnops.deploy(model)
        torch.testing.assert_close(deployed(X), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mnops.deploy(mnops.fuse(model))(X), expected, rtol=1e-9, atol=1e-9)
    assert len(norms(deployed)) == LEFT.get(name, 0)


def randomise_norms(model):
    for m in norms(model):
        if m.running_mean is not None:
            nn.init.normal_(m.running_mean), nn.init.uniform_(m.running_var, 0.5, 2)
        if m.weight is not None:
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.normal_(m.bias)
    return model


class Tapped(nn.Module):
    """Something else sees the convolution's output."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.bn, self.how = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), how

    def forward(self, x):
        y = self.conv(x)
        if self.how == "sum":
            return self.bn(y) + y
        if self.how == "weight":
            return self.bn(y) * self.conv.weight.sum()
        if self.how == "output":
            return self.bn(y), y
        return self.bn(y) if y.sum() > 0 else y  # not for torch.fx


@pytest.mark.parametrize("how", ["sum", "weight", "output", "data"])
def test_a_tapped_convolution_is_left(how):
    model = randomise_norms(Tapped(how).double().eval())
    with pytest.warns(UserWarning, match="deploy: 1 BatchNorms are not folded: bn"):
        deployed = mnops.deploy(model)
    for x in (X, -X):
        torch.testing.assert_close(deployed(x), model(x))


def test_what_has_hooks_is_left():
    model, seen = network().double(), []
    model.blocks[1][0].conv_dw.register_forward_hook(lambda m, args, out: seen.append(out))
    with pytest.warns(UserWarning, match=r"deploy: 1 BatchNorms are not folded: blocks\.1\.0\.bn1"):
        deployed = mnops.deploy(model)
    model(X), deployed(X)
    torch.testing.assert_close(seen[0], seen[1])


def test_a_part_that_cannot_be_traced():
    """Its parts can."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network(num_classes=0)

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.body(-x)

    model = Branching().double().eval()
    deployed = mnops.deploy(model)
    assert not norms(deployed)
    torch.testing.assert_close(deployed(X), model(X))


def test_other_dimensions():
    layers = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1), nn.BatchNorm1d(2)
    model, x = randomise_norms(nn.Sequential(*layers).double().eval()), X[:, :, 0]
    deployed = mnops.deploy(model)
    assert not norms(deployed)
    torch.testing.assert_close(deployed(x), model(x))


# ---- for inference, to be kept ----


def test_it_does_not_train():
    deployed = mnops.deploy(network())
    assert deployed.eval() is deployed
    with pytest.raises(RuntimeError, match="deploy: a folded BatchNorm cannot be trained"):
        deployed.train()
    with pytest.raises(TypeError, match="deploy: model must be a torch.nn.Module, got function"):
        mnops.deploy(lambda x: x)


def other():
    model = mnops.fuse(NETWORKS["attributes"]()).eval()
    model(images())  # LazyLinear
    return model


@pytest.mark.parametrize("make", [network, other])
def test_copies(make):
    deployed, x = mnops.deploy(make()), images()
    file = io.BytesIO()
    torch.save(deployed, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for copied in (copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed)), loaded):
        torch.testing.assert_close(copied(x), deployed(x), rtol=0, atol=0)
    again = mnops.deploy(make())
    again.load_state_dict(deployed.state_dict())
    torch.testing.assert_close(again(x), deployed(x), rtol=0, atol=0)
    twice = mnops.deploy(deployed)
    torch.testing.assert_close(twice(x), deployed(x), rtol=0, atol=0)


def test_nothing_to_fold():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
        torch.testing.assert_close(mnops.deploy(model)(X.float()), model(X.float()))


def test_round_trip_through_export(tmp_path):
    model, x = network(), images()
    program = torch.export.export(mnops.deploy(model), (x,))
    names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert all(name.startswith("aten.") for name in names)
    assert not any("norm" in name for name in names)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilenetv1_100"])
def test_timm(name):
    """BatchNormAct2d: its activation stays."""
    timm = pytest.importorskip("timm") if torchvision_support.load() else None
    model, x = randomise(timm.create_model(name, num_classes=5)).double().eval(), X
    for deployed in (mnops.deploy(model), mnops.deploy(mnops.fuse(copy.deepcopy(model)))):
        assert not norms(deployed)
        assert sum(isinstance(m, Folded) for m in deployed.modules()) == len(norms(model))
        torch.testing.assert_close(deployed(x), model(x), rtol=1e-9, atol=1e-9)
