"""`python -m mnops train`: trains, resumes or evaluates a MobileNet. `--help` lists the options."""

import argparse
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import TrainError

# One place for every setting: the paper's recipe, what TF-slim adds to it, and one for the built-in images.
DEFAULTS: dict[str, Any] = dict(
    data=None, val_fraction=0.1, size=224, crop_scale=[0.35, 1.0], crop_ratio=[0.75, 1.3333], flip=0.5,
    pad=0.0, crop=0.875, workers=None, verify=None,
    width=1.0, variant="separable", act="relu", padding="symmetric", bn_eps=1e-5, bn_momentum=0.1,
    dropout=0.0, init="he", stock=False,
    optimizer="rmsprop", lr=0.045, momentum=0.9, decay=0.9, eps=1.0, weight_decay=4e-5, epochs=100,
    batch_size=128, accumulate=1, schedule="cosine", warmup_epochs=0.0, decay_rate=0.94, decay_epochs=2.5,
    smoothing=0.0, mixup=0.0, ema=0.0, sync_bn=False, seed=0,
    amp="off", channels_last=True, device=None, out=None, resume=False, overwrite=False, evaluate=None,
    checkpoint_steps=0, log_steps=10, tensorboard=False, compare=0.0)
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tf-slim": dict(act="relu6", padding="same", bn_eps=1e-3, bn_momentum=0.0003, dropout=0.001,
                    init="tf-slim", batch_size=64, schedule="exponential"),
    "digits": dict(size=64, crop_scale=[0.85, 1.1], crop_ratio=[0.9, 1.1], flip=0.0, pad=0.125, crop=1.0,
                   width=0.5, epochs=40, batch_size=32, warmup_epochs=1.0, weight_decay=5e-4, ema=0.99,
                   compare=12.0),
}
MODEL = {"width", "variant", "act", "padding", "bn_eps"}  # what weights are made for
RUN = {"data", "workers", "verify", "device", "out", "resume", "overwrite", "evaluate",
       "checkpoint_steps", "log_steps", "tensorboard", "compare"}  # what a resumed run may change


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a `kind` of at least `low` (`above`: more than `low`) and at most `high`, finite."""
    rule = f"{'an integer' if kind is int else 'a number'} {'above' if above else 'of at least'} {low}"
    rule += f" and at most {high}" if high < math.inf else ""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf or (above and value == low):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value
    return parse


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m mnops train", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        description="Trains MobileNet on a folder of images, or on scikit-learn's handwritten digits. In "
                    "several processes: torchrun --nproc-per-node N -m mnops train ...")
    p.add_argument("--preset", choices=PRESETS, help="settings, which the other options then change [digits "
                   "without --data, paper with it; the values in brackets below are paper's]")

    def group(title: str) -> Callable[..., None]:
        section = p.add_argument_group(title)

        def add(name: str, text: str, kind: Callable | None = None, **more) -> None:
            value = DEFAULTS[name[2:].replace("-", "_")]
            if value is not None and not isinstance(value, bool):
                text += f" [{' '.join(map(str, value)) if isinstance(value, list) else value}]"
            section.add_argument(name, help=text, **({"type": kind} if kind else {}), **more)
        return add

    share, positive = number(float, 0, 1), number(float, 0, above=True)
    add = group("data")
    add("--data", "a folder of train/CLASS/* and val/CLASS/*, or of CLASS/* [the digits]", metavar="DIR")
    add("--val-fraction", "share of each class held out where there is no val", number(float, 0, 0.9))
    add("--size", "input height and width", number(int, 1))
    add("--crop-scale", "area of the random crops, as shares of the image", positive, nargs=2,
        metavar=("LOW", "HIGH"))
    add("--crop-ratio", "width over height of the random crops", positive, nargs=2, metavar=("LOW", "HIGH"))
    add("--flip", "share of mirrored images", share)
    add("--pad", "black border before the random crop, as a share of each side", share)
    add("--crop", "side of the central crop in tests, as a share of the shorter side",
        number(float, 0, 1, above=True))
    add("--workers", "processes that decode; 0: none [one a core, at most 8]", number(int, 0))
    add("--verify", "decode every file once before training [if there are at most 10000]",
        action=argparse.BooleanOptionalAction)

    add = group("model")
    add("--width", "width multiplier", positive)
    add("--variant", "conv: full convolutions; shallow: five layers less",
        choices=["separable", "conv", "shallow"])
    add("--act", "activation", choices=["relu", "relu6", "hardswish", "silu"])
    add("--padding", "same: TensorFlow's, one-sided at stride 2", choices=["symmetric", "same"])
    add("--bn-eps", "epsilon of BatchNorm", positive)
    add("--bn-momentum", "share of a new batch in the running statistics", share)
    add("--dropout", "share of dropped features before the classifier", number(float, 0, 0.999))
    add("--init", "start of the weights: He's normal, or TF-slim's truncated one of deviation 0.09",
        choices=["he", "tf-slim"])
    add("--stock", "the same network through PyTorch's own ops", action="store_true")

    add = group("optimisation")
    add("--optimizer", "rmsprop: TensorFlow's; sgd: with Nesterov's momentum",
        choices=["rmsprop", "sgd", "adamw"])
    add("--lr", "learning rate", positive)
    add("--momentum", "of rmsprop and sgd", number(float, 0, 0.9999))
    add("--decay", "of rmsprop's mean square", number(float, 0, 0.9999))
    add("--eps", "inside rmsprop's root", positive)
    add("--weight-decay", "not on depthwise filters, norms and biases", number(float, 0))
    add("--epochs", "times over the training images", number(int, 1))
    add("--batch-size", "images a step, over all processes", number(int, 1))
    add("--accumulate", "pieces that a step is computed in, to save memory", number(int, 1))
    add("--schedule", "of the learning rate", choices=["cosine", "exponential", "constant"])
    add("--warmup-epochs", "linear rise of the learning rate", number(float, 0))
    add("--decay-rate", "of the exponential schedule", number(float, 0, 1, above=True))
    add("--decay-epochs", "between two falls of the exponential schedule", positive)
    add("--smoothing", "label smoothing", number(float, 0, 0.999))
    add("--mixup", "alpha of mixup; 0: none", number(float, 0))
    add("--ema", "decay of an average of the weights, which is then what is tested; 0: none",
        number(float, 0, 0.99999))
    add("--sync-bn", "BatchNorm over the images of all processes", action="store_true")
    add("--seed", "of weights, order, crops, dropout and mixup", number(int, 0))

    add = group("run")
    add("--amp", "mixed precision", choices=["off", "bf16", "fp16"])
    add("--channels-last", "memory layout of images and weights [on]", action=argparse.BooleanOptionalAction)
    add("--device", "cpu, cuda, cuda:1, ... [cuda where there is one]")
    add("--out", "folder of checkpoints and logs [runs/NAME-OF-DATA]", metavar="DIR")
    add("--resume", "go on from OUT/last.pt, with its settings", action="store_true")
    add("--overwrite", "start again in an OUT that holds a run", action="store_true")
    add("--evaluate", "only test this checkpoint, with its settings", metavar="CHECKPOINT")
    add("--checkpoint-steps", "checkpoints inside an epoch, every so many steps; 0: none", number(int, 0))
    add("--log-steps", "steps between two rows of steps.csv", number(int, 1))
    add("--tensorboard", "log in TensorBoard's format too", action="store_true")
    add("--compare", "seconds at the end to compare the fused step with the stock one", number(float, 0))
    return p


def resolve(explicit: dict[str, Any], state: dict[str, Any] | None, path: Path) -> Namespace:
    """Defaults, then the preset, then what the checkpoint records, then the command line, which must not
    contradict the checkpoint."""
    from .checkpoint import check_settings

    kept = DEFAULTS.keys() - RUN
    recorded = {k: v for k, v in (state or {}).get("settings", {}).items() if k in {*kept, "data"}}
    fixed = MODEL if explicit.get("evaluate") else kept
    check_settings(recorded, {k: v for k, v in explicit.items() if k in fixed}, path)
    own = {**recorded, **explicit}
    preset = PRESETS[explicit.get("preset", "digits" if own.get("data") is None else "paper")]
    s = Namespace(**{**DEFAULTS, **preset, **own})
    if s.workers is None:
        s.workers = min(8, os.cpu_count() or 1) if s.data else 0
    for name, (low, high), limit in [("--crop-scale", s.crop_scale, (1 + 2 * s.pad) ** 2),
                                     ("--crop-ratio", s.crop_ratio, math.inf)]:
        if not low <= high <= limit:
            area = f" <= {limit:g}, the area of the padded image" if limit < math.inf else ""
            raise TrainError(f"{name}: must be LOW HIGH with LOW <= HIGH{area}, got {low:g} {high:g}")
    if s.warmup_epochs > s.epochs:
        raise TrainError(f"--warmup-epochs: must be at most --epochs = {s.epochs}, got {s.warmup_epochs:g}")
    return s


def default_out(data: str | None) -> str:
    return str(Path("runs") / (Path(data).resolve().name if data else "digits"))


def load_data(s: Namespace):
    from .data import Transform, digits, image_folder

    train = Transform(s.size, tuple(s.crop_scale), tuple(s.crop_ratio), flip=s.flip, pad=s.pad)
    test = Transform(s.size, crop=s.crop)
    if s.data is None:
        return digits(train, test, s.seed)
    return image_folder(Path(s.data), train, test, s.seed, s.val_fraction, s.verify)


def build_model(s: Namespace, classes: int, device):
    import torch

    import mnops
    from mnops.models import VARIANTS

    torch.manual_seed(s.seed)
    try:
        model = mnops.MobileNet(num_classes=classes, width_mult=s.width, act=s.act, bn_eps=s.bn_eps,
                                bn_momentum=s.bn_momentum, dropout=s.dropout, padding=s.padding,
                                fused=not s.stock, stages=VARIANTS[s.variant])
    except ValueError as e:  # the network knows its own limits
        raise TrainError(str(e)) from e
    if s.init == "tf-slim":
        for module in model.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                torch.nn.init.trunc_normal_(module.weight, std=0.09, a=-0.18, b=0.18)
    # The fused ops take weights as they are and give contiguous gradients.
    layout = torch.channels_last if s.stock and s.channels_last else torch.contiguous_format
    return model.to(device=device, memory_format=layout)


def check_classes(state: dict[str, Any], classes: list[str], path: Path) -> None:
    own = state.get("classes", classes)
    if len(own) != len(classes):
        raise TrainError(f"checkpoint {path}: was made for {len(own)} classes, the data has {len(classes)}")
    for mine, theirs in zip(own, classes):
        if mine != theirs:
            raise TrainError(f"checkpoint {path}: was made for a class {mine!r} where the data has "
                             f"{theirs!r}")


def run_evaluation(explicit: dict[str, Any]) -> int:
    from . import checkpoint
    from .distributed import world
    from .loop import evaluate

    path = Path(explicit["evaluate"])
    state = checkpoint.load(path)
    s = resolve(explicit, state, path)
    data = load_data(s)
    check_classes(state, data.classes, path)
    with world(s.device) as w:
        model = build_model(s, len(data.classes), w.device)
        checkpoint.load_weights(model, ema_weights(state), path)
        report(evaluate(model, data.test, s, w), len(data.test), w.rank)
    return 0


def ema_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The weights a run is judged by: their average where it was kept, else the weights."""
    if not state.get("ema"):
        return state["model"]
    return {k.removeprefix("module."): v for k, v in state["ema"].items() if k.startswith("module.")}


def report(result: dict[str, float], images: int, rank: int) -> None:
    if rank == 0:
        print(f"test accuracy {100 * result['accuracy']:.2f} %  (top-5 {100 * result['top5']:.2f} %, "
              f"loss {result['loss']:.4f}, {images} images)", flush=True)


def train(explicit: dict[str, Any]) -> dict[str, float]:
    """One run with these options, the others at their presets; what the test after the last epoch found."""
    import torch

    from . import checkpoint
    from .distributed import world
    from .log import summary_writer
    from .loop import Trainer

    path = Path(explicit.get("out") or default_out(explicit.get("data"))) / "last.pt"
    resume = explicit.get("resume", False)
    state = checkpoint.load(path) if resume else None
    s = resolve(explicit, state, path)
    if not resume and not s.overwrite and path.exists():
        raise TrainError(f"--out {path.parent}: holds a run already; --resume goes on with it, --overwrite "
                         "replaces it")
    if s.tensorboard:
        summary_writer()
    data = load_data(s)
    if len(data.train) < s.batch_size:
        raise TrainError(f"--batch-size: must be at most the number of training images = {len(data.train)}, "
                         f"got {s.batch_size}")
    with world(s.device) as w:
        if s.batch_size % (w.size * s.accumulate):
            raise TrainError(f"--batch-size: must be a multiple of the processes times --accumulate = "
                             f"{w.size} x {s.accumulate}, got {s.batch_size}")
        if s.sync_bn and (s.stock or s.variant == "conv") and w.device.type == "cpu":
            raise TrainError("--sync-bn: with --stock or --variant conv needs a GPU: PyTorch's SyncBatchNorm "
                             "has no CPU form")
        model = build_model(s, len(data.classes), w.device)
        trainer = Trainer(model, data, s, w, path.parent)
        if state:
            check_classes(state, data.classes, path)
            trainer.load_state_dict(state, path)
        if w.rank == 0:  # from here on the disk changes
            checkpoint.make_folder(path.parent)
            if not resume:
                for name in ("last.pt", "best.pt"):
                    (path.parent / name).unlink(missing_ok=True)
            kind, weights = "stock" if s.stock else "fused", sum(p.numel() for p in model.parameters())
            print(f"{len(data.train)} training and {len(data.test)} test images of {len(data.classes)} "
                  f"classes; MobileNet {s.width:g}-{s.size} ({s.variant}, {kind}), {weights:,} weights, "
                  f"{w.device} x {w.size}, {torch.get_num_threads()} threads; logs and checkpoints in "
                  f"{path.parent}", flush=True)
        result = trainer.fit()
        report(result, len(data.test), w.rank)
        if s.compare and w.size == 1:
            from .compare import compare_steps
            print(compare_steps(trainer.model, *trainer.sample(), s, len(data.classes)), flush=True)
    return result


def run_training(explicit: dict[str, Any]) -> int:
    train(explicit)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0; 2 for a mistake of the user's, told on stderr; 130 for ^C."""
    explicit = vars(parser().parse_args(argv))
    try:
        return (run_evaluation if explicit.get("evaluate") else run_training)(explicit)
    except TrainError as e:
        print(f"mnops train: {e}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package not in ("PIL", "sklearn", "tqdm"):
            raise
        print(f"mnops train: needs the package {package}: pip install 'mnops[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mnops train: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
