"""What the examples share: options, errors, training, distillation, predictions."""

import argparse
import csv
import importlib.util
import io
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from mnops.train import TrainError, checkpoint
from mnops.train.cli import DEFAULTS, MODEL, build_model, ema_weights, number
from mnops.train.data import Images, StepSampler, Transform, batches, collate, test_keys
from mnops.train.distill import Distillation
from mnops.train.distributed import world
from mnops.train.log import Csv
from mnops.train.loop import autocast, step_seed, to_input
from mnops.train.optim import build_optimizer
from mnops.train.schedule import lr_factor

# ---- options ----

RUN = {"data", "out", "overwrite", "evaluate", "weights", "workers", "verify", "device"}  # of a run, not of its model


class Command:
    """One example: its options and how it is run.

    Args:
        name: of the module in mnops.examples.
        doc: its docstring, whose first line is for --help.
        needs: packages, by the names they are imported by; told before the long part where one is missing.
        defaults: settings that differ from those of `python -m mnops train`.
    """

    def __init__(self, name: str, doc: str, needs: Sequence[str] = (), **defaults: Any) -> None:
        self.needs = needs
        self.name, self.defaults = name, DEFAULTS | {"out": f"runs/{name}", "weights": None} | defaults
        self.parser = argparse.ArgumentParser(
            prog=f"python -m mnops.examples.{name}", description=doc.partition("\n")[0], allow_abbrev=False
        )
        positive = number(float, 0, above=True)
        add = self.option
        add("--data", "folder of the data set", required=True, metavar="DIR")
        add("--out", "folder of the results", metavar="DIR")
        add("--overwrite", "replace the results that --out holds", action="store_true")
        add("--evaluate", "only test this model.pt, with the settings of its run", metavar="CHECKPOINT")
        add("--weights", "start from a checkpoint of `python -m mnops train`", metavar="CHECKPOINT")
        add("--width", "width multiplier", type=positive)
        add("--size", "input height and width", type=number(int, 1))
        add("--epochs", "times over the training data", type=number(int, 1))
        add("--batch-size", "images a step", type=number(int, 1))
        add("--optimizer", "", choices=["rmsprop", "sgd", "adamw"])
        add("--lr", "learning rate at the start; it falls to 0 along a cosine", type=positive)
        add("--weight-decay", "not on depthwise filters, norms and biases", type=number(float, 0))
        add("--amp", "mixed precision", choices=["off", "bf16"])
        add("--bn-momentum", "share of a new batch in the running statistics", type=number(float, 0, 1))
        add("--workers", "processes that decode; 0: none [one a core, at most 8]", type=number(int, 0))
        add("--verify", "decode every file once before training [if there are at most 10000]",
            action=argparse.BooleanOptionalAction)  # fmt: skip
        add("--device", "cpu, cuda, cuda:1, ... [cuda where there is one]")
        add("--seed", "of weights, order and crops", type=number(int, 0))

    def option(self, name: str, text: str, **more: Any) -> None:
        """Adds one; its default is the setting of its name."""
        default = self.defaults.setdefault(name[2:].replace("-", "_"))
        shown = "" if default is None or isinstance(default, bool) else f" [{default}]"
        self.parser.add_argument(name, help=f"{text}{shown}".strip(), default=default, **more)

    def teacher_options(self) -> None:
        """What `distilled` reads."""
        self.option("--teacher", "teacher.pt of an earlier run", metavar="CHECKPOINT")
        width = number(float, 0, above=True)
        self.option("--teacher-width", "width multiplier of a new teacher", type=width)
        self.option("--teacher-epochs", "times over the images for a new teacher", type=number(int, 1))

    def __call__(self, run: Callable[[Namespace, torch.device], None]) -> Callable[[list[str] | None], int]:
        """Decorates run(settings, device) to a main(argv): 0; 2 for a mistake of the user's; 130 for ^C."""

        def main(argv: list[str] | None = None) -> int:
            s = self.parser.parse_args(argv)
            try:
                if s.evaluate:  # argparse gives a default only to what has no value
                    recorded = checkpoint.load(Path(s.evaluate)).get("settings", {})
                    own = {name: value for name, value in recorded.items() if name in vars(s).keys() - RUN}
                    s = self.parser.parse_args(argv, Namespace(**own))
                s = Namespace(**{**self.defaults, **vars(s)})
                if s.weights:  # the width is checked with the shapes
                    recorded = checkpoint.load(Path(s.weights)).get("settings", {})
                    vars(s).update({k: v for k, v in recorded.items() if k in MODEL - {"width"}})
                s.workers = min(8, os.cpu_count() or 1) if s.workers is None else s.workers
                for package in self.needs:
                    if importlib.util.find_spec(package) is None:
                        raise ModuleNotFoundError(name=package)
                if not Path(s.data).is_dir():
                    raise TrainError(f"--data {s.data}: there is no such directory")
                if not s.overwrite and (Path(s.out) / "model.pt").exists():
                    raise TrainError(f"--out {s.out}: holds a model already; --overwrite replaces it")
                with world(s.device) as here:
                    if here.size > 1:
                        raise TrainError(f"an example runs in one process, got {here.size}")
                    torch.manual_seed(s.seed)
                    run(s, here.device)
            except TrainError as e:
                print(f"{self.name}: {e}", file=sys.stderr)
                return 2
            except ModuleNotFoundError as e:
                package = (e.name or "").partition(".")[0]
                if package == "mnops":
                    raise
                told = f"needs the package {package}: pip install 'mnops[examples]'"
                print(f"{self.name}: {told}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print(f"{self.name}: interrupted", file=sys.stderr)
                return 130
            return 0

        return main


def changed(s: Namespace, **settings: Any) -> Namespace:
    """Other settings in places."""
    return Namespace(**{**vars(s), **settings})


# ---- data ----


def transforms(s: Namespace) -> tuple[Transform, Transform]:
    """Random crops for training, the central square for tests."""
    train = Transform(s.size, tuple(s.crop_scale), tuple(s.crop_ratio), flip=s.flip, pad=s.pad)
    return train, Transform(s.size, crop=s.crop)


def text_lines(path: Path) -> list[str]:
    """The lines of a text file, without their ends; TrainError if there is no such file or it is not text."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as e:
        raise TrainError(f"{path}: there is no such file") from e
    except UnicodeDecodeError as e:
        got = f"byte {e.object[e.start]:#x} at {e.start}"
        raise TrainError(f"{path}: must be a text file in UTF-8, got {got}") from e


def existing(path: Path, told_by: str) -> Path:
    """path, if it is a file; TrainError naming the place that told of it."""
    if not path.is_file():
        raise TrainError(f"{told_by}: there is no image {path}")
    return path


# ---- training ----


def network(s: Namespace, outputs: int, device: torch.device) -> nn.Module:
    """A MobileNet by the settings, from --weights where given; its classifier is new."""
    model = build_model(s, outputs, device)
    if s.weights:
        path, own = Path(s.weights), model.state_dict()
        found = ema_weights(checkpoint.load(path))
        body = {name: value for name, value in found.items() if not name.startswith("classifier.")}
        new = {name: value for name, value in own.items() if name.startswith("classifier.")}
        checkpoint.load_weights(model, body | new, path)
    return model


def saved(s: Namespace, path: str, build: Callable[[Namespace], nn.Module], **wanted: Any) -> nn.Module:
    """The model of an earlier run, of the width it was made with. wanted: entries that it must have."""
    state = checkpoint.load(Path(path))
    if missing := wanted.keys() - state.keys():
        raise TrainError(f"checkpoint {path}: must be of a run of this example, has no {min(missing)!r}")
    checkpoint.check_settings(state, wanted, Path(path))
    made_with = {k: v for k, v in state.get("settings", {}).items() if k in MODEL}
    model = build(changed(s, **made_with, weights=None))
    checkpoint.load_weights(model, state["model"], Path(path))
    return model


def fit(
    model: nn.Module,
    loss: Callable[..., Tensor],
    data: Dataset,
    s: Namespace,
    device: torch.device,
    name: str = "model",
    *,
    keys: Iterable[list[tuple[int, int]]] | None = None,
    frozen: Sequence[nn.Module] = (),
    collate: Callable[[list], Any] = collate,
    **extra: Any,
) -> None:
    """Trains the model in place; writes OUT/NAME.csv, a row a step, and OUT/NAME.pt, with `extra` in it.

    Args:
        loss: of a batch, (images as `as_input` makes them, labels).
        keys: the (epoch, index) of each batch; None: every image once an epoch in random order.
        frozen: modules that stay in eval mode: their running statistics stand still.
    """
    if keys is None:
        if len(data) < s.batch_size:
            most = f"at most the number of training images = {len(data)}"
            raise TrainError(f"--batch-size: must be {most}, got {s.batch_size}")
        keys = StepSampler(len(data), s.batch_size, s.seed, 0, s.epochs * (len(data) // s.batch_size), 0, 1)
    total, out = len(keys), Path(s.out)
    checkpoint.make_folder(out)
    optimizer = build_optimizer(s, model)
    model.train()
    for module in frozen:
        module.eval()
    log = Csv(out / f"{name}.csv", ["step", "lr", "loss"], 0)
    bar = tqdm(total=total, desc=name, unit="step", dynamic_ncols=True)
    warmup = round(s.warmup_epochs * total / s.epochs)
    try:
        for step, batch in enumerate(batches(data, keys, s.workers, device, collate)):
            lr = s.lr * lr_factor(step, schedule="cosine", total=total, warmup=warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(step_seed(s.seed, step, 0))
            images, labels = batch
            with autocast(device, s.amp):
                value = loss(as_input(images, s), labels)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            row = {"step": step + 1, "lr": lr, "loss": value.item()}
            if not math.isfinite(row["loss"]):
                raise TrainError(f"the loss is {row['loss']} at step {step + 1}: try a smaller --lr")
            log.write(row)
            bar.update()
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
    finally:
        bar.close()
        log.close()
    checkpoint.save(out / f"{name}.pt", {"model": model.state_dict(), "settings": vars(s), **extra})


def with_labels(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The loss, for `fit`, of what the model says of images and their labels."""
    return lambda images, labels: loss(model(images), labels)


def distilled(
    s: Namespace,
    build: Callable[[Namespace], nn.Module],
    learn: Callable[[nn.Module, Namespace], None],
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Images,
    device: torch.device,
    **extra: Any,
) -> dict[str, nn.Module]:
    """A teacher, of an earlier run or made to `learn`, and the student that it teaches without labels.

    --weights are for the network that is made first, and for the student where it is as wide.
    """
    if s.teacher:
        teacher = saved(s, s.teacher, build, **extra)
    else:
        own = changed(s, width=s.teacher_width, epochs=s.teacher_epochs)
        learn(teacher := build(own), own)
    student = build(s if s.teacher or s.width == s.teacher_width else changed(s, weights=None))
    teach = Distillation(teacher, loss)
    fit(student, lambda images, _: teach(student, images), data, s, device, **extra)
    return {"teacher": teacher, "student": student}


def as_input(images: Tensor | list[Tensor], s: Namespace) -> Tensor | list[Tensor]:
    """uint8 images as networks take them: a batch in [-1, 1], a detector's list in [0, 1]."""
    if isinstance(images, Tensor):
        return to_input(images, s.channels_last)
    return [image.float() / 255 for image in images]


@torch.no_grad()
def outputs(
    model: nn.Module,
    data: Dataset,
    s: Namespace,
    device: torch.device,
    name: str = "test",
    collate: Callable[[list], Any] = collate,
) -> Iterator[Any]:
    """What the model says of each batch of the images, in their order."""
    model.eval()
    keys = test_keys(len(data), s.batch_size, 0, 1)
    for images, _ in tqdm(batches(data, keys, s.workers, device, collate), name, len(keys), unit="batch"):
        with autocast(device, s.amp):
            found = model(as_input(images, s))
        yield found


def predict(model: nn.Module, data: Images, s: Namespace, device: torch.device, name: str = "test") -> Tensor:
    """The model's outputs for all images, in their order, on the CPU."""
    return torch.cat([found.float().cpu() for found in outputs(model, data, s, device, name)])


# ---- results ----


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    checkpoint.make_folder(path.parent)
    checkpoint.write_atomically(path, lambda file: file.write(text.getvalue().encode()))
