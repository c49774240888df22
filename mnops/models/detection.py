"""SSD and Faster-RCNN on MobileNet (arXiv:1704.04861, section 4.5), from torchvision's detection parts.

This module needs torchvision; `import mnops` does not import it. The networks are torchvision's `SSD` and
`FasterRCNN`, so they are called as those are: a list of images (3, H, W) in [0, 1] of any sizes and, in
training, a list of {"boxes": (n, 4) x1 y1 x2 y2 in pixels, "labels": (n,) int64 from 1} give a dict of
losses; in eval mode the images give a list of {"boxes", "labels", "scores"}.

Widths of added layers, anchors and sampling are those of TensorFlow's object detection API, whose
ssd_mobilenet_v1 and faster_rcnn_mobilenet_v1 are the networks of the paper.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

try:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
    from torchvision.models.detection.ssd import SSD, SSDScoringHead
    from torchvision.ops import MultiScaleRoIAlign
except (ImportError, RuntimeError) as e:  # RuntimeError: a torchvision made for another torch
    raise ImportError(f"mnops.models.detection needs a torchvision made for this torch ({e}): "
                      "pip install torchvision") from e

from mnops.models.layers import STAGES, scaled
from mnops.models.mobilenet import ConvBNAct, MobileNet
from mnops.nn import DepthwiseSeparable, PointwiseConvBNAct

__all__ = ["faster_rcnn", "load_backbone", "ssd300"]

# SSD's feature maps after the two of MobileNet: a 1x1 convolution to the first number of channels, then a 3x3
# one of stride 2 to the second.
EXTRA = ((256, 512), (128, 256), (128, 256), (64, 128))
STRIDE_16, LAST = "Conv2d_11_pointwise", "Conv2d_13_pointwise"
HALF = [0.5, 0.5, 0.5]  # mean and deviation: images to [-1, 1], as MobileNet is trained on


class SSDFeatures(nn.Module):
    """Six feature maps of an image: two of MobileNet and four of halving convolutions after it.

    Shape: (N, 3, 300, 300) -> {"0" .. "5"}: sides 19, 10, 5, 3, 2, 1.
    """

    def __init__(self, width_mult: float, **options) -> None:
        super().__init__()
        self.body = MobileNet(0, width_mult, features_only=True, end_points=[STRIDE_16, LAST], **options)
        self.out_channels = [self.body.end_points[name].channels for name in (STRIDE_16, LAST)]
        batch_norm = dict(eps=self.body.bn1.eps, momentum=self.body.bn1.momentum)
        padding = "same" if self.body.same else None
        self.extra = nn.ModuleList()
        for squeezed, out in ((scaled(a, width_mult), scaled(b, width_mult)) for a, b in EXTRA):
            narrow = PointwiseConvBNAct(self.out_channels[-1], squeezed, act=self.body.act, **batch_norm)
            halve = ConvBNAct(squeezed, out, 2, padding, 1, self.body.act, *batch_norm.values())
            for conv in (narrow.conv, halve.conv):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out")
            self.extra.append(nn.Sequential(narrow, halve))
            self.out_channels.append(out)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = list(self.body(x).values())
        for layers in self.extra:
            maps.append(layers(maps[-1]))
        return OrderedDict((str(i), m) for i, m in enumerate(maps))


class DefaultBoxes(DefaultBoxGenerator):
    """1,917 boxes of a 300x300 image: three at a place of the first map, six at one of the other five.

    SSD's scales (arXiv:1512.02325, equation 4) from 0.2 to 0.95. The first map has a square of half the
    lowest scale and that scale's 2:1 and 1:2; the others 1, 2, 1/2, 3, 1/3 and a square between their
    scale and the next.
    """

    def __init__(self, lowest: float = 0.2, highest: float = 0.95, maps: int = 2 + len(EXTRA)) -> None:
        scales = [lowest + (highest - lowest) * k / (maps - 1) for k in range(maps)]
        super().__init__([[2]] + [[2, 3]] * (maps - 1), scales=[*scales, 1.0])

    def _generate_wh_pairs(
        self, num_outputs: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> list[Tensor]:
        pairs = super()._generate_wh_pairs(num_outputs, dtype, device)
        half = torch.full((1, 2), self.scales[0] / 2, dtype=dtype, device=device)
        return [torch.cat([half, pairs[0][2:]]), *pairs[1:]]

    def num_anchors_per_location(self) -> list[int]:
        return [len(pairs) for pairs in self._wh_pairs]


class SSDHead(nn.Module):
    """Classes and boxes of every anchor by a 1x1 convolution of each feature map, torchvision's names."""

    def __init__(self, channels: list[int], anchors: list[int], classes: int) -> None:
        super().__init__()
        self.classification_head = _scoring(channels, anchors, classes)
        self.regression_head = _scoring(channels, anchors, 4)
        # Training starts from the belief that an anchor is background with 99 %, as there are so many of them
        # (arXiv:1708.02002, section 3.3).
        for conv in self.classification_head.module_list:
            conv.bias.data.view(-1, classes)[:, 0] = math.log(99 * max(1, classes - 1))

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        return {"bbox_regression": self.regression_head(maps), "cls_logits": self.classification_head(maps)}


def _scoring(channels: list[int], anchors: list[int], columns: int) -> SSDScoringHead:
    convs = nn.ModuleList(nn.Conv2d(c, a * columns, 1) for c, a in zip(channels, anchors))
    for conv in convs:
        nn.init.normal_(conv.weight, 0, 0.03)
        nn.init.zeros_(conv.bias)
    return SSDScoringHead(convs, columns)


def ssd300(num_classes: int = 91, width_mult: float = 1.0, options: Mapping | None = None, **ssd) -> SSD:
    """SSD 300: 1,917 anchors and, with 91 classes, 6,791,360 weights and 1,237,129,408 mult-adds.

    Args:
        num_classes: with the background, which is class 0.
        width_mult: of MobileNet and of the layers after it.
        options: more arguments of `mnops.MobileNet`.
        ssd: more arguments of torchvision's `SSD`.
    """
    features = SSDFeatures(width_mult, **(options or {}))
    boxes = DefaultBoxes()
    head = SSDHead(features.out_channels, boxes.num_anchors_per_location(), num_classes)
    arguments = dict(image_mean=HALF, image_std=HALF, nms_thresh=0.6, detections_per_img=100) | ssd
    return SSD(features, boxes, (300, 300), num_classes, head=head, **arguments)


class Stride16(nn.Module):
    """MobileNet up to its eleventh layer. Shape: (N, 3, H, W) -> {"0": (N, out_channels, H / 16, W / 16)}."""

    def __init__(self, width_mult: float, **options) -> None:
        super().__init__()
        self.body = MobileNet(0, width_mult, features_only=True, end_points=[STRIDE_16], **options)
        self.out_channels = self.body.end_points[STRIDE_16].channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict([("0", self.body(x)[STRIDE_16])])


class CropHead(nn.Module):
    """MobileNet's last two layers and the average, on crops. Shape: (K, C, 14, 14) -> (K, out_channels)."""

    def __init__(self, body: MobileNet, in_channels: int, width_mult: float) -> None:
        super().__init__()
        self.out_channels = scaled(STAGES[-1][-1][0], width_mult)
        options = dict(padding="same" if body.same else None, act=body.act,
                       eps=body.bn1.eps, momentum=body.bn1.momentum, fused=body.fused)  # fmt: skip
        self.layers = nn.Sequential()
        for channels, stride in STAGES[-1]:
            layer = DepthwiseSeparable(in_channels, scaled(channels, width_mult), stride=stride, **options)
            for conv in (layer.conv_dw, layer.conv_pw):  # as MobileNet's
                fan_out = conv.weight[0, 0].numel() * conv.out_channels // conv.groups
                nn.init.normal_(conv.weight, 0, math.sqrt(2 / fan_out))
            self.layers.append(layer)
            in_channels = scaled(channels, width_mult)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


def faster_rcnn(
    num_classes: int = 91, size: int = 600, width_mult: float = 1.0, options: Mapping | None = None, **rcnn
) -> FasterRCNN:
    """Faster-RCNN on the features of stride 16: 25.2 billion mult-adds at 300x300 and 30.5 at 600x600.

    12 anchors a place; 300 proposals, each a crop of 14x14 features for the last two layers of MobileNet.

    Args:
        num_classes: with the background, which is class 0.
        size: of the shorter side of an image, in pixels; the longer one is at most 1024 / 600 of that.
        width_mult: of MobileNet.
        options: more arguments of `mnops.MobileNet`.
        rcnn: more arguments of torchvision's `FasterRCNN`.
    """
    features = Stride16(width_mult, **(options or {}))
    head = CropHead(features.body, features.out_channels, width_mult)
    arguments = dict(
        min_size=size, max_size=round(size * 1024 / 600), image_mean=HALF, image_std=HALF,
        size_divisible=16,  # torchvision takes image size // feature size for the stride
        rpn_anchor_generator=AnchorGenerator(((64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
        rpn_post_nms_top_n_train=300, rpn_post_nms_top_n_test=300,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2),
        box_head=head, box_predictor=FastRCNNPredictor(head.out_channels, num_classes),
        box_batch_size_per_image=64,
    ) | rcnn  # fmt: skip
    return FasterRCNN(features, **arguments)


def load_backbone(detector: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Starts a detector from the state_dict of a MobileNet classifier of the same width.

    Its classifier is left out. Raises ValueError, with nothing changed, where a tensor is missing or of
    another shape.
    """
    parts = {"": detector.backbone.body}
    if isinstance(getattr(detector, "roi_heads", None), nn.Module):
        parts[f"blocks.{len(STAGES) - 1}."] = detector.roi_heads.box_head.layers
    wanted = {prefix + name: own for prefix, part in parts.items() for name, own in part.state_dict().items()}
    for name, own in wanted.items():
        found = weights.get(name)
        if found is None or found.shape != own.shape:
            got = "none" if found is None else tuple(found.shape)
            raise ValueError(f"load_backbone: {name} must be {tuple(own.shape)}, got {got}")
    with torch.no_grad():
        for name, own in wanted.items():
            own.copy_(weights[name])
