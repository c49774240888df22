"""`python -m mnops tables`: every count of the paper to the last digit, and a word on each that differs."""

import csv
import io
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torchvision_support
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import mnops
from mnops import tables
from mnops.__main__ import main as commands
from mnops.bench import harness
from mnops.models import STAGES, VARIANTS

# arXiv:1704.04861, counted exactly: mult-adds at 224, 192, 160, 128; weights; parameters of torch
COUNTS = {
    (1.0, "separable"): ((568_740_352, 418_121_728, 290_675_200, 186_400_768), 4_209_088, 4_231_976),
    (0.75, "separable"): ((325_400_448, 239_273_472, 166_396_800, 106_770_432), 2_568_144, 2_585_560),
    (0.5, "separable"): ((149_497_088, 109_970_432, 76_524_800, 49_160_192), 1_319_648, 1_331_592),
    (0.25, "separable"): ((41_030_272, 30_212_608, 21_059_200, 13_570_048), 463_600, 470_072),
    (1.0, "conv"): ((4_867_293_184,), 29_281_120, 29_294_088),
    (1.0, "shallow"): ((307_323_392,), 2_875_328, 2_887_976),
}


@pytest.mark.parametrize(("width", "variant"), COUNTS)
def test_counts(width, variant):
    mult_adds, weights, parameters = COUNTS[width, variant]
    found = [tables.mobilenet(width, size, variant) for size in (224, 192, 160, 128)[: len(mult_adds)]]
    assert tuple(f.mult_adds for f in found) == mult_adds
    assert {f.weights for f in found} == {weights}
    assert {f.parameters for f in found} == {parameters}


class NoTracker(nullcontext):
    """In place of FlopCounterMode's tracker, whose hooks on every module have them run as stock."""

    parents = {"Global"}  # noqa: RUF012


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("width", "variant"), [(0.25, "separable"), (1.0, "conv")])
def test_the_fused_ops_count_as_the_stock_ones(width, variant, training):
    with FakeTensorMode(), torch.no_grad():
        model = mnops.MobileNet(width_mult=width, stages=VARIANTS[variant]).train(training)
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = NoTracker()
        with counter:
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() == 2 * COUNTS[width, variant][0][0]
    counted = {str(op) for op in counter.get_flop_counts()["Global"]}
    assert "mnops.stem_conv2d" in counted
    assert ("aten.convolution" in counted) == (variant == "conv")  # wide dense layers are stock's
    if training and variant == "separable":
        assert {"mnops.depthwise_conv2d", "mnops.pointwise_conv2d"} <= counted


def test_table_3_is_the_papers_formulas():
    k, m, n, side, thin, small = 3, 512, 512, 14, 384, 10  # D_K, M, N, D_F, 0.75 M, 0.714 D_F
    expected = [
        (k * k * m * n * side**2, k * k * m * n),
        (k * k * m * side**2 + m * n * side**2, k * k * m + m * n),
        (k * k * thin * side**2 + thin**2 * side**2, k * k * thin + thin**2),
        (k * k * thin * small**2 + thin**2 * small**2, k * k * thin + thin**2),
    ]
    found = [[int(c.counted.replace(",", "")) for c in line.cells] for line in tables.table("3").lines]
    assert found == [list(pair) for pair in expected]
    assert expected[0] == (462_422_016, 2_359_296)
    assert expected[3] == (15_091_200, 150_912)


def test_table_2_adds_up_but_for_the_misprint():
    lines = tables.table("2").lines
    for column in range(2):
        assert sum(float(line.cells[column].counted) for line in lines) == pytest.approx(100, abs=2e-3)
    assert [line.label for line in lines if line.remark] == ["3x3"]


def test_table_1_finds_the_misprinted_stride():
    table = tables.table("1")
    assert len(table.lines) == 28
    differ = [(line.label, [c for c in line.cells if c.printed != c.counted]) for line in table.lines]
    cell = tables.Cell("Conv dw / s2", "Conv dw / s1")
    assert [d for d in differ if d[1]] == [("blocks.4.1.conv_dw", [cell])]
    assert [line.label for line in table.lines if line.remark] == ["blocks.4.1.conv_dw"]


def test_the_benchmarks_measure_the_same_layers():
    shapes, stock = harness("shapes"), harness("stock")
    kinds = {"3x3": "stem", "1x1": "pointwise", "depthwise": "depthwise"}
    ours = [
        (kinds[layer.kind], layer.input[0], layer.weight[0], *layer.input[1:], layer.weight[2], layer.stride)
        for layer in tables.mobilenet().layers[:-1]
    ]
    measured = [
        (row.op, row.channels, row.out_channels, row.height, row.width, row.kernel, row.stride)
        for row in shapes.layers("mobilenet_v1") for _ in range(row.count)
    ]  # fmt: skip
    assert sorted(measured) == sorted(ours)
    assert [[tuple(row) for row in stage] for stage in stock.STAGES] == [list(stage) for stage in STAGES]


def disagreements(table):
    """(label, printed) of every printed number that is not the count rounded."""
    unit = {"million mult-adds": 1e6, "million parameters": 1e6, "billion mult-adds": 1e9}
    unit |= {"% mult-adds": 1, "% parameters": 1}
    for line in table.lines:
        for column, cell in zip(table.columns[1:], line.cells):
            if cell.printed and cell.counted and column in unit:
                value = float(cell.counted.replace(",", "")) / unit[column]
                if not tables.agrees(cell.printed, value):
                    yield line.label, cell.printed


DIFFER = {
    "2": [("3x3", "1.19")], "3": [], "5": [], "6": [],
    "4": [("Conv MobileNet", "4866")],
    "7": [("1.0 MobileNet-160", "290")],
    "9": [("0.5 MobileNet-160", "76")],
    "10": [("1.0 MobileNet-224", "569"), ("1.0 MobileNet-192", "418")],
    "12": [("0.25 MobileNet-224", "45"), ("0.5 MobileNet-128", "48"), ("0.25 MobileNet-128", "15")],
}  # fmt: skip


@pytest.mark.parametrize("number", DIFFER)
def test_what_differs(number, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    tables.peer.cache_clear()
    table = tables.table(number)
    assert list(disagreements(table)) == DIFFER[number]
    remarks = {line.label: line.remark for line in table.lines}
    assert all(printed in remarks[label] for label, printed in DIFFER[number])


@pytest.mark.parametrize("number", [n for n in tables.TABLES if n not in ("1", "F")])
def test_whatever_differs_or_is_missing_has_a_remark(number):
    table = tables.table(number)
    differ = {label for label, _ in disagreements(table)}
    missing = {line.label for line in table.lines if not all(cell.counted for cell in line.cells)}
    assert {line.label for line in table.lines if line.remark} >= differ | missing


def test_the_remarks_numbers():
    some = {n: tables.table(n) for n in ("4", "7", "9", "12")}
    remark = {(n, line.label): line.remark for n, table in some.items() for line in table.lines}
    assert "4,866,269,184" in remark["4", "Conv MobileNet"]  # the printed 4866, 290 and 76
    assert "289,651,200" in remark["7", "1.0 MobileNet-160"]
    assert "76,012,800" in remark["9", "0.5 MobileNet-160"]
    assert "45,992,576" in remark["12", "0.25 MobileNet-224"]


@pytest.mark.parametrize(
    ("printed", "value", "same"),
    [
        ("569", 568.74, True),
        ("290", 290.68, False),
        ("0.27", 0.266752, True),
        ("15300", 15346.6, True),
        ("15300", 15470.3, False),
        ("1.19", 1.906, False),
        ("4.2", 4.26, False),
    ],
)
def test_agrees(printed, value, same):
    assert tables.agrees(printed, value) is same


def test_count_of_any_module():
    def build():
        return nn.Sequential(
            nn.Conv2d(3, 8, (1, 7), padding=(0, 3)), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, 2, 1, groups=8),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        )  # fmt: skip

    found = tables.count(build, 3, 10, 12)
    expected = [("1x7", 120 * 8 * 21), ("depthwise", 30 * 16 * 9), ("fully connected", 80)]
    assert [(layer.kind, layer.mult_adds) for layer in found.layers] == expected
    assert [layer.input for layer in found.layers] == [(3, 10, 12), (8, 10, 12), (16,)]
    assert found.totals == (sum(m for _, m in expected), 80)
    assert found.weights == 8 * 21 + 16 * 9 + 80
    assert found.parameters == found.weights + 8 + 16 + 16 + 5


# ---- torchvision's peers ----


def test_peers():
    torchvision_support.load()
    tables.peer.cache_clear()
    found = {name: tables.peer(name, 224) for name in ("alexnet", "vgg16")}
    assert (found["alexnet"].mult_adds, found["alexnet"].parameters) == (714_188_480, 61_100_840)
    assert (found["vgg16"].mult_adds, found["vgg16"].parameters) == (15_470_264_320, 138_357_544)
    assert found["vgg16"].totals[1] == 123_633_664


def test_detectors():
    torchvision_support.load()
    pytest.importorskip("mnops.models.detection")
    tables.detector.cache_clear()
    ssd = tables.detector("ssd", 300)
    assert (ssd.mult_adds, ssd.weights) == (1_237_129_408, 6_791_360)
    table = tables.table("13")
    counted = {line.label: line.cells[0].counted for line in table.lines if line.cells[0].counted}
    assert counted == {
        "SSD 300 MobileNet": "1,237,129,408",
        "Faster-RCNN 300 MobileNet": "25,223,422,912",  # printed in billions: 25.2 and 30.5
        "Faster-RCNN 600 MobileNet": "30,486,057,088",
    }
    differ = list(disagreements(table))
    assert differ == [(f"Faster-RCNN {size} MobileNet", "6.1") for size in (300, 600)]
    remarks = {line.label: line.remark for line in table.lines}
    assert all("6.1 is with biases and norms: 6,063,939" in remarks[label] for label, _ in differ)


def test_the_page_is_what_the_command_writes(tmp_path):
    torchvision_support.load()
    tables.peer.cache_clear()
    tables.detector.cache_clear()
    page = Path(__file__).parent.parent / "docs" / "tables.md"
    assert tables.main(["--format", "markdown", "--out", str(tmp_path / "tables.md")]) == 0
    assert page.read_text() == (tmp_path / "tables.md").read_text()


def test_without_torchvision_the_table_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    tables.peer.cache_clear()
    lines = tables.table("8").lines
    assert [bool(line.cells[0].counted) for line in lines] == [True, False, False]
    assert all("pip install torchvision" in line.remark for line in lines[1:])
    tables.peer.cache_clear()


# ---- output ----


def test_csv(capsys):
    assert tables.main(["4", "F", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    found = {(r["table"], r["model"], r["quantity"]): (r["printed"], r["counted"]) for r in rows}
    assert found["4", "Conv MobileNet", "million mult-adds"] == ("4866", "4867293184")
    assert found["F", "0.25 MobileNet-128", "mult-adds"] == ("", "13570048")
    assert len(rows) == 2 * 2 + 18 * 3


def test_markdown(capsys):
    assert tables.main(["7", "--format", "markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "**Table 7. Resolution.**"
    assert {line.count("|") for line in lines[2:]} == {7}
    assert lines[3] == "| --- | ---: | ---: | ---: | ---: | --- |"
    assert lines[6].startswith("| 1.0 MobileNet-160 | 290 | 290,675,200 | 4.2 | 4,209,088 | 290 is without")


def test_text_has_every_table(capsys):
    assert tables.main([]) == 0
    out = capsys.readouterr().out
    assert [n for n in tables.TABLES if n != "F" and f"Table {n}. " not in out] == []
    assert "  1.0 MobileNet-160: 290 is without the classifier: 289,651,200\n" in out
    assert "568,740,352" in out


def test_out_and_bad_arguments(tmp_path, capsys):
    assert tables.main(["6", "--out", str(tmp_path / "t.txt")]) == 0
    assert "41,030,272" in (tmp_path / "t.txt").read_text()
    assert capsys.readouterr().out == ""
    assert tables.main(["6", "--out", str(tmp_path / "no" / "t.txt")]) == 2
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        tables.main(["11", "6"])
    assert e.value.code == 2
    assert "argument TABLE: must be some of 1 2 3 4 5 6 7 8 9 10 12" in capsys.readouterr().err


def test_the_command(capsys):
    assert commands(["tables", "6"]) == 0
    assert "149,497,088" in capsys.readouterr().out
