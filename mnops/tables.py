"""python -m mnops tables: the resource columns of arXiv:1704.04861, as printed and as counted here.

Mult-adds are those of convolutions and fully connected layers of one image, counted by torch's
FlopCounterMode in a forward pass of the real modules on fake tensors; normalisation, bias and pooling are not
counted, nor are the parameters of norms and biases, as in the paper. A printed number that is not the count
rounded carries a remark.
"""

import argparse
import csv
import functools
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mnops.models import VARIANTS, MobileNet
from mnops.nn import DepthwiseSeparable

# ---- counting ----


class LayerCount(NamedTuple):
    """One convolution or fully connected layer."""

    name: str
    kind: str  # 1x1 | depthwise | 3x3 ... | fully connected
    stride: int
    weight: tuple[int, ...]
    input: tuple[int, ...]  # (C, H, W), or (C,)
    mult_adds: int

    @property
    def printed(self) -> tuple[str, str, str]:
        """Type and stride, filter and input, as table 1 has them."""
        out, into = self.weight[:2]
        kind, shape = {
            "depthwise": ("Conv dw", f"3x3x{out} dw"),
            "fully connected": ("FC", f"{into}x{out}"),
        }.get(self.kind, ("Conv", f"{self.kind}x{into}x{out}"))
        side = "x".join(map(str, self.input[1:] or (1, 1)))
        return f"{kind} / s{self.stride}", shape, f"{side}x{self.input[0]}"


class Count(NamedTuple):
    """What a network costs for one image."""

    layers: tuple[LayerCount, ...]
    parameters: int  # all of them, as torch counts

    @property
    def mult_adds(self) -> int:
        return sum(layer.mult_adds for layer in self.layers)

    @property
    def weights(self) -> int:
        """Of convolutions and fully connected layers: what the paper calls parameters."""
        return sum(torch.Size(layer.weight).numel() for layer in self.layers)

    @property
    def totals(self) -> tuple[int, int]:
        """Mult-adds of all layers, and of the fully connected ones among them."""
        dense = sum(layer.mult_adds for layer in self.layers if layer.kind == "fully connected")
        return self.mult_adds, dense


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "fully connected"
    if module.groups > 1:
        return "depthwise"
    return "x".join(map(str, module.kernel_size))


def count(build: Callable[[], nn.Module], channels: int, height: int, width: int) -> Count:
    """Counts the network that `build` makes, in eval mode, on an image (1, channels, height, width).

    Nothing is computed: weights and activations are fake. Layers are those in the order of `modules()`.
    """
    with FakeTensorMode(), torch.no_grad():
        model, inputs = build().eval(), {}
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        for name, module in layers.items():
            module.register_forward_pre_hook(
                lambda module, args, name=name: inputs.update({name: tuple(args[0].shape[1:])})
            )
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, channels, height, width))
    flops, root = counter.get_flop_counts(), type(model).__name__
    return Count(
        tuple(
            LayerCount(
                name, _kind(m), getattr(m, "stride", (1,))[0], tuple(m.weight.shape), inputs[name],
                sum(flops[f"{root}.{name}" if name else root].values()) // 2,
            )
            for name, m in layers.items()
            if name in inputs
        ),
        sum(p.numel() for p in model.parameters()),
    )  # fmt: skip


@functools.lru_cache
def mobilenet(
    width: float = 1.0, size: int = 224, variant: str = "separable", classes: int = 1000, min_depth: int = 8
) -> Count:
    """The count of a MobileNet: `width` is alpha, `variant` a key of `mnops.models.VARIANTS`."""
    options = dict(num_classes=classes, width_mult=width, stages=VARIANTS[variant], min_depth=min_depth)
    return count(lambda: MobileNet(**options), 3, size, size)


def layer(side: int, channels: int, full: bool = False) -> Count:
    """The count of a separable layer, or of a full 3x3 convolution, on side x side."""

    def build() -> nn.Module:
        if full:
            return nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        return DepthwiseSeparable(channels, channels)

    return count(build, channels, side, side)


@functools.lru_cache
def peer(name: str, size: int = 224, classes: int = 1000) -> Count | None:
    """The count of a network of torchvision; None where torchvision does not import."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError):  # RuntimeError: one made for another torch
        return None
    more = dict(aux_logits=False, init_weights=False) if name in ("googlenet", "inception_v3") else {}
    return count(lambda: getattr(models, name)(num_classes=classes, **more), 3, size, size)


class _Detector(nn.Module):
    """What a detector computes for one image, without the choice of boxes, which counts nothing."""

    def __init__(self, kind: str, size: int) -> None:
        from mnops.models import detection

        super().__init__()
        self.kind = kind
        self.detector = detection.ssd300() if kind == "ssd" else detection.faster_rcnn(size=size)

    def forward(self, x: torch.Tensor) -> None:
        maps = list(self.detector.backbone(x).values())
        if self.kind == "ssd":
            self.detector.head(maps)
            return
        self.detector.rpn.head(maps)
        heads, crops = self.detector.roi_heads, maps[0].new_empty(300, maps[0].shape[1], 14, 14)
        heads.box_predictor(heads.box_head(crops))


@functools.lru_cache
def detector(kind: str, size: int) -> Count | None:
    """The count of "ssd" or "faster_rcnn" on size x size; None where torchvision does not import."""
    try:
        return count(lambda: _Detector(kind, size), 3, size, size)
    except ImportError:
        return None


# ---- tables ----


class Cell(NamedTuple):
    """A printed number and ours; "" where there is none."""

    printed: str
    counted: str


class Line(NamedTuple):
    label: str
    cells: tuple[Cell, ...]
    remark: str = ""


class Table(NamedTuple):
    number: str
    title: str
    columns: tuple[str, ...]  # the label's first
    lines: tuple[Line, ...]


# What the paper prints. A row: label; printed cells; the network to count, as counter and arguments, or ""
# where there is none; a remark, in which {NETWORK} stands for the mult-adds of that network.
TABLES = json.loads(Path(__file__).with_name("tables.json").read_text())
COUNTERS = {"mobilenet": mobilenet, "layer": layer, "torchvision": peer, "detector": detector}
INSTALL = "pip install torchvision, the one made for this torch"

# What a column counts of a network, or of its layers of a row's name or kind.
COLUMNS: dict[str, Callable[[Count, Count], int | str]] = {
    "mult-adds": lambda whole, part: whole.mult_adds,
    "weights": lambda whole, part: whole.weights,
    "parameters with biases and norms": lambda whole, part: whole.parameters,
    "million mult-adds": lambda whole, part: whole.mult_adds,
    "billion mult-adds": lambda whole, part: whole.mult_adds,
    "million parameters": lambda whole, part: whole.weights,
    "% mult-adds": lambda whole, part: f"{100 * part.mult_adds / whole.mult_adds:.3f}",
    "% parameters": lambda whole, part: f"{100 * part.weights / whole.weights:.3f}",
    "type / stride": lambda whole, part: part.layers[0].printed[0],
    "filter": lambda whole, part: part.layers[0].printed[1],
    "input": lambda whole, part: part.layers[0].printed[2],
}


def agrees(printed: str, value: float) -> bool:
    """Whether value is printed: rounded to the printed decimals, or to hundreds where that is printed."""
    decimals = len(printed.partition(".")[2])
    if len(printed) > 3 and printed.endswith("00"):
        decimals = -2
    return float(printed) == round(value, decimals)


def _network(text: str) -> Count | None:
    counter, *arguments = text.split()
    pairs = (argument.split("=") for argument in arguments)
    return COUNTERS[counter](**{k: json.loads(v) if v[0].isdigit() else v for k, v in pairs})


def _explained(printed: str, unit: int, total: int, classifier: int) -> str:
    """How the printed mult-adds come about, as far as a count can tell; "" if it cannot."""
    body = total - classifier
    if agrees(printed, body / unit):
        return f"{printed} is without the classifier: {body:,}"
    if printed == str(body // unit):
        return f"{printed} is cut off, not rounded{', without the classifier' * bool(classifier)}: {body:,}"
    return ""


def _line(columns: list[str], label: str, printed: list[str], network: str, remark: str = "") -> Line:
    """The printed cells beside the count, and what explains where they differ."""
    found = _network(network) if network else None
    if found is None:
        cells = tuple(Cell(own, "") for own in printed)
        return Line(label, cells, f"not counted: {INSTALL}" if network else remark)
    part = Count(tuple(layer for layer in found.layers if label in (layer.name, layer.kind)), 0)
    cells, remarks = [], [re.sub(r"{(?:(\d) \* )?(.+?)}", _times, remark)]
    for column, own in zip(columns, printed):
        quantity = column
        if column == "million parameters" and network.startswith("torchvision"):
            quantity = "parameters with biases and norms"  # as the papers of these networks count
        value = COLUMNS[quantity](found, part)
        cells.append(Cell(own, f"{value:,}" if isinstance(value, int) else value))
        unit = {"million": 10**6, "billion": 10**9}.get(column.split()[0])
        if unit and not agrees(own, value / unit):
            if column.endswith("mult-adds"):
                remarks.insert(0, _explained(own, unit, *found.totals))
            elif agrees(own, found.parameters / unit):
                remarks.append(f"{own} is with biases and norms: {found.parameters:,}")
    return Line(label, tuple(cells), "; ".join(filter(None, remarks)))


def _times(match: re.Match) -> str:
    """The mult-adds of {NETWORK} or {FACTOR * NETWORK}."""
    return f"{int(match[1] or 1) * _network(match[2]).mult_adds:,}"


def table(number: str) -> Table:
    """A table of the paper by its number, or "F", the models of figures 4 and 5: a key of TABLES."""
    title, columns, rows = TABLES[number].values()
    return Table(number, title, tuple(columns), tuple(_line(columns[1:], *row) for row in rows))


# ---- output ----


def _columns(table: Table) -> tuple[list[str], list[list[str]]]:
    """Names and rows, without columns that are empty throughout."""
    names, rows = [table.columns[0]], [[line.label] for line in table.lines]
    for i, column in enumerate(table.columns[1:]):
        for part in Cell._fields:
            values = [getattr(line.cells[i], part) for line in table.lines]
            if any(values):
                names.append(f"{column}, {part}")
                rows = [[*row, value] for row, value in zip(rows, values)]
    if any(line.remark for line in table.lines):
        names.append("remark")
        rows = [[*row, line.remark] for row, line in zip(rows, table.lines)]
    return names, rows


def as_text(tables: list[Table]) -> str:
    """Aligned columns, remarks below."""
    blocks = []
    for table in tables:
        names, rows = _columns(table)
        if names[-1] == "remark":
            notes = [f"  {row[0]}: {row[-1]}" for row in rows if row[-1]]
            names, rows = names[:-1], [row[:-1] for row in rows]
        else:
            notes = []
        widths = [max(map(len, column)) for column in zip(names, *rows)]
        lines = [
            "  ".join(v.rjust(w) if i else v.ljust(w) for i, (v, w) in enumerate(zip(row, widths)))
            for row in (names, *rows)
        ]
        blocks.append("\n".join([heading(table), *lines, *notes]))
    return "\n\n".join(blocks) + "\n"


def as_markdown(tables: list[Table]) -> str:
    blocks = []
    for table in tables:
        names, rows = _columns(table)
        rule = ["---:" if i and name != "remark" else "---" for i, name in enumerate(names)]
        lines = ["| " + " | ".join(row) + " |" for row in (names, rule, *rows)]
        blocks.append("\n".join([f"**{heading(table)}**", "", *lines]))
    return "\n\n".join(blocks) + "\n"


def as_csv(tables: list[Table]) -> str:
    """One row a number."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["table", "model", "quantity", *Cell._fields, "remark"])
    for table in tables:
        for line in table.lines:
            for column, cell in zip(table.columns[1:], line.cells):
                counted = cell.counted if "%" in column else cell.counted.replace(",", "")
                writer.writerow([table.number, line.label, column, cell.printed, counted, line.remark])
    return text.getvalue()


def heading(table: Table) -> str:
    return f"{table.title}." if table.number == "F" else f"Table {table.number}. {table.title}."


FORMATS = {"text": as_text, "csv": as_csv, "markdown": as_markdown}


def main(argv: list[str] | None = None) -> int:
    """The command; 0, or 2 for a file that cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m mnops tables", description=__doc__.partition(": ")[2].partition("\n")[0]
    )
    some = f"some of {' '.join(TABLES)} [all]; F: the models of figures 4 and 5"
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=some)
    parser.add_argument("--format", choices=FORMATS, default="text", help="[text]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="[the terminal]")
    args = parser.parse_args(argv)
    if wrong := [t for t in args.tables if t not in TABLES]:
        parser.error(f"argument TABLE: must be some of {' '.join(TABLES)}, got {' '.join(wrong)}")
    text = FORMATS[args.format]([table(t) for t in args.tables or TABLES])
    if not args.out:
        print(text, end="")
        return 0
    try:
        args.out.write_text(text)
    except OSError as error:
        print(f"mnops tables: --out {args.out}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    return 0
