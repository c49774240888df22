"""The shapes that are measured, read from the data files in shapes/."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "shapes"


class Layer(NamedTuple):
    """One line of shapes/*.csv: a convolution with BatchNorm and activation."""

    name: str
    op: str  # depthwise | pointwise | stem
    channels: int
    out_channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    act: str
    count: int  # how often the network has it


class Network(NamedTuple):
    """One line of shapes/networks.csv: a MobileNet."""

    name: str
    width: float
    size: int
    train_batch: int
    infer_batches: tuple[int, ...]


def files() -> list[str]:
    """The layer files: one for each network, and the hostile shapes."""
    return sorted(p.stem for p in FOLDER.glob("*.csv") if p.stem != "networks")


def layers(file: str) -> list[Layer]:
    return [Layer(*(int(v) if v.isdecimal() else v for v in line.values())) for line in _lines(file)]


def networks() -> list[Network]:
    return [
        Network(
            r["name"], float(r["width"]), int(r["size"]), int(r["train_batch"]), _ints(r["infer_batches"])
        )
        for r in _lines("networks")
    ]


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


def _lines(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))
