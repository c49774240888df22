"""MobileNet and its variants: Howard et al., arXiv:1704.04861."""

import copy
import math
from collections.abc import Collection, Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from mnops import backends, ops
from mnops.models.layers import (
    HEAD,
    STAGES,
    STEM,
    STEM_CHANNELS,
    EndPoint,
    Stages,
    checked,
    known_names,
    names_of,
    scaled,
    until,
)
from mnops.nn import Block, DepthwiseSeparable, chain, check_act, conv_bn_act
from mnops.ops import Pending


@torch.fx.wrap  # sizes are not known to torch.fx
def resized(x: Tensor, rho: float) -> Tensor:
    """x (N, C, H, W) at rho times its height and width."""
    size = [max(1, round(rho * length)) for length in x.shape[2:]]
    return F.interpolate(x, size, mode="bilinear", antialias=True)


class ConvBNAct(Block):
    """Dense 3x3 convolution, BatchNorm, activation: a layer of Conv MobileNet. Children as timm's: conv, bn1.

    Fused where its input has few channels (`mnops.nn.FEW_CHANNELS`); wide ones are stock's.

    Shape: (N, C, H, W) -> (N, O, Ho, Wo), in x's memory format.
    """

    def __init__(self, in_channels, out_channels, stride, padding, dilation, act, eps, momentum) -> None:
        super().__init__(act, padding, fused=True)
        sides = 0 if self.same else dilation
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, sides, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels, eps, momentum)

    def chain(self, x: Tensor | Pending) -> Pending:
        return conv_bn_act(x, self.conv, self.bn1, self.act, self.same, self.fused)


class MobileNet(nn.Module):
    """MobileNet v1, run chained: between two convolutions one stored tensor, in training and in eval.

    The state_dict has the keys and shapes of timm's `mobilenetv1_100`, and with its act="relu6" the logits
    are equal. TF-slim's and Keras' weights want padding="same", act="relu6", bn_eps=1e-3. Inside, everything
    is channels_last; the image is converted once. The height and width of the image are free.

    Args:
        num_classes: 0 for no classifier.
        width_mult: the paper's alpha; channels are rounded to multiples of `divisor`.
        in_chans: channels of the image.
        act: none, relu (the paper's), relu6, hardswish or silu.
        bn_eps, bn_momentum: of every BatchNorm.
        dropout: share of features dropped before the classifier.
        padding: "symmetric" (1 on each side, as timm) or "same" (TensorFlow's SAME: one-sided at stride 2 on
            an even size).
        fused: False runs the very same modules through stock PyTorch; it can be set later as an attribute.
        stages: the layer table: rows of (channels, stride, "separable" or "conv"), one stage a resolution.
            None: the paper's; `mnops.models.VARIANTS` has its Conv and Shallow MobileNet too.
        depth_multiplier: depthwise outputs for each input channel, as in Keras.
        output_stride: 8, 16 or 32: no feature map is smaller than the image by more; later strides become
            dilations, as in TF-slim.
        rho: the paper's resolution multiplier: the image is resized by it (bilinear, antialiased) first.
        divisor, min_depth: see `scaled`.
        features_only: forward returns {end point: feature map}; there is no classifier, and no layer after
            the last of them. Weights of the whole network load with strict=False.
        recompute: blocks compute their depthwise output again in the backward in place of keeping it: about
            two thirds of the memory, for 3 to 14 % more time on a CPU.
        end_points: which, with features_only; None: the last of each stage, strides 2, 4, 8, 16, 32.

    Shape: (N, in_chans, H, W) -> (N, num_classes), or (N, num_features) without classifier.

    End points have TF-slim's names: Conv2d_0 is the first convolution, Conv2d_i_depthwise and
    Conv2d_i_pointwise the halves of layer i, Conv2d_i a dense layer; each after its BatchNorm and activation.

    Convolutions start from a normal of variance 2 / fan_out (He et al., arXiv:1502.01852), fan_out counted
    per group as timm does: one rule for both kinds and every width, where TF-slim has one fixed deviation of
    0.09; BatchNorm makes the scale matter little. The classifier starts from a normal of deviation 0.01 and
    bias 0: near-uniform predictions.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        in_chans: int = 3,
        act: str = "relu",
        bn_eps: float = 1e-5,
        bn_momentum: float | None = 0.1,
        dropout: float = 0.0,
        padding: str = "symmetric",
        fused: bool = True,
        *,
        stages: Stages | None = None,
        depth_multiplier: int = 1,
        output_stride: int = 32,
        rho: float = 1.0,
        divisor: int = 8,
        min_depth: int = 8,
        features_only: bool = False,
        end_points: Collection[str] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if not width_mult > 0 or not math.isfinite(width_mult):
            raise ValueError(f"MobileNet: width_mult must be positive, got {width_mult}")
        if not rho > 0 or not math.isfinite(rho):
            raise ValueError(f"MobileNet: rho must be positive, got {rho}")
        if not 0 <= dropout < 1:
            raise ValueError(f"MobileNet: dropout must be in [0, 1), got {dropout}")
        if padding not in ("symmetric", "same"):
            raise ValueError(f'MobileNet: padding must be "symmetric" or "same", got {padding!r}')
        if not bn_eps >= 0:
            raise ValueError(f"MobileNet: bn_eps must not be negative, got {bn_eps}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"MobileNet: output_stride must be 8, 16 or 32, got {output_stride}")
        counts = dict(in_chans=in_chans, depth_multiplier=depth_multiplier)
        for name, value in (counts | dict(divisor=divisor, min_depth=min_depth)).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"MobileNet: {name} must be a positive int, got {value!r}")
        if end_points is not None and not features_only:
            raise ValueError("MobileNet: end_points are of features_only=True; see forward_end_points")
        table = checked(STAGES if stages is None else stages)
        names = names_of(table)
        if features_only:
            wanted = [stage[-1][-1] for stage in names] if end_points is None else end_points
            known = [STEM, *(name for stage in names for layer in stage for name in layer)]
            self.feature_names = known_names(wanted, known)
            names = until(self.feature_names, names)
        self.act, self.in_chans, self.dropout = check_act("MobileNet", act), in_chans, dropout
        self.same, self.rho, self.features_only = padding == "same", rho, features_only
        channels, stride, dilation = scaled(STEM_CHANNELS, width_mult, divisor, min_depth), 2, 1
        self.conv_stem = nn.Conv2d(in_chans, channels, 3, 2, 0 if self.same else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, bn_eps, bn_momentum)
        self.blocks = nn.Sequential()
        self.end_points = {STEM: EndPoint(channels, stride)}
        side = "same" if self.same else None
        for rows, layers in zip(table, names):
            blocks = nn.Sequential()
            for row, own in zip(rows, layers):
                out, step = scaled(row.channels, width_mult, divisor, min_depth), row.stride
                dilate = stride * step > output_stride
                options = dict(
                    stride=1 if dilate else step, dilation=dilation, padding=side, act=act,
                    eps=bn_eps, momentum=bn_momentum,
                )
                if dilate:
                    dilation *= step  # of the layers after this one: its own input is not strided yet
                else:
                    stride *= step
                if row.kind == "conv":
                    blocks.append(ConvBNAct(channels, out, **options))
                else:
                    options |= dict(depth_multiplier=depth_multiplier, recompute=recompute)
                    blocks.append(DepthwiseSeparable(channels, out, **options))
                    self.end_points[own[0]] = EndPoint(channels * depth_multiplier, stride)
                self.end_points[own[-1]] = EndPoint(out, stride)
                channels = out
            self.blocks.append(blocks)
        self._names = names
        self.num_features = channels
        self.fused = fused
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        self.reset_classifier(0 if features_only else num_classes)

    @property
    def fused(self) -> bool:
        """Whether the layers run fused; setting it sets every block."""
        return self._fused

    @fused.setter
    def fused(self, fused: bool) -> None:
        self._fused = fused
        for module in self.modules():
            if isinstance(module, Block):
                module.fused = fused

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier for num_classes classes, on the network's device and dtype; 0: none."""
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"MobileNet: num_classes must be an int of 0 or more, got {num_classes!r}")
        self.num_classes = num_classes
        self.classifier: nn.Module = nn.Identity()
        if num_classes:
            like = self.conv_stem.weight
            self.classifier = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.normal_(self.classifier.weight, 0, 0.01)
            nn.init.zeros_(self.classifier.bias)

    @property
    def out_channels(self) -> int:
        """Channels of the last feature map: what torchvision's detectors ask of a backbone."""
        return self.num_features

    @property
    def features(self) -> "Features":
        """The layers up to the last feature map, themselves, as a module: a backbone as torchvision's are."""
        return Features(self)

    def _stem(self, x: Tensor) -> Pending:
        traced = isinstance(x, Proxy)  # torch.fx's, whose shape is not known
        if not traced and (x.dim() != 4 or x.shape[1] != self.in_chans):
            raise ValueError(f"MobileNet: x must be (N, {self.in_chans}, H, W), got {tuple(x.shape)}")
        if self.rho != 1:
            x = resized(x, self.rho)
        if self._fused and not backends.wants_stock(x):
            x = x.contiguous(memory_format=torch.channels_last)
        return conv_bn_act(x, self.conv_stem, self.bn1, self.act, self.same, self._fused)

    def _body(self, x: Tensor) -> Pending:
        return chain(self.blocks, self._stem(x))

    def _taps(self, x: Tensor, wanted: Sequence[str]) -> tuple[Pending, dict[str, Tensor]]:
        """The end points in `wanted`, made real while the chain goes on, and the tensor after them."""
        found = {}

        def tap(name: str, x: Pending) -> Pending:
            if name in wanted:
                found[name] = ops.norm_act(x)
            return x

        x = tap(STEM, self._stem(x))
        for stage, names in zip(self.blocks, self._names):
            if len(found) == len(wanted):
                break
            if not any(name in wanted for layer in names for name in layer if name != names[-1][-1]):
                x = tap(names[-1][-1], chain(stage, x))
                continue
            for block, own in zip(stage, names):
                if own[0] in wanted and len(own) == 2:
                    x = block.chain_pointwise(tap(own[0], block.chain_depthwise(x)))
                else:
                    x = chain(block, x)
                tap(own[-1], x)
        return x, found

    def forward_end_points(self, x: Tensor, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Activations by TF-slim's names, in the network's order; no layer after the last of them is run.

        Hooks on a stage are not run where an end point inside it, not at its end, is asked for.

        Args:
            x: (N, in_chans, H, W).
            names: of `self.end_points`, which says their channels and strides, and AvgPool_1a (N, C), Logits
                and Predictions (softmax), (N, num_classes). None: all.
        """
        known = [*self.end_points, *(HEAD if self.num_classes else HEAD[:1])]
        wanted = known if names is None else known_names(names, known)
        head = [name for name in wanted if name in HEAD]
        body = [name for name in wanted if name not in HEAD]
        if not head:
            return self._taps(x, body)[1]
        x, found = self._taps(x, [*body, *HEAD])  # HEAD is never found there: to the end
        pooled = self._pool(x)
        logits = self.classifier(F.dropout(pooled, self.dropout, self.training))
        found |= zip(HEAD, (pooled, logits, logits.softmax(1)))
        return {name: found[name] for name in wanted}

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (N, num_features, H / output_stride, W / output_stride) rounded up."""
        return ops.norm_act(self._body(x))

    def _pool(self, x: Tensor | Pending) -> Tensor:
        if self._fused and not backends.wants_stock(x.x if isinstance(x, Pending) else x):
            return ops.norm_act_pool(x)
        return F.adaptive_avg_pool2d(ops.norm_act(x), 1).flatten(1)

    def forward_head(self, x: Tensor | Pending, pre_logits: bool = False) -> Tensor:
        """Average pooling, dropout and classifier; pre_logits: without the classifier."""
        x = F.dropout(self._pool(x), self.dropout, self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        if self.features_only:
            return self._taps(x, self.feature_names)[1]
        return self.forward_head(self._body(x))


class Features(nn.Module):
    """The layers of a MobileNet, shared with it, without its head.

    Shape: (N, in_chans, H, W) -> (N, out_channels, H / 32, W / 32).
    """

    def __init__(self, network: MobileNet) -> None:
        super().__init__()
        self.network = copy.copy(network)
        self.network._modules = {**network._modules, "classifier": nn.Identity()}
        self.out_channels = network.out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.network.forward_features(x)
