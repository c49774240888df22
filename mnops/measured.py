"""Which backend a GPU was measured to be fastest with: measured.csv, by compute capability, op and shape.

`python -m mnops bench choose` writes it from the benchmark's rows. A GPU takes the rows of the nearest compute
capability that has any, a layer the row of the nearest channels among those of its kernel, stride and size of element.
What has no row is served in the registry's order.
"""

import collections
import csv
import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch

FILE = Path(__file__).with_name("measured.csv")


class Shape(NamedTuple):
    """What a choice depends on: not the batch or the size of the map, which change from call to call."""

    itemsize: int  # bytes of an element: fp16 and bf16 are one
    kernel: int
    stride: int
    channels: int  # of a filter: 1 in a depthwise convolution
    out_channels: int

    @staticmethod
    def of(op: str, args: tuple) -> "Shape | None":
        """Of a convolution's arguments, in the order of its schema; None where the contract is broken."""
        if args[1].dim() != 4 or not args[1].numel():
            return None
        out, channels, kernel, _ = args[1].shape
        return Shape(args[0].dtype.itemsize, kernel, 1 if op == "pointwise_conv2d" else args[8][0], channels, out)

    def apart(self, other: "Shape") -> float:
        """How far in channels, in powers of 2; infinite where the layers are of another kind."""
        if self[:3] != other[:3]:
            return math.inf
        return sum(abs(math.log2(a / b)) for a, b in zip(self[3:], other[3:]))


Table = dict[int, dict[str, dict[Shape, str]]]  # capability (90: 9.0), op, shape: backend
COLUMNS = ("capability", "op", *Shape._fields, "backend", "next", "ratio")


def read(path: Path) -> Table:
    found: Table = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            shape = Shape(*(int(row[field]) for field in Shape._fields))
            found.setdefault(int(row["capability"]), {}).setdefault(row["op"], {})[shape] = row["backend"]
    return found


DEVICE = "cuda"  # the type of the devices that were measured
TABLE = read(FILE)
OPS = frozenset(op for ops in TABLE.values() for op in ops)


@functools.cache
def capability() -> int:
    """Of the current GPU."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def best(op: str, shape: Shape | None) -> list[str]:
    """The backend measured to be fastest for such a layer; without a shape the one that most of the op's rows
    name. [] where nothing was measured."""
    if op not in OPS:
        return []
    rows = TABLE[min(TABLE, key=lambda measured: abs(measured - capability()))].get(op, {})
    if shape is None:
        return [name for name, _ in collections.Counter(rows.values()).most_common(1)]
    near = min(rows, key=shape.apart, default=None)
    return [] if near is None or math.isinf(shape.apart(near)) else [rows[near]]
