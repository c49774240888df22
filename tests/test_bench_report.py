"""The report: pages from rows, and the README that must say what the rows say."""

import pytest

from mnops.bench import harness as load

rows, report, figures = load("rows"), load("report"), load("figures")

COMMON = {
    "count": 1,
    "check": "ok",
    "error": 1e-6,
    "rounds": 9,
    "against": "mnops",
    "bytes": 1e9,
    "flops": 1e9,
    "copy_gbs": 20,
    "gemm_gflops": 100,
    "floor_ms": 50,
    "cache_bytes": 3e7,
    "torch": "2.13.0",
    "commit": "abc",
    "date": "2026-01-01",
    "shape": "s",
    "launch": "call",
    "threads": 2,
    "machine": "A CPU, 2 cores",
    "dtype": "float32",
    "batch": 16,
}


def made(suite, case, op, form, phase, **times):
    for name, time in times.items():
        ratio = time / times["mnops"]
        yield {
            **COMMON,
            "suite": suite,
            "case": case,
            "op": op,
            "form": form,
            "pass": phase,
            "contender": name.replace("_", "-"),
            "p20_ms": time * 0.9,
            "p50_ms": time,
            "p80_ms": time * 1.1,
            "ratio": ratio,
            "ratio_q1": ratio * 0.95,
            "ratio_q3": ratio * 1.05,
            "saved_bytes": 1e6 * time,
            "peak_bytes": 2e6 * time,
            "backend": "torch 2.13.0",
        }


@pytest.fixture
def folder(tmp_path):
    table = [
        *made(
            "net",
            "1.0-224",
            "mobilenet_v1",
            "network",
            "train",
            mnops=100.0,
            torch_nchw=300.0,
            torch_compile=180.0,
        ),
        *made(
            "net", "1.0-224", "mobilenet_v1", "network", "infer", mnops=50.0, torch_nchw=90.0, openvino=40.0
        ),
        *made(
            "ops",
            "dw3s1_32x112",
            "depthwise",
            "chained",
            "train",
            mnops=10.0,
            torch_nchw=40.0,
            torch_compile=35.0,
        ),
        *made(
            "ops",
            "dw3s2_64x112",
            "depthwise",
            "chained",
            "train",
            mnops=10.0,
            torch_nchw=15.0,
            torch_compile=25.0,
        ),
        *made("startup", "1.0-224", "mobilenet_v1", "network", "import", mnops=100.0, openvino=200.0),
    ]
    broken = {**table[0], "contender": "timm", "check": "wrong", "error": 0.9, "p50_ms": None, "ratio": None}
    rows.write(tmp_path / "results" / "a-cpu.csv", [*table, broken])
    rows.write(tmp_path / "results" / "quick.csv", [{**table[0], "machine": "not a result"}])
    return tmp_path


def test_pages_hold_the_rows(folder):
    pytest.importorskip("matplotlib")
    readme = folder / "README.md"
    readme.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nThe end.\n")
    argv = ["--results", str(folder / "results"), "--readme", str(readme)]
    assert report.main([*argv, "--check"]) == 1
    assert report.main(argv) == 0
    assert report.main([*argv, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# Title")
    assert text.endswith("The end.\n")
    assert "old" not in text
    # the best other: the compiler in training, the runtime that beats mnops in inference, each layer's best
    for line in (
        "| training step, MobileNet-1.0-224, batch 16 | 100 | 180 | torch-compile | 1.80 [1.71, 1.89] |",
        "| inference, MobileNet-1.0-224, batch 16 | 50 | 40 | openvino | 0.80 [0.76, 0.84] |",
        "sum of 2 MobileNet layers | 20 | 50 | best PyTorch of each | 2.50, least 1.50 |",
    ):
        assert line in text
    page = (folder / "results" / "REPORT.md").read_text()
    assert "1.0-224 infer, batch 16, 2 threads: openvino takes 0.80 [0.76, 0.84] of mnops' time" in page
    assert "1.0-224 train, batch 16: timm: wrong" in page
    assert "not a result" not in page
    for name, _ in figures.available(rows.read_all(folder / "results")):
        assert f"a-cpu-2-cores-{name}.svg" in page
        assert (folder / "results" / "figures" / f"a-cpu-2-cores-{name}.svg").stat().st_size > 1000


def test_the_same_rows_give_the_same_figures(folder, tmp_path):
    pytest.importorskip("matplotlib")
    table = [r for r in rows.read_all(folder / "results") if r["suite"] == "net"]
    for name in ("one", "two"):
        figures.draw(table, tmp_path / name, "x")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_readme_says_what_the_rows_say():
    table = rows.read_all(report.RESULTS)
    if not table:
        pytest.skip("no measured rows are committed")
    text = report.README.read_text()
    assert report.with_block(text, report.readme_block(table)) == text, "run `python -m mnops report`"


def test_every_figure_of_the_readme_is_there():
    table = rows.read_all(report.RESULTS)
    for own in report.by_machine(table).values():
        for line in report.pictures(own, "benchmarks/results/figures").split():
            if "(" in line:
                assert (report.machine.ROOT / line[line.index("(") + 1 : line.index(")")]).exists()


def test_no_rows_is_said(tmp_path):
    with pytest.raises(SystemExit, match="no rows"):
        report.main(["--results", str(tmp_path)])
