"""Models for the tests of mnops.fuse: block shapes of the mobile networks, and what surprises a rewriter."""

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations
import torch.utils.checkpoint
from torch import nn


def conv_norm_act(i, o, kernel=1, stride=1, groups=1, act=nn.ReLU6, bias=False):
    """The shape of torchvision's Conv2dNormActivation, activation in place."""
    layers = [nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=bias), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([act(inplace=True)] if act else []))


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        s = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(s))))


class InvertedResidual(nn.Module):
    """Sequential children, as torchvision's MobileNetV2, V3, MNASNet, EfficientNet."""

    def __init__(self, i, o, kernel=3, stride=1, act=nn.ReLU6, squeeze=False, add="out"):
        super().__init__()
        self.add = add if stride == 1 and i == o else None
        layers = [conv_norm_act(i, 3 * i, act=act), conv_norm_act(3 * i, 3 * i, kernel, stride, 3 * i, act)]
        layers += [SqueezeExcite(3 * i)] if squeeze else []
        self.conv = nn.Sequential(*layers, nn.Conv2d(3 * i, o, 1, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        y = self.conv(x)
        if self.add == "in place":
            y += x
            return y
        return x + y if self.add else y


class NormAct(nn.BatchNorm2d):
    """The shape of timm's BatchNormAct2d: a forward of its own around F.batch_norm, then activation."""

    def __init__(self, channels, act=nn.ReLU):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act(inplace=True) if act else nn.Identity()

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return self.act(self.drop(x))


class AttributeBlock(nn.Module):
    """Attributes, as timm's InvertedResidual."""

    def __init__(self, i, o, stride=1, act=nn.SiLU, squeeze=True):
        super().__init__()
        self.conv_pw, self.bn1 = nn.Conv2d(i, 3 * i, 1, bias=False), NormAct(3 * i, act)
        self.conv_dw = nn.Conv2d(3 * i, 3 * i, 5, stride, 2, groups=3 * i, bias=False)
        self.bn2 = NormAct(3 * i, act)
        self.se = SqueezeExcite(3 * i) if squeeze else nn.Identity()
        self.conv_pwl, self.bn3 = nn.Conv2d(3 * i, o, 1, bias=False), NormAct(o, None)
        self.skip = stride == 1 and i == o

    def forward(self, x):
        y = self.bn1(self.conv_pw(x))
        y = self.bn2(self.conv_dw(y))
        y = self.bn3(self.conv_pwl(self.se(y)))
        return x + y if self.skip else y


class Functional(nn.Module):
    """Functions in forward, all convolutions registered before all norms."""

    def __init__(self, i, o):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(i, i, 3, 1, 1, groups=i), nn.Conv2d(i, o, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(i), nn.BatchNorm2d(o)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return torch.relu(self.bn2(self.conv2(x)))


class Shuffle(nn.Module):
    """The unit of ShuffleNetV2."""

    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_norm_act(half, half, act=nn.ReLU),
            conv_norm_act(half, half, 3, groups=half, act=None),
            conv_norm_act(half, half, act=nn.ReLU),
        )

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        n, c, h, w = x.shape
        x = torch.cat((a, self.branch(b)), dim=1)
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Ghost(nn.Module):
    """The module of GhostNet."""

    def __init__(self, i, o, act=nn.ReLU):
        super().__init__()
        self.primary, self.channels = conv_norm_act(i, o // 2, act=act), o
        self.cheap = conv_norm_act(o // 2, o // 2, 3, groups=o // 2, act=act)

    def forward(self, x):
        a = self.primary(x)
        return torch.cat((a, self.cheap(a)), dim=1)[:, : self.channels, :, :]


class GhostBlock(nn.Module):
    """The bottleneck of GhostNet."""

    def __init__(self, i, o):
        super().__init__()
        self.ghost1, self.ghost2 = Ghost(i, 2 * i), Ghost(2 * i, o, None)
        self.shortcut = nn.Sequential(conv_norm_act(i, i, 3, 1, i, None), conv_norm_act(i, o, act=None))

    def forward(self, x):
        y = self.ghost2(self.ghost1(x))
        y += self.shortcut(x)
        return y


class Mixed(nn.Module):
    """The depthwise part of MixNet: a kernel size for each share of the channels, one of them dilated."""

    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.parts = nn.ModuleDict({
            "0": nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            "1": nn.Conv2d(half, half, 5, padding=4, dilation=2, groups=half, bias=False),
        })  # fmt: skip
        self.half = half

    def forward(self, x):
        shares = torch.split(x, [self.half, self.half], 1)
        return torch.cat([conv(share) for share, conv in zip(shares, self.parts.values())], 1)


class ConvNeXt(nn.Module):
    """The block of ConvNeXt: depthwise 7x7, LayerNorm, two Linear with GELU between."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 7, 1, 3, groups=channels), nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


class RegNet(nn.Module):
    """The block of RegNetY: 1x1, grouped 3x3, squeeze-excite, 1x1, the activation after the sum."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            conv_norm_act(channels, channels, act=nn.ReLU),
            conv_norm_act(channels, channels, 3, groups=2, act=nn.ReLU),
            SqueezeExcite(channels),
            conv_norm_act(channels, channels, act=None),
        )

    def forward(self, x):
        return F.relu(x + self.body(x), inplace=True)


class Gelu(nn.Module):
    """The 1x1 and depthwise layers of timm's mobilenetv4_hybrid_large, whose activation no kernel has."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 2 * channels, 1, bias=False), nn.BatchNorm2d(2 * channels)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1, groups=2 * channels, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * channels)
        self.conv3, self.bn3 = nn.Conv2d(2 * channels, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.gelu(self.bn1(self.conv1(x)))
        y = F.gelu(self.bn2(self.conv2(y)))
        return x + self.bn3(self.conv3(y))


def network(*blocks, channels=8):
    """A stem, the blocks, a pooled classifier."""
    return nn.Sequential(
        conv_norm_act(3, channels, 3, 2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5)
    )


NETWORKS = {
    "v2": lambda: network(InvertedResidual(8, 8), InvertedResidual(8, 12, 3, 2), InvertedResidual(12, 12)),
    "v3": lambda: network(
        InvertedResidual(8, 8, 5, 1, nn.Hardswish, True, "in place"),
        InvertedResidual(8, 12, 5, 2, nn.Hardswish),
        InvertedResidual(12, 12, 3, 1, nn.ReLU, False, "in place"),
    ),
    "attributes": lambda: network(AttributeBlock(8, 8), AttributeBlock(8, 12, 2, nn.ReLU6, False)),
    "functional": lambda: network(Functional(8, 12), Functional(12, 8)),
    "shuffle": lambda: network(Shuffle(8), Shuffle(8)),
    "ghost": lambda: network(Ghost(8, 16), GhostBlock(16, 12), Ghost(12, 8)),
    "bias": lambda: network(conv_norm_act(8, 8, 3, 1, 8, bias=True), conv_norm_act(8, 12, bias=True)),
}


# served in part: (model, (how many convolutions are fused by default, how many can be, of how many))
PARTLY = {
    "mixnet": (
        lambda: network(conv_norm_act(8, 16), Mixed(16), nn.BatchNorm2d(16), nn.SiLU(), conv_norm_act(16, 8)),
        (3, 3, 5),
    ),
    "convnext": (lambda: network(ConvNeXt(8), ConvNeXt(8)), (1, 1, 3)),
    "regnet": (lambda: network(RegNet(8), RegNet(8)), (0, 5, 11)),
    "gelu": (lambda: network(Gelu(8), Gelu(8)), (7, 7, 7)),
}


# ---- surprises: (model, how many convolutions are fused) ----


def _small(*layers):
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), *layers, nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    )


class Twice(nn.Module):
    """One convolution and one norm, called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, 1, 1, groups=3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(F.relu(self.bn(self.conv(x)))))


class TwoNorms(nn.Module):
    """One convolution, once with its norm, once bare."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.silu(self.bn(self.conv(x))) + torch.tanh(self.conv(x.flip(0)))


class InPlaceReluInputUsed(nn.Module):
    """The sum sees what the in-place ReLU left."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x):
        a = self.bn(self.conv(x))
        b = self.relu(a)
        return a * 2 + b


class ReluInputUsed(InPlaceReluInputUsed):
    """The sum sees both sides of the ReLU."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()


class ViewThenInPlace(nn.Module):
    """A view made before an in-place ReLU sees it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        a = self.bn(self.conv(x))
        view = a[:, :2]
        a.mul_(2)
        a[:, 3:] = 0.5
        F.relu_(a)
        return a.sum() + (view * view).sum()


class ChangedOutput(nn.Module):
    """The convolution's own output is changed in place, then normalised."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        y *= 3
        y += 1
        return self.bn(y).relu_()


class DoubleReLU(nn.Module):
    """An autograd.Function of the user between norm and convolution."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(min=0) * 2

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * (x > 0) * 2

    def forward(self, x):
        return self.Function.apply(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.head = conv_norm_act(3, 6)
        self.body, self.reentrant = InvertedResidual(6, 6), reentrant

    def forward(self, x):
        x = self.head(x)
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.reentrant)


class FrozenBatchNorm2d(nn.Module):
    """torchvision.ops.FrozenBatchNorm2d."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.5), ("bias", 0.5), ("running_mean", 0.1), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class LowRank(nn.Module):
    """LoRA around a convolution."""

    def __init__(self, conv, rank=2):
        super().__init__()
        self.base = conv.requires_grad_(False)
        self.down, self.up = nn.Conv2d(conv.in_channels, rank, 1), nn.Conv2d(rank, conv.out_channels, 1)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def _shared():
    layer = conv_norm_act(3, 3, 3, groups=3)
    return nn.Sequential(layer, layer, conv_norm_act(3, 4), nn.ModuleDict({"a": layer})["a"][0:0])


class FrozenNorms(nn.Sequential):
    """Norms in eval inside a training model, as detection backbones have."""

    def train(self, mode=True):
        super().train(mode)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        return self


class AdaptingNorms(nn.Sequential):
    """Norms in training inside a model in eval, as test-time adaptation has."""

    def train(self, mode=True):
        super().train(mode)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.train()
        return self


def _norm(**options):
    model = _small()
    model[1] = nn.BatchNorm2d(8, **options)
    return model


def _replaced(index, module):
    model = _small()
    model[index] = module
    return model


def _changed(change):
    model = _small()
    change(model)
    return model


SURPRISES = {
    "shared layer": (_shared, 2),
    "called twice": (Twice, 1),
    "with its norm and bare": (TwoNorms, 1),
    "in-place relu whose input is used": (InPlaceReluInputUsed, 1),
    "relu whose input is used": (ReluInputUsed, 1),
    "view before in-place": (ViewThenInPlace, 1),
    "convolution's output changed": (ChangedOutput, 1),
    "autograd function": (lambda: _small(DoubleReLU()), 2),
    "checkpoint": (lambda: Checkpointed(False), 4),
    "reentrant checkpoint": (lambda: Checkpointed(True), 4),
    "norm in eval": (lambda: FrozenNorms(_small()), 2),
    "norm in training": (lambda: AdaptingNorms(_small()), 2),
    "FrozenBatchNorm2d": (lambda: _replaced(1, FrozenBatchNorm2d(8)), 1),
    "GroupNorm": (lambda: _replaced(1, nn.GroupNorm(2, 8)), 1),
    "no running statistics": (lambda: _norm(track_running_stats=False), 2),
    "affine False": (lambda: _norm(affine=False), 2),
    "momentum None": (lambda: _norm(momentum=None), 2),
    "dropout between": (lambda: _small(nn.Dropout(0.0)), 2),
    "gelu": (lambda: _replaced(2, nn.GELU()), 2),
    "weight_norm": (lambda: _changed(lambda m: nn.utils.parametrizations.weight_norm(m[0])), 1),
    "old weight_norm": (lambda: _changed(lambda m: nn.utils.weight_norm(m[0])), 2),
    "LoRA": (lambda: _changed(lambda m: m.__setitem__(0, LowRank(m[0]))), 1),
    "frozen layer": (lambda: _changed(lambda m: m[0].requires_grad_(False)), 2),
    "frozen affine": (lambda: _changed(lambda m: m[1].requires_grad_(False)), 2),
}
