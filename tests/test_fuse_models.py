"""mnops.fuse on the models of torchvision and timm: outputs, gradients and running statistics of stock."""

import copy

import pytest
import torch
import torchvision_support
from test_fuse import assert_same, everything
from torch import nn

import mnops
from mnops.fuse import Conv2d

# how many convolutions are fused by default, how many can be, of how many
TORCHVISION = {
    "mobilenet_v2": (52, 52, 52),
    "mobilenet_v3_small": (34, 34, 52),
    "mobilenet_v3_large": (46, 46, 62),
    "efficientnet_b0": (49, 49, 81),
    "mnasnet0_5": (52, 52, 52),
    "shufflenet_v2_x0_5": (56, 56, 56),
    "regnet_y_400mf": (0, 33, 85),
    "convnext_tiny": (0, 0, 22),
}
TIMM = {
    "mobilenetv1_100": (27, 27, 27),
    "mobilenetv2_050": (52, 52, 52),
    "mobilenetv3_small_050": (34, 34, 53),
    "mobilenetv4_conv_small": (42, 44, 46),
    "efficientnet_b0": (49, 49, 81),
    "mixnet_s": (15, 15, 123),
    "ghostnet_050": (80, 80, 95),
}


def prepared(model):
    """Nothing random in it."""
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        for name in ("drop_prob", "p"):
            if type(m).__name__ in ("StochasticDepth", "DropPath") and hasattr(m, name):
                setattr(m, name, 0.0)
    return model.double()


def assert_fuses(model, counts, size=48):
    stock = prepared(model)
    by_default, fused = mnops.fuse(copy.deepcopy(stock)), mnops.fuse(copy.deepcopy(stock), everything)
    numbers = (sum(type(m) is Conv2d for m in model.modules()) for model in (by_default, fused))
    assert (*numbers, len(mnops.fusion_report(fused))) == counts
    x = torch.randn(2, 3, size, size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    assert_same(stock, fused, x, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "counts"), TORCHVISION.items(), ids=TORCHVISION)
def test_torchvision(name, counts):
    models = torchvision_support.load().models
    assert_fuses(getattr(models, name)(num_classes=4), counts)


@pytest.mark.parametrize(("name", "counts"), TIMM.items(), ids=TIMM)
def test_timm(name, counts):
    torchvision_support.load()
    timm = pytest.importorskip("timm", reason="timm is not installed")
    assert_fuses(timm.create_model(name, num_classes=4, drop_rate=0.0), counts)


# ---- heads over them ----


def run_seeded(model, *args):
    """Loss or losses, gradients, state of a training step; outputs in eval."""
    torch.manual_seed(0)
    model.train().zero_grad()
    out = model(*args)
    losses = list(out.values())
    sum(t.square().sum() for t in losses).backward()
    found = [losses, [p.grad for p in model.parameters()], copy.deepcopy(model.state_dict())]
    with torch.no_grad():
        return [*found, model.eval()(args[0])]


def assert_same_seeded(model, *args):
    stock = prepared(model)
    fused = mnops.fuse(copy.deepcopy(stock))
    assert sum(type(m) is Conv2d for m in fused.modules()) > 30
    torch.testing.assert_close(run_seeded(fused, *args), run_seeded(stock, *args), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_segmentation(name):
    models = torchvision_support.load().models.segmentation
    model = getattr(models, name)(weights=None, weights_backbone=None, num_classes=3)
    assert_same_seeded(model, torch.randn(2, 3, 48, 48, dtype=torch.float64))


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_detection(name):
    models = torchvision_support.load().models.detection
    size = {} if "ssd" in name else {"min_size": 64, "max_size": 64}
    model = getattr(models, name)(weights=None, weights_backbone=None, num_classes=3, **size)
    boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]], dtype=torch.float64)
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in range(2)]
    images = [torch.rand(3, 64, 64, dtype=torch.float64) for _ in range(2)]
    assert_same_seeded(model, images, targets)
