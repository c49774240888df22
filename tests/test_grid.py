"""`python -m mnops grid`: trains what is missing, goes on after a kill, and says what the rows show."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train_run import make_folder

from mnops import grid, tables
from mnops.train import TrainError, checkpoint


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A grid of four models and two variants on 24 images, to which --out comes."""
    root = tmp_path_factory.mktemp("images")
    make_folder(root / "train", {"blue": 8, "green": 8, "red": 8})
    make_folder(root / "val", {"blue": 4, "green": 4, "red": 4}, seed=1)
    return ["--data", str(root), "--widths", "0.125", "0.25", "--sizes", "16", "24", "--epochs", "2",
            "--workers", "0", "--batch-size", "12", "--device", "cpu", "--lr", "0.02"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert grid.main([*command, "--seeds", "2", "--out", str(out)]) == 0
    return out


MODELS = ["0.25-24", "0.25-16", "0.125-24", "0.125-16", "conv-0.25-24", "shallow-0.25-24"]


def without_times(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in grid.read(path)]


def test_a_row_a_model_and_seed(whole):
    rows = grid.read(whole / "grid.csv")
    assert [(r["model"], r["seed"]) for r in rows] == [(m, seed) for seed in range(2) for m in MODELS]
    for row in rows:
        counted = tables.mobilenet(row["width"], row["size"], row["variant"], classes=3)
        assert (row["mult_adds"], row["parameters"]) == (counted.mult_adds, counted.parameters)
        assert 0 <= row["test_accuracy"] <= 1
        assert (row["classes"], row["images"], row["epochs"]) == (3, 24, 2)
        best = checkpoint.load(whole / f"{row['model']}-seed{row['seed']}" / "best.pt")
        assert sum(v.numel() for k, v in best["model"].items() if "running" not in k and "num_" not in k) == (
            row["parameters"]
        )
    losses = {(r["model"], r["seed"]): r["test_loss"] for r in rows}
    assert len(set(losses.values())) == 12  # every run was another one


def test_a_killed_grid_goes_on_to_the_same_rows(command, whole, tmp_path, monkeypatch):
    """Stopped between the epochs of the third model, and by a kill before the fifth one's row."""
    args = [*command, "--out", str(tmp_path)]

    def stop(path, state, save=checkpoint.save):
        save(path, state)
        if path.name == "last.pt" and path.parent.name == "0.125-24-seed0" and state["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save", stop)
        assert grid.main(args) == 130
    assert len(grid.read(tmp_path / "grid.csv")) == 2
    assert (tmp_path / "0.125-24-seed0" / "last.pt").exists()
    assert not (tmp_path / "0.25-24-seed0" / "last.pt").exists()

    def kill(path, rows, write=grid.write):
        if len(rows) == 5:
            raise MemoryError("as a kill")
        write(path, rows)

    with monkeypatch.context() as m:
        m.setattr(grid, "write", kill)
        with pytest.raises(MemoryError):
            grid.main(args)
    assert grid.main(args) == 0
    assert without_times(tmp_path / "grid.csv") == without_times(whole / "grid.csv")[:6]
    assert list(tmp_path.glob("*/last.pt")) == []


def test_two_processes(command, tmp_path):
    """torchrun: one process group for all models, one process that writes."""
    args = [*command, "--widths", "0.125", "--sizes", "16", "--epochs", "1", "--out", str(tmp_path)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "mnops", "grid", *args], capture_output=True, text=True,
        timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # whole: torchrun's own words at the end are many
    assert [r["model"] for r in grid.read(tmp_path / "grid.csv")] == [
        "0.125-16", "conv-0.125-16", "shallow-0.125-16",
    ]  # fmt: skip
    assert done.stdout.count("difference, points") == 1


def test_what_is_there_is_not_trained_again(command, whole, monkeypatch, capsys):
    monkeypatch.setattr(grid.training, "train", lambda explicit: pytest.fail(f"trains {explicit}"))
    assert grid.main([*command, "--seeds", "2", "--out", str(whole)]) == 0
    assert "conv-0.25-24" in capsys.readouterr().out
    assert grid.main(["--report", "--out", str(whole)]) == 0
    assert capsys.readouterr().out.startswith("model")
    assert (whole / "report.txt").read_text().startswith("model")


def test_plot(whole):
    pytest.importorskip("matplotlib")
    grid.plot(grid.read(whole / "grid.csv"), whole / "again.svg")
    assert "<svg" in (whole / "again.svg").read_text()


def test_plot_without_matplotlib(whole, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert grid.main(["--report", "--out", str(whole)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("model")
    assert "no plot, which needs the package matplotlib: pip install matplotlib" in captured.err


# ---- what rows show ----


def made_up(accuracy, seeds=3):
    """Rows of the paper's 18 models with accuracy(variant, width, size, seed), a share."""
    chosen = grid.models(grid.IMAGES["widths"], grid.IMAGES["sizes"])
    return [
        {
            "model": m.name, **m._asdict(), "seed": seed, "mult_adds": int(1e6 * m.width * m.size),
            "parameters": int(1e6 * m.width), "classes": 2, "images": 9, "test_accuracy": accuracy(*m, seed),
        }
        for seed in range(seeds) for m in chosen
    ]  # fmt: skip


def test_effects_are_paired_by_seed():
    def accuracy(variant, width, size, seed):
        own = 0.5 + 0.02 * math.log2(width) + 0.01 * math.log2(size / 224) + 0.1 * seed
        return own + {"separable": 0, "conv": 0.03, "shallow": 0.001 * (-1) ** seed}[variant]

    found = {e.name: e for e in grid.effects(made_up(accuracy))}
    assert len(found) == 4 + 4 + 2
    halved = found["width 0.5 over 0.25"]
    np.testing.assert_allclose(halved.differences, [2, 2, 2], atol=1e-9)  # the seeds' own levels cancel
    assert halved.paper == pytest.approx(13.1)
    assert found["width 1 over 0.25"].verdict == "shown, as in the paper"
    np.testing.assert_allclose(found["size 224 over 128"].differences, 3 * [math.log2(1.75)], atol=1e-9)
    np.testing.assert_allclose(found["full convolution over separable"].differences, [3, 3, 3], atol=1e-9)
    thin = found["thin over shallow"]
    expected = [2 * math.log2(0.75) - 0.1 * (-1) ** seed for seed in range(3)]
    np.testing.assert_allclose(thin.differences, expected, atol=1e-9)
    assert thin.verdict == "the other way round"
    error = np.std(expected, ddof=1) / 3**0.5
    assert thin.error == pytest.approx(4.30 * error)  # Student's t of two degrees of freedom
    assert grid.Effect("two", (1.0, 1.2), 1.0).verdict.startswith("not shown")  # 12.71 * 0.1 > 1.1
    assert grid.Effect("three", (1.0, 1.2, 1.1), 1.0).verdict == "shown, as in the paper"
    assert grid.Effect("many", 6 * (1.0, -1.0), 1.0).error == pytest.approx(2.26 * (12 / 11) ** 0.5 / 12**0.5)


def test_noise_is_called_noise():
    draws = iter(np.random.default_rng(0).normal(0.9, 0.01, 200))
    verdicts = [e.verdict for e in grid.effects(made_up(lambda *_: next(draws), seeds=8))]
    assert sum(v.startswith("not shown") for v in verdicts) >= 7  # of ten
    one = grid.effects(made_up(lambda variant, width, size, seed: width, seeds=1))
    assert {e.verdict for e in one} == {"one seed: no verdict"}


def test_effects_of_what_there_is():
    rows = made_up(lambda variant, width, size, seed: width / 2 + size / 1000)
    some = [r for r in rows if r["variant"] == "separable" and r["width"] >= 0.5 and r["size"] == 224]
    found = grid.effects([r for r in some if (r["width"], r["seed"]) != (0.5, 2)])
    assert [(e.name, len(e.differences), e.paper) for e in found] == [
        ("width 1 over 0.75", 3, None), ("width 0.75 over 0.5", 2, None), ("width 1 over 0.5", 2, None),
    ]  # fmt: skip
    assert grid.effects([]) == []


def test_report():
    text = grid.report(made_up(lambda variant, width, size, seed: 0.5 + width / 10 + seed / 100))
    lines = text.splitlines()
    assert lines[18].split() == ["0.25-128", "32,000,000", "250,000", "53.50", "1.00", "3"]
    (line,) = [line for line in lines if line.startswith("width 0.5 over 0.25")]
    assert line.split()[4:] == ["+2.50", "0.00", "3", "+13.1", "shown,", "as", "in", "the", "paper"]
    assert lines[-1] == "Trained on 9 images of 2 classes; the paper's column is ImageNet's."


def test_the_papers_points_are_of_models_that_are_counted():
    assert {key[1] for key in grid.PRINTED} <= set(grid.SLIM)
    assert all(len(line) == len(grid.IMAGES["sizes"]) for line in grid.SLIM.values())
    names = {m.name for m in grid.models(grid.IMAGES["widths"], grid.IMAGES["sizes"])}
    assert len(names) == 18
    assert {grid.Model(*key).name for key in grid.PRINTED} <= names


# ---- mistakes ----


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--width", "0.5"], "--width: is set by the grid"),
        (["--seed=3"], "--seed: is set by the grid"),
        (["--report"], r"grid.csv: there is no such file; a grid writes it"),
        (["--data", "/nowhere/at/all"], "--data /nowhere/at/all: there is no such directory"),
    ],
)
def test_mistakes_are_one_sentence(args, message, tmp_path, capsys):
    assert grid.main([*args, "--out", str(tmp_path / "g")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("args", [["--widths", "0"], ["--seeds", "0"], ["--sizes"], ["--nothing"]])
def test_wrong_options(args, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        grid.main([*args, "--out", str(tmp_path / "g")])
    assert e.value.code == 2


def test_rows_of_other_settings_or_of_another_table(command, whole, tmp_path, capsys):
    before = (whole / "grid.csv").read_bytes()
    assert grid.main([*command, "--seeds", "3", "--smoothing", "0.1", "--out", str(whole)]) == 2
    assert "grid.csv: was made with " in capsys.readouterr().err
    assert (whole / "grid.csv").read_bytes() == before
    (tmp_path / "grid.csv").write_text("a,b\n1,2\n")
    with pytest.raises(TrainError, match=r"must have the columns model, .* got \['a', 'b'\]"):
        grid.read(tmp_path / "grid.csv")


def test_rows_read_back_equal(tmp_path):
    row = dict.fromkeys(grid.FIELDS, "x") | dict.fromkeys(grid.FIELDS[4:10], 7)
    row |= dict.fromkeys(grid.FIELDS[10:14], 1 / 3)
    row |= dict(width=0.375, size=40, options="--data 'a b' --lr 1")
    grid.write(tmp_path / "grid.csv", [row, row])
    assert grid.read(tmp_path / "grid.csv") == [row, row]
    with open(tmp_path / "grid.csv", newline="") as file:
        assert next(csv.reader(file)) == grid.FIELDS


# ---- the rows of the digits ----

DOCS = Path(__file__).parent.parent / "docs" / "grid"


@pytest.fixture(scope="module")
def published():
    return grid.read(DOCS / "grid.csv")


def test_the_published_rows_are_the_whole_grid_of_the_digits(published):
    chosen = grid.models(grid.DIGITS["widths"], grid.DIGITS["sizes"])
    assert [(r["model"], r["seed"]) for r in published] == [(m.name, s) for s in range(3) for m in chosen]
    assert {r["options"] for r in published} == {" ".join(grid.DIGITS["options"])}
    assert {(r["images"], r["classes"], r["epochs"]) for r in published} == {(1438, 10, 15)}
    for row in published[15:18:2]:
        counted = tables.mobilenet(row["width"], row["size"], row["variant"], 10)
        assert (row["mult_adds"], row["parameters"]) == (counted.mult_adds, counted.parameters)


def test_the_page_says_what_the_rows_show(published):
    page, text = (DOCS / "README.md").read_text(), grid.report(published)
    assert (DOCS / "report.txt").read_text() == text and f"```\n{text}```\n" in page
    for verdict in ("shown, as in the paper", "the other way round", "not shown"):
        names = [e.name for e in grid.effects(published) if e.verdict.startswith(verdict)]
        assert f"- {verdict}: {'; '.join(names) or 'none'}\n" in page
    by_name = {e.name: e.differences for e in grid.effects(published)}
    assert min(by_name["full convolution over separable"]) > 0 > max(by_name["thin over shallow"])
    worst = min(100 * sum(r["test_accuracy"] for r in published[i::18]) / 3 for i in range(18))
    assert f"the worst model is right for {worst:.0f} %" in page
    assert f"one of 359 test images is {100 / 359:.2f} points" in page
    assert all(abs(r["test_accuracy"] * 359 - round(r["test_accuracy"] * 359)) < 1e-9 for r in published)


def test_the_figure_is_of_the_published_rows(published, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    drawn = (DOCS / "grid.svg").read_text()
    if f"Matplotlib v{matplotlib.__version__}" not in drawn:
        pytest.skip("drawn by another matplotlib")
    grid.plot(published, tmp_path / "grid.svg")
    assert (tmp_path / "grid.svg").read_text() == drawn
