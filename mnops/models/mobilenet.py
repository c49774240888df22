"""MobileNet: Howard et al., arXiv:1704.04861."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnops import ops
from mnops.nn import Block, DepthwiseSeparable, chain, check_act, conv_bn_act
from mnops.ops import Pending

# Table 1 of the paper: pointwise output channels and depthwise stride of each separable layer. One row is one
# resolution, as timm's stages. The last stride is printed as 2, but input and output are both 7 x 7: it is 1.
STEM_CHANNELS = 32
STAGES = (
    ((64, 1),),
    ((128, 2), (128, 1)),
    ((256, 2), (256, 1)),
    ((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    ((1024, 2), (1024, 1)),
)


def scaled(channels: int, width_mult: float) -> int:
    """width_mult * channels to the nearest multiple of 8 (whole vectors in the kernels), at least 90 % of it.

    At the paper's four widths these are its own numbers.
    """
    wanted = channels * width_mult
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class MobileNet(nn.Module):
    """MobileNet v1, run chained: between two convolutions one stored tensor, in training and in eval.

    The state_dict has the keys and shapes of timm's `mobilenetv1_100`, and with its act="relu6" the logits
    are equal. TF-slim's and Keras' weights want padding="same", act="relu6", bn_eps=1e-3. Inside, everything
    is channels_last; the image is converted once. The height and width of the image are free.

    Args:
        num_classes: 0 for no classifier.
        width_mult: the paper's alpha; channels are rounded to multiples of 8.
        in_chans: channels of the image.
        act: none, relu (the paper's), relu6, hardswish or silu.
        bn_eps, bn_momentum: of every BatchNorm.
        dropout: share of features dropped before the classifier.
        padding: "symmetric" (1 on each side, as timm) or "same" (TensorFlow's SAME: one-sided at stride 2 on
            an even size).
        fused: False runs the very same modules through stock PyTorch; it can be set later as an attribute.

    Shape: (N, in_chans, H, W) -> (N, num_classes), or (N, num_features) without classifier.

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
    ) -> None:
        super().__init__()
        if not width_mult > 0 or not math.isfinite(width_mult):
            raise ValueError(f"MobileNet: width_mult must be positive, got {width_mult}")
        if in_chans < 1:
            raise ValueError(f"MobileNet: in_chans must be positive, got {in_chans}")
        if not 0 <= dropout < 1:
            raise ValueError(f"MobileNet: dropout must be in [0, 1), got {dropout}")
        if padding not in ("symmetric", "same"):
            raise ValueError(f'MobileNet: padding must be "symmetric" or "same", got {padding!r}')
        if not bn_eps >= 0:
            raise ValueError(f"MobileNet: bn_eps must not be negative, got {bn_eps}")
        self.act, self.in_chans, self.dropout = check_act("MobileNet", act), in_chans, dropout
        self.same = padding == "same"
        channels = scaled(STEM_CHANNELS, width_mult)
        self.conv_stem = nn.Conv2d(in_chans, channels, 3, 2, 0 if self.same else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, bn_eps, bn_momentum)
        self.blocks = nn.Sequential()
        for stage in STAGES:
            blocks = nn.Sequential()
            for width, stride in stage:
                out = scaled(width, width_mult)
                blocks.append(
                    DepthwiseSeparable(
                        channels, out, stride=stride, padding="same" if self.same else None, act=act,
                        eps=bn_eps, momentum=bn_momentum,
                    )
                )
                channels = out
            self.blocks.append(blocks)
        self.num_features = channels
        self.fused = fused
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        self.reset_classifier(num_classes)

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

    def _body(self, x: Tensor) -> Pending:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"MobileNet: x must be (N, {self.in_chans}, H, W), got {tuple(x.shape)}")
        if self._fused:
            x = x.contiguous(memory_format=torch.channels_last)
        stem = conv_bn_act(x, self.conv_stem, self.bn1, self.act, self.same, self._fused)
        return chain(self.blocks, stem)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (N, num_features, H / 32, W / 32) rounded up."""
        return ops.norm_act(self._body(x))

    def forward_head(self, x: Tensor | Pending, pre_logits: bool = False) -> Tensor:
        """Average pooling, dropout and classifier; pre_logits: without the classifier."""
        if self._fused:
            x = ops.norm_act_pool(x)
        else:
            x = F.adaptive_avg_pool2d(ops.norm_act(x), 1).flatten(1)
        x = F.dropout(x, self.dropout, self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self._body(x))
