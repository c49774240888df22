"""MobileNet as a user writes it in plain PyTorch, the stock side of every comparison. No mnops in it.

Its state_dict has the keys and shapes of timm's mobilenetv1_100, so one set of weights serves everybody.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
}

# (pointwise outputs, depthwise stride) of each block, by stage: the body of Howard et al. 2017, table 1
STAGES = [
    [(64, 1)],
    [(128, 2), (128, 1)],
    [(256, 2), (256, 1)],
    [(512, 2)] + [(512, 1)] * 5,
    [(1024, 2), (1024, 1)],
]


def activation(name: str) -> nn.Module:
    return nn.Identity() if name == "none" else ACTIVATIONS[name](inplace=True)


def conv_bn_act(
    channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    act: str = "relu",
) -> nn.Sequential:
    """Convolution, BatchNorm, activation: the run of modules that mnops replaces."""
    conv = nn.Conv2d(channels, out_channels, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), activation(act))


class DepthwiseSeparable(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int, act: str):
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv_pw = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv_dw(x)))
        return self.act(self.bn2(self.conv_pw(x)))


class StockMobileNet(nn.Module):
    """(N, 3, H, W) -> (N, num_classes)."""

    def __init__(self, width: float = 1.0, num_classes: int = 1000, act: str = "relu"):
        super().__init__()
        channels = round(32 * width)
        self.conv_stem = nn.Conv2d(3, channels, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = activation(act)
        stages = []
        for stage in STAGES:
            blocks = []
            for out, stride in stage:
                blocks.append(DepthwiseSeparable(channels, round(out * width), stride, act))
                channels = round(out * width)
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act(self.bn1(self.conv_stem(x))))
        return self.classifier(x.mean((2, 3)))


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter and running statistic with seeded values that a trained network could have."""
    generator = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            with torch.no_grad():
                m.weight.uniform_(0.5, 1.5, generator=generator)
                m.bias.uniform_(-0.5, 0.5, generator=generator)
                m.running_mean.normal_(0, 0.1, generator=generator)
                m.running_var.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight, generator=generator)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return module
