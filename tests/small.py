"""A MobileNet small enough for whoever traces, converts or compiles it."""

import torch
from torch import nn

import mnops
from mnops.models import STAGES


def randomise(model: nn.Module) -> nn.Module:
    """Norms and classifiers drawn at random: at their start they are identities and near zero."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    return model


def network(**options) -> mnops.MobileNet:
    """Stem and three separable layers, strides 1 and 2, five classes."""
    torch.manual_seed(0)
    defaults = dict(num_classes=5, width_mult=0.25, act="relu6", stages=STAGES[:2])
    return randomise(mnops.MobileNet(**defaults | options)).eval()


def images(batch: int = 2, size: int = 32, **options) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), **options)
