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

WIDTHS = (1.0, 0.75, 0.5, 0.25)
SIZES = (224, 192, 160, 128)

# ---- counting ----


class LayerCount(NamedTuple):
    """One convolution or fully connected layer."""

    name: str
    kind: str  # 1x1 | depthwise | 3x3 ... | fully connected
    stride: int
    weight: tuple[int, ...]
    input: tuple[int, ...]  # (C, H, W), or (C,)
    mult_adds: int


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


@functools.lru_cache
def peer(name: str, size: int, classes: int = 1000) -> Count | None:
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


def agrees(printed: str, value: float) -> bool:
    """Whether value is printed: rounded to the printed decimals, or to hundreds where that is printed."""
    decimals = len(printed.partition(".")[2])
    if len(printed) > 3 and printed.endswith("00"):
        decimals = -2
    return float(printed) == round(value, decimals)


def _explained(printed: str, unit: int, total: int, classifier: int) -> str:
    """How the printed mult-adds come about, as far as a count can tell; "" if it cannot."""
    body = total - classifier
    if agrees(printed, body / unit):
        return f"{printed} is without the classifier: {body:,}"
    if printed == str(body // unit):
        return f"{printed} is cut off, not rounded{', without the classifier' * bool(classifier)}: {body:,}"
    return ""


def _line(
    label: str,
    mult_adds: str,
    parameters: str,
    found: Count | None,
    remark: str = "",
    unit: int = 10**6,
    biases: bool = False,
) -> Line:
    """Printed mult-adds, in `unit`, and millions of parameters, beside the count, and what explains them."""
    if found is None:
        return Line(label, (Cell(mult_adds, ""), Cell(parameters, "")), remark)
    size = found.parameters if biases else found.weights
    remarks = [remark]
    if not agrees(mult_adds, found.mult_adds / unit):
        remarks.insert(0, _explained(mult_adds, unit, *found.totals))
    if not agrees(parameters, size / 1e6) and agrees(parameters, found.parameters / 1e6):
        remarks.append(f"{parameters} is with biases and norms: {found.parameters:,}")
    cells = Cell(mult_adds, f"{found.mult_adds:,}"), Cell(parameters, f"{size:,}")
    return Line(label, cells, "; ".join(filter(None, remarks)))


INSTALL = "pip install torchvision, the one made for this torch"


def _peer(label: str, mult_adds: str, parameters: str, found: Count | None, remark: str) -> Line:
    """A network of torchvision; parameters with biases and norms, as its own paper counts."""
    if found is None:
        remark = f"not counted: {INSTALL}"
    return _line(label, mult_adds, parameters, found, remark, biases=True)


RESOURCES = "million mult-adds", "million parameters"


def _resources(number: str, title: str, *lines: Line, first: str = "model") -> Table:
    return Table(number, title, (first, *RESOURCES), lines)


BODY = """
Conv / s2    | 3x3x3x32     | 224x224x3
Conv dw / s1 | 3x3x32 dw    | 112x112x32
Conv / s1    | 1x1x32x64    | 112x112x32
Conv dw / s2 | 3x3x64 dw    | 112x112x64
Conv / s1    | 1x1x64x128   | 56x56x64
Conv dw / s1 | 3x3x128 dw   | 56x56x128
Conv / s1    | 1x1x128x128  | 56x56x128
Conv dw / s2 | 3x3x128 dw   | 56x56x128
Conv / s1    | 1x1x128x256  | 28x28x128
Conv dw / s1 | 3x3x256 dw   | 28x28x256
Conv / s1    | 1x1x256x256  | 28x28x256
Conv dw / s2 | 3x3x256 dw   | 28x28x256
Conv / s1    | 1x1x256x512  | 14x14x256
Conv dw / s1 | 3x3x512 dw   | 14x14x512
Conv / s1    | 1x1x512x512  | 14x14x512
Conv dw / s2 | 3x3x512 dw   | 14x14x512
Conv / s1    | 1x1x512x1024 | 7x7x512
Conv dw / s2 | 3x3x1024 dw  | 7x7x1024
Conv / s1    | 1x1x1024x1024 | 7x7x1024
FC / s1      | 1024x1000    | 1x1x1024
"""  # as printed


def table_1() -> Table:
    rows = [tuple(cell.strip() for cell in line.split("|")) for line in BODY.strip().splitlines()]
    rows[13:15] = rows[13:15] * 5  # printed once, with "5x"
    lines = []
    for printed, layer in zip(rows, mobilenet().layers, strict=True):
        out, into = layer.weight[:2]
        side = "x".join(map(str, layer.input[1:] or (1, 1)))
        kind, shape = {
            "depthwise": ("Conv dw", f"3x3x{out} dw"),
            "fully connected": ("FC", f"{into}x{out}"),
        }.get(layer.kind, ("Conv", f"{layer.kind}x{into}x{out}"))
        counted = f"{kind} / s{layer.stride}", shape, f"{side}x{layer.input[0]}"
        remark = "" if printed == counted else "the layer's input and output are both 7x7: its stride is 1"
        lines.append(Line(layer.name, tuple(map(Cell, printed, counted)), remark))
    columns = "layer", "type / stride", "filter", "input"
    return Table("1", "MobileNet body architecture, average pool and softmax left out", columns, tuple(lines))


def table_2() -> Table:
    found = mobilenet()
    lines = []
    for kind, *printed in [
        ("1x1", "94.86", "74.59"),
        ("depthwise", "3.06", "1.06"),
        ("3x3", "1.19", "0.02"),
        ("fully connected", "0.18", "24.33"),
    ]:
        own = Count(tuple(layer for layer in found.layers if layer.kind == kind), 0)
        shares = [100 * own.mult_adds / found.mult_adds, 100 * own.weights / found.weights]
        differ = [p for p, share in zip(printed, shares) if not agrees(p, share)]
        remark = f"{', '.join(differ)} is a misprint: then the four do not add up to 100" if differ else ""
        cells = tuple(Cell(p, f"{share:.3f}") for p, share in zip(printed, shares))
        lines.append(Line(kind, cells, remark))
    return Table("2", "Resources by type of layer", ("type", "% mult-adds", "% parameters"), tuple(lines))


def table_3() -> Table:
    def layer(size: int, channels: int, full: bool = False) -> Count:
        kinds = {
            True: lambda: nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            False: lambda: DepthwiseSeparable(channels, channels),
        }
        return count(kinds[full], channels, size, size)

    return _resources(
        "3", "A layer of 14x14x512, modified step by step",
        _line("Convolution", "462", "2.36", layer(14, 512, full=True)),
        _line("Depthwise separable convolution", "52.3", "0.27", layer(14, 512)),
        _line("alpha = 0.75", "29.6", "0.15", layer(14, 384)),
        _line("rho = 0.714", "15.1", "0.15", layer(10, 384)),
        first="modification",
    )  # fmt: skip


def table_4() -> Table:
    return _resources(
        "4", "Depthwise separable against full convolution",
        _line("Conv MobileNet", "4866", "29.3", mobilenet(variant="conv")),
        _line("MobileNet", "569", "4.2", mobilenet()),
    )  # fmt: skip


def table_5() -> Table:
    return _resources(
        "5", "Narrow against shallow",
        _line("0.75 MobileNet", "325", "2.6", mobilenet(0.75)),
        _line("Shallow MobileNet", "307", "2.9", mobilenet(variant="shallow")),
    )  # fmt: skip


def table_6() -> Table:
    printed = {1.0: ("569", "4.2"), 0.75: ("325", "2.6"), 0.5: ("149", "1.3"), 0.25: ("41", "0.5")}
    lines = [_line(f"{w} MobileNet-224", *own, mobilenet(w)) for w, own in printed.items()]
    return _resources("6", "Width multiplier", *lines)


def table_7() -> Table:
    printed = {224: "569", 192: "418", 160: "290", 128: "186"}
    lines = [_line(f"1.0 MobileNet-{n}", own, "4.2", mobilenet(size=n)) for n, own in printed.items()]
    return _resources("7", "Resolution", *lines)


def table_8() -> Table:
    return _resources(
        "8", "Comparison with popular models",
        _line("1.0 MobileNet-224", "569", "4.2", mobilenet()),
        _peer("GoogLeNet", "1550", "6.8", peer("googlenet", 224),
              "torchvision's has 3x3 filters where the original has 5x5"),
        _peer("VGG 16", "15300", "138", peer("vgg16", 224), ""),
    )  # fmt: skip


def table_9() -> Table:
    squeezenet = peer("squeezenet1_0", 227)
    remark = ""
    if squeezenet:
        remark = f"1700 counts multiplications and additions apart: {2 * squeezenet.mult_adds:,}"
    return _resources(
        "9", "Comparison of a smaller MobileNet with popular models",
        _line("0.5 MobileNet-160", "76", "1.32", mobilenet(0.5, 160)),
        _peer("SqueezeNet (227x227)", "1700", "1.25", squeezenet, remark),
        _peer("AlexNet", "720", "60", peer("alexnet", 224),
              "torchvision's is arXiv:1404.5997's, without groups; the original has two towers"),
    )  # fmt: skip


def table_10() -> Table:
    lines = [
        _peer("Inception V3 (299x299)", "5000", "23.2", peer("inception_v3", 299, 120),
              "section 4.4 has 5.74 billion for it; torchvision's with 1000 classes has 23.8 million weights")
    ]  # fmt: skip
    for width, size, *printed in [
        (1.0, 224, "569", "3.3"), (0.75, 224, "325", "1.9"),
        (1.0, 192, "418", "3.3"), (0.75, 192, "239", "1.9"),
    ]:  # fmt: skip
        found, whole = mobilenet(width, size, classes=120), mobilenet(width, size).mult_adds
        differs = not agrees(printed[0], found.mult_adds / 1e6)
        remark = f"{printed[0]} is with ImageNet's 1000 classes: {whole:,}" if differs else ""
        lines.append(_line(f"{width} MobileNet-{size}", *printed, found, remark))
    return _resources("10", "Stanford Dogs, 120 classes", *lines)


def table_12() -> Table:
    lines = []
    for width, size, *printed in [
        (1.0, 224, "568", "3.2"), (0.5, 224, "149", "0.8"), (0.25, 224, "45", "0.2"),
        (1.0, 128, "185", "3.2"), (0.5, 128, "48", "0.8"), (0.25, 128, "15", "0.2"),
    ]:  # fmt: skip
        found, remark = mobilenet(width, size, classes=0), ""
        if width == 0.25:
            wider = mobilenet(width, size, classes=0, min_depth=16).mult_adds
            remark = f"{printed[0]}: with at least 16 channels a layer (min_depth=16) it is {wider:,}"
        lines.append(_line(f"{width} MobileNet-{size}", *printed, found, remark))
    missing = "not published; section 4.5 has 75 million parameters for it"
    lines.append(_line("Baseline", "1600", "7.5", None, missing))
    return _resources("12", "Face attributes, counted without a last layer", *lines)


def table_13() -> Table:
    ssd, small, large = detector("ssd", 300), detector("faster_rcnn", 300), detector("faster_rcnn", 600)
    other = "a detector of the paper that is not in this package"
    absent = "" if ssd else f"not counted: {INSTALL}"
    lines = [
        _line(label, *printed, found, absent if label.endswith("MobileNet") else other, unit=10**9)
        for label, found, *printed in [
            ("SSD 300 deeplab-VGG", None, "34.9", "33.1"), ("SSD 300 Inception V2", None, "3.8", "13.7"),
            ("SSD 300 MobileNet", ssd, "1.2", "6.8"),
            ("Faster-RCNN 300 VGG", None, "64.3", "138.5"),
            ("Faster-RCNN 300 Inception V2", None, "118.2", "13.3"),
            ("Faster-RCNN 300 MobileNet", small, "25.2", "6.1"),
            ("Faster-RCNN 600 VGG", None, "149.6", "138.5"),
            ("Faster-RCNN 600 Inception V2", None, "129.6", "13.3"),
            ("Faster-RCNN 600 MobileNet", large, "30.5", "6.1"),
        ]
    ]  # fmt: skip
    columns = "detector", "billion mult-adds", "million parameters"
    return Table("13", "Object detection, 91 classes with the background", columns, tuple(lines))


def table_14() -> Table:
    lines = [_line("FaceNet", "1600", "7.5", None, "the teacher, which is not in this package")]
    head = "the layer that makes the embedding, which the parameters include, is not described"
    for width, size, label, *printed in [
        (1.0, 160, 160, "286", "4.9"), (1.0, 128, 128, "185", "5.5"),
        (0.75, 160, 128, "166", "3.4"), (0.75, 128, 128, "108", "3.8"),
    ]:  # fmt: skip
        found = mobilenet(width, size, classes=0)
        misprint = f"printed as a second 0.75 MobileNet-{label}; " if size != label else ""
        differs = not agrees(printed[0], found.mult_adds / 1e6)
        remark = f"{misprint}{f'{printed[0]} is not explained; ' if differs else ''}{head}"
        lines.append(_line(f"{width} MobileNet-{size}", *printed, found, remark))
    return _resources("14", "Face embeddings, counted without a last layer", *lines)


def figures() -> Table:
    """The 16 models of figures 4 and 5, whose numbers are printed only where tables 6 and 7 have them."""
    lines = [
        _exact(f"{width} MobileNet-{size}", mobilenet(width, size)) for width in WIDTHS for size in SIZES
    ]
    variants = [_exact(f"{v.title()} MobileNet-224", mobilenet(variant=v)) for v in ("conv", "shallow")]
    columns = "model", "mult-adds", "weights", "parameters with biases and norms"
    return Table("F", "The 16 models of figures 4 and 5, and two variants", columns, (*lines, *variants))


def _exact(label: str, found: Count) -> Line:
    numbers = found.mult_adds, found.weights, found.parameters
    return Line(label, tuple(Cell("", f"{n:,}") for n in numbers))


TABLES = {
    "1": table_1, "2": table_2, "3": table_3, "4": table_4, "5": table_5, "6": table_6, "7": table_7,
    "8": table_8, "9": table_9, "10": table_10, "12": table_12, "13": table_13,
    "14": table_14, "F": figures,
}  # fmt: skip

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
        blocks.append("\n".join([title(table), *lines, *notes]))
    return "\n\n".join(blocks) + "\n"


def as_markdown(tables: list[Table]) -> str:
    blocks = []
    for table in tables:
        names, rows = _columns(table)
        rule = ["---:" if i and name != "remark" else "---" for i, name in enumerate(names)]
        lines = ["| " + " | ".join(row) + " |" for row in (names, rule, *rows)]
        blocks.append("\n".join([f"**{title(table)}**", "", *lines]))
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


def title(table: Table) -> str:
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
    text = FORMATS[args.format]([TABLES[t]() for t in args.tables or TABLES])
    if not args.out:
        print(text, end="")
        return 0
    try:
        args.out.write_text(text)
    except OSError as error:
        print(f"mnops tables: --out {args.out}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    return 0
