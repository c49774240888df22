"""`python -m mnops train` as a user meets it: on tiny images, in this process or in processes of its own."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mnops
from mnops.train import checkpoint
from mnops.train.cli import main

SMALL = ["--device", "cpu", "--width", "0.25", "--size", "16", "--log-steps", "1", "--compare", "0"]


def options(*args) -> list[str]:
    return [*SMALL, *map(str, args)]


def rows(path: Path, *skip: str) -> list[dict[str, str]]:
    """A log's rows as they are written, to the last digit, without the columns that hold times."""
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second", *skip)}
                for row in csv.DictReader(file)]


def losses(out: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(out / "steps.csv")]


def make_folder(root: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Class folders of noisy images, each class of a hue of its own, sizes and file types mixed."""
    rng = np.random.default_rng(seed)
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 120, (20 + i, 24, 3), dtype=np.uint8)
            pixels[..., label % 3] += 130
            Image.fromarray(pixels).save(root / name / f"{i}.{('png', 'jpg', 'bmp')[i % 3]}")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """What is tested here is too small to share, and a thread more waits long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    make_folder(root / "train", {"blue": 12, "green": 12, "red": 12})
    make_folder(root / "val", {"blue": 5, "green": 5, "red": 5}, seed=1)
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(options("--data", folder, "--out", out, "--epochs", 20, "--batch-size", 12, "--workers", 0,
                        "--size", 32, "--lr", 0.03, "--warmup-epochs", 2, "--bn-momentum", 0.3)) == 0
    return out


def test_learns_a_folder_and_says_how_well(trained):
    epochs = rows(trained / "epochs.csv")
    assert [int(r["epoch"]) for r in epochs] == list(range(1, 21))
    assert [int(r["step"]) for r in rows(trained / "steps.csv")] == list(range(1, 61))
    assert float(epochs[-1]["test_accuracy"]) > 0.8
    assert float(epochs[-1]["loss"]) < 0.5 * float(epochs[0]["loss"])
    last, best = checkpoint.load(trained / "last.pt"), checkpoint.load(trained / "best.pt")
    assert (last["step"], last["classes"]) == (60, ["blue", "green", "red"])
    assert best["test_accuracy"] == max(float(r["test_accuracy"]) for r in epochs) == last["best"]
    assert sorted(os.listdir(trained)) == ["best.pt", "epochs.csv", "last.pt", "steps.csv"]


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_evaluate_finds_the_accuracy_of_training(trained, name, capsys):
    state = checkpoint.load(trained / name)
    row = rows(trained / "epochs.csv")[state["step"] // 3 - 1]
    assert main(["--evaluate", str(trained / name), "--device", "cpu"]) == 0  # data, width, size are recorded
    out = capsys.readouterr().out
    assert out.startswith(f"test accuracy {100 * float(row['test_accuracy']):.2f} %")
    assert f"loss {float(row['test_loss']):.4f}, 15 images" in out


def test_evaluates_a_plain_state_dict_and_the_stock_network_alike(trained, folder, tmp_path, capsys):
    assert main(["--evaluate", str(trained / "last.pt"), "--device", "cpu", "--stock"]) == 0
    expected = capsys.readouterr().out
    torch.save(checkpoint.load(trained / "last.pt")["model"], tmp_path / "weights.pt")
    assert main(options("--evaluate", tmp_path / "weights.pt", "--data", folder, "--size", 32)) == 0
    assert capsys.readouterr().out.split("(")[0] == expected.split("(")[0]


def test_a_seed_repeats_whatever_the_workers_and_another_does_not(folder, tmp_path):
    def run(name, seed, workers):
        assert main(options("--data", folder, "--out", tmp_path / name, "--epochs", 2, "--batch-size", 12,
                            "--workers", workers, "--seed", seed, "--dropout", 0.2, "--mixup", 0.2)) == 0
        return rows(tmp_path / name / "steps.csv"), rows(tmp_path / name / "epochs.csv")

    first = run("a", 3, 0)
    assert run("b", 3, 2) == first
    assert run("c", 4, 0)[0][0]["loss"] != first[0][0]["loss"]


def test_stock_follows_fused(folder, tmp_path):
    for name, more in (("fused", []), ("stock", ["--stock"])):
        assert main(options("--data", folder, "--out", tmp_path / name, "--epochs", 4, "--batch-size", 18,
                            "--workers", 0, "--act", "silu", "--size", 48, "--lr", 0.01, *more)) == 0
    np.testing.assert_allclose(losses(tmp_path / "fused"), losses(tmp_path / "stock"), rtol=1e-4)


@pytest.mark.parametrize("more", [
    ["--amp", "bf16"], ["--amp", "fp16"], ["--no-channels-last"], ["--stock"],
    ["--optimizer", "sgd", "--schedule", "constant"], ["--optimizer", "adamw"],
    ["--preset", "tf-slim", "--schedule", "exponential", "--warmup-epochs", "1"],
    ["--ema", "0.5", "--smoothing", "0.1", "--mixup", "0.2", "--accumulate", "3", "--act", "hardswish"],
], ids=" ".join)
def test_options_train_and_resume_to_the_same_end(folder, tmp_path, more):
    """Every option's state is in the checkpoint: stopping after each epoch gives what one run gives."""
    args = options("--data", folder, "--batch-size", 12, "--workers", 0, "--epochs", 2, "--lr", 0.02, *more)
    assert main([*args, "--out", str(tmp_path / "whole")]) == 0
    halves = str(tmp_path / "halves")

    class Stop(Exception):
        pass

    def stop(path, state, save=checkpoint.save):
        save(path, state)
        if path.name == "last.pt":
            raise Stop

    with pytest.MonkeyPatch.context() as m:
        m.setattr(checkpoint, "save", stop)
        with pytest.raises(Stop):
            main([*args, "--out", halves])
    assert main(["--out", halves, "--device", "cpu", "--resume", "--log-steps", "1"]) == 0  # rest: recorded
    for name in ("steps.csv", "epochs.csv"):
        assert rows(tmp_path / "halves" / name) == rows(tmp_path / "whole" / name)
    whole, resumed = (checkpoint.load(tmp_path / d / "last.pt") for d in ("whole", "halves"))
    torch.testing.assert_close(resumed["model"], whole["model"], rtol=0, atol=0)
    assert np.isfinite(losses(tmp_path / "whole")).all()


def mnops_train(*args, launcher=()) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *launcher, "-m", "mnops", "train", *args], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen) -> str:
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, err[-2000:]
    return out


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """kill -9 in the middle of an epoch; the digits, one worker process, everything random switched on."""
    args = options("--epochs", 2, "--checkpoint-steps", 4, "--dropout", 0.2, "--mixup", 0.2, "--ema", 0.9,
                   "--accumulate", 2, "--workers", 1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*args, "--out", str(whole)]) == 0
    process = mnops_train(*args, "--out", str(killed))
    until = time.monotonic() + 120
    while not (killed / "steps.csv").exists() or len(rows(killed / "steps.csv")) < 14:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    step = checkpoint.load(killed / "last.pt")["step"]
    assert 0 < step < 44, "the kill must fall inside the run"
    out = finish(mnops_train("--resume", "--out", str(killed), "--log-steps", "1", "--compare", "0"))
    assert "test accuracy" in out
    for name in ("steps.csv", "epochs.csv"):
        assert rows(killed / name) == rows(whole / name)
    a, b = checkpoint.load(killed / "last.pt"), checkpoint.load(whole / "last.pt")
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


def test_two_processes_give_the_losses_of_one(folder, tmp_path, capsys):
    """torchrun, two gloo processes, synchronised BatchNorm: the same curve, random crops included. The
    activation is smooth, so that rounding does not grow from step to step by flipping ReLUs."""
    args = options("--data", folder, "--epochs", 2, "--batch-size", 18, "--workers", 0, "--act", "silu",
                   "--size", 48, "--lr", 0.01)
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*args, "--out", str(one)]) == 0
    single = capsys.readouterr().out
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    double = finish(mnops_train(*args, "--sync-bn", "--out", str(two), launcher=torchrun))
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)
    for a, b in zip(rows(one / "epochs.csv"), rows(two / "epochs.csv")):
        assert float(a["test_loss"]) == pytest.approx(float(b["test_loss"]), rel=1e-3)
        assert a["test_accuracy"] == b["test_accuracy"]
    assert single.count("15 images") == double.count("15 images") == 1  # one rank speaks; 8 + 7 were tested


def test_compares_with_the_stock_step_and_changes_nothing(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(options("--data", folder, "--out", out, "--epochs", 1, "--batch-size", 12, "--workers", 0,
                        "--compare", 0.2)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"fused step [\d.]+ ms, stock step [\d.]+ ms \((channels_last|NCHW)\): [\d.]+ times as "
                     r"fast \(quartiles [\d.]+ to [\d.]+ of \d+ interleaved rounds; batch 12x3x16x16, amp",
                     printed)


def test_tensorboard(folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(options("--data", folder, "--out", tmp_path / "run", "--epochs", 2, "--batch-size", 12,
                        "--workers", 0, "--tensorboard")) == 0
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [e.step for e in events.Scalars("epoch/test_accuracy")] == [3, 6]
    logged = [e.value for e in events.Scalars("step/loss")]
    np.testing.assert_allclose(logged, losses(tmp_path / "run"), rtol=1e-6)


def refuses(capsys, message: str, *args) -> None:
    """One sentence on stderr, status 2, no traceback."""
    try:
        status = main([str(a) for a in args])
    except SystemExit as e:
        status = e.code
    err = capsys.readouterr().err
    assert status == 2, err
    assert re.search(message, err), err
    assert "Traceback" not in err


@pytest.mark.parametrize(("args", "message"), [
    (["--optimizer", "adagrad"], "--optimizer: invalid choice: 'adagrad'"),
    (["--epochs", "0"], "--epochs: must be an integer of at least 1, got '0'"),
    (["--batch-size", "1.5"], "--batch-size: must be an integer of at least 1, got '1.5'"),
    (["--lr", "nan"], "--lr: must be a number above 0, got 'nan'"),
    (["--lr", "inf"], "--lr: must be a number above 0, got 'inf'"),
    (["--lr", "0"], "--lr: must be a number above 0, got '0'"),
    (["--width", "-1"], "--width: must be a number above 0, got '-1'"),
    (["--dropout", "1"], "--dropout: must be a number of at least 0 and at most 0.999, got '1'"),
    (["--crop-scale", "0.9", "0.5"], r"must be LOW HIGH with LOW <= HIGH <= 1\.5625.* got 0\.9 0\.5"),
    (["--crop-scale", "0.9", "1.6"], r"must be LOW HIGH with LOW <= HIGH <= 1\.5625.* got 0\.9 1\.6"),
    (["--crop-ratio", "2", "1"], "--crop-ratio: must be LOW HIGH with LOW <= HIGH, got 2 1"),
    (["--warmup-epochs", "9", "--epochs", "2"], "--warmup-epochs: must be at most --epochs = 2, got 9"),
    (["--batch-size", "2000"], "--batch-size: must be at most the number of training images = 1438, got"),
    (["--batch-size", "64", "--accumulate", "3"], r"--batch-size: must be a multiple of .* 1 x 3, got 64"),
    (["--sync-bn", "--stock", "--device", "cpu"], "--sync-bn: with --stock or --variant conv.* needs a GPU"),
    (["--sync-bn", "--variant", "conv", "--device", "cpu"], "--sync-bn: with --stock or --variant conv"),
    (["--variant", "deep"], "--variant: invalid choice: 'deep'"),
    (["--device", "gpu"], "--device gpu: "),
    (["--device", "cuda:77"], "--device cuda:77: "),
    (["--data", "/nowhere/at/all"], "--data /nowhere/at/all: there is no such directory"),
    (["--evaluate", "/nowhere/x.pt"], r"checkpoint /nowhere/x\.pt: there is no such file"),
    (["--resume"], r"checkpoint .*last\.pt: there is no such file"),
    (["--lr-schedule", "cosine"], "unrecognized arguments"),
])
def test_bad_arguments(args, message, tmp_path, capsys):
    refuses(capsys, message, "--out", tmp_path / "run", *args)
    assert not (tmp_path / "run").exists()


def spoil_empty_class(root): (root / "train" / "gray").mkdir()
def spoil_empty_file(root): (root / "val" / "red" / "0.png").write_bytes(b"")
def spoil_text(root): (root / "train" / "red" / "5.jpg").write_text("this is no picture")
def spoil_one_class(root): os.rename(root / "train" / "blue", root / "blue")
def spoil_class_names(root): os.rename(root / "val" / "blue", root / "val" / "azure")
def spoil_no_val(root): os.rename(root / "val", root / "held_out")


def spoil_truncate(root):
    path = root / "train" / "red" / "3.png"
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(("spoil", "message"), [
    (spoil_empty_class, r"train/gray: the class folder has no image in it"),
    (spoil_empty_file, r"val/red/0\.png: the image file is empty"),
    (spoil_text, r"train/red/5\.jpg: is not a readable image"),
    (spoil_truncate, r"train/red/3\.png: is not a readable image"),
    (spoil_one_class, r"train: must hold one folder a class, two at least, got 1"),
    (spoil_class_names, r"class 'azure' is in only one of train and val"),
    (spoil_no_val, r"beside train there must be a folder val, validation or test"),
], ids=lambda v: getattr(v, "__name__", ""))
def test_bad_folders(spoil, message, tmp_path, capsys):
    root = tmp_path / "data"
    make_folder(root / "train", {"blue": 6, "red": 6})
    make_folder(root / "val", {"blue": 2, "red": 2})
    spoil(root)
    refuses(capsys, message, *options("--data", root, "--out", tmp_path / "run", "--batch-size", 4))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_found_while_training_is_named_too(workers, tmp_path, capsys):
    root = tmp_path / "data"
    make_folder(root, {"blue": 8, "red": 8})
    spoil = root / "red" / "3.png"
    spoil.write_bytes(spoil.read_bytes()[:300])
    refuses(capsys, r"^(?s:.*)mnops train: \S*red/3\.png: is not a readable image \([^\n]*\)\n$",
            *options("--data", root, "--out", tmp_path / "run", "--batch-size", 4, "--no-verify",
                     "--workers", workers))


def test_splits_a_folder_without_val(tmp_path, capsys):
    root = tmp_path / "data"
    make_folder(root, {"blue": 10, "red": 5})
    (root / ".cache").mkdir()
    assert main(options("--data", root, "--out", tmp_path / "run", "--batch-size", 4, "--epochs", 1,
                        "--workers", 0, "--val-fraction", 0.2)) == 0
    assert "12 training and 3 test images of 2 classes" in capsys.readouterr().out
    make_folder(root, {"gray": 1})
    refuses(capsys, "class 'gray': needs two images at least to hold one out, got 1",
            *options("--data", root, "--out", tmp_path / "run2", "--batch-size", 4))


def test_results_that_cannot_be_written(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    refuses(capsys, "mnops train: --out .*/file: cannot be made a folder",
            *options("--data", folder, "--out", tmp_path / "file", "--batch-size", 12, "--workers", 0))


def test_checkpoints_of_another_kind(trained, folder, tmp_path, capsys):
    last, weights = trained / "last.pt", tmp_path / "weights.pt"
    torch.save(mnops.MobileNet(num_classes=3, width_mult=0.5).state_dict(), weights)
    make_folder(tmp_path / "two", {"blue": 3, "red": 3})
    make_folder(tmp_path / "three", {"bleu": 3, "green": 3, "red": 3})
    before = {name: (trained / name).read_bytes() for name in os.listdir(trained)}
    for message, *args in [
            (r"last\.pt: was made with width = 0\.25, got width = 0\.5", "--evaluate", last, "--width", 0.5),
            (r"last\.pt: was made for 3 classes, the data has 2", "--evaluate", last, "--data",
             tmp_path / "two"),
            (r"was made for a class 'blue' where the data has 'bleu'", "--evaluate", last, "--data",
             tmp_path / "three"),
            (r"conv_stem\.weight must be \(8, 3, 3, 3\) .* got \(16, 3, 3, 3\)", "--evaluate", weights,
             "--data", folder, "--width", 0.25),
            (r"holds a run already; --resume goes on with it, --overwrite replaces it", "--out", trained,
             "--data", folder, "--batch-size", 12),
            (r"was made with lr = 0\.03, got lr = 0\.1", "--resume", "--out", trained, "--lr", 0.1),
            (r"was made with optimizer = rmsprop, got optimizer = sgd", "--resume", "--out", trained,
             "--optimizer", "sgd"),
            (r"was made with stock = False, got stock = True", "--resume", "--out", trained, "--stock"),
    ]:
        refuses(capsys, message, *args)
    assert {name: (trained / name).read_bytes() for name in os.listdir(trained)} == before


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path, capsys):
    refuses(capsys, r"the loss is (nan|inf) at step \d+ .*: try a smaller --lr",
            *options("--data", folder, "--out", tmp_path / "run", "--batch-size", 12, "--workers", 0,
                     "--epochs", 3, "--optimizer", "sgd", "--lr", 1e30))


@pytest.mark.parametrize(("module", "args", "message"), [
    ("torch.utils.tensorboard", ["--tensorboard"], "--tensorboard needs the package tensorboard"),
    ("sklearn.datasets", [], r"needs the package sklearn.*: pip install 'mnops\[train\]'"),
])
def test_a_missing_package_is_one_sentence(module, args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    refuses(capsys, message, "--out", tmp_path / "run", *args)
    assert not (tmp_path / "run").exists()


def test_help_names_every_setting(capsys):
    from mnops.train.cli import DEFAULTS

    with pytest.raises(SystemExit) as e:
        main(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in DEFAULTS if f"--{name.replace('_', '-')}" not in text] == []
