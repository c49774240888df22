"""MobileNet as data: its layer tables, and the end points that they have (Howard et al., arXiv:1704.04861)."""

import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple


class Layer(NamedTuple):
    """A row of a layer table."""

    channels: int  # that come out, at width 1
    stride: int  # of the 3x3 convolution
    kind: str = "separable"  # or "conv": one dense 3x3 convolution


Stages = Sequence[Sequence[Layer | tuple]]

# Table 1 of the paper after its first convolution. One stage is one resolution, as timm's. The last stride is
# printed as 2, but input and output are both 7 x 7: it is 1.
STEM_CHANNELS = 32
STAGES = (
    ((64, 1),),
    ((128, 2), (128, 1)),
    ((256, 2), (256, 1)),
    ((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    ((1024, 2), (1024, 1)),
)
VARIANTS = {
    "separable": STAGES,
    "conv": tuple(tuple((*row, "conv") for row in stage) for stage in STAGES),  # table 4
    "shallow": (*STAGES[:3], STAGES[3][:1], STAGES[4]),  # table 5: without five layers of 14 x 14 x 512
}
STEM = "Conv2d_0"
HEAD = ("AvgPool_1a", "Logits", "Predictions")  # TF-slim's end points after the convolutions


class EndPoint(NamedTuple):
    """What is known of a feature map before it is computed."""

    channels: int
    stride: int  # of the image, in pixels


def scaled(channels: int, width_mult: float, divisor: int = 8, min_depth: int = 8) -> int:
    """width_mult * channels to the nearest multiple of divisor, at least 90 % of it and at least min_depth.

    8 makes whole vectors in the kernels; divisor 1 truncates, as TF-slim and Keras do. At the paper's four
    widths both give its own numbers.
    """
    wanted = channels * width_mult
    rounded = max(min_depth, int(wanted + divisor // 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * wanted else rounded


def checked(stages: Stages) -> list[list[Layer]]:
    """The table with a Layer a row; ValueError where it is not one."""
    table = [[Layer(*row) for row in stage] for stage in stages]
    for layer in (layer for stage in table for layer in stage):
        if layer.channels < 1 or layer.stride not in (1, 2) or layer.kind not in ("separable", "conv"):
            rule = 'a layer must be (channels, stride 1 or 2, "separable" or "conv")'
            raise ValueError(f"MobileNet: {rule}, got {tuple(layer)}")
    if not all(table):
        raise ValueError("MobileNet: a stage must have a layer, got an empty one")
    return table


def names_of(table: list[list[Layer]]) -> list[list[tuple[str, ...]]]:
    """The end points of every layer, TF-slim's names."""
    number = itertools.count(1)
    halves = {"conv": ("",), "separable": ("_depthwise", "_pointwise")}
    return [
        [tuple(f"Conv2d_{i}{half}" for half in halves[layer.kind]) for layer, i in zip(stage, number)]
        for stage in table
    ]


def known_names(names: Collection[str], known: Sequence[str]) -> list[str]:
    """names in the order of known."""
    if isinstance(names, str) or not names or not set(names) <= set(known):
        raise ValueError(f"MobileNet: end points must be some of {', '.join(known)}, got {names!r}")
    return [name for name in known if name in names]


def until(wanted: Collection[str], names: list[list[tuple[str, ...]]]) -> list[list[tuple[str, ...]]]:
    """The layers that the wanted end points need."""
    flat = [own for stage in names for own in stage]
    last = max((i for i, own in enumerate(flat) if set(own) & set(wanted)), default=-1)
    kept = [[own for own in stage if own in flat[: last + 1]] for stage in names]
    return [stage for stage in kept if stage]
