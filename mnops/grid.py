"""python -m mnops grid: figures 4 and 5 and tables 4 and 5 of arXiv:1704.04861, trained on any images.

The 16 MobileNets width x resolution, and at the greatest of both Conv MobileNet (every separable layer a full
convolution) and Shallow MobileNet (five layers less), all with the same settings, each from several seeds. A
row a model and seed is written when it ends; a grid that was killed goes on where it stopped.
"""

import argparse
import csv
import io
import itertools
import os
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mnops.train import TrainError
from mnops.train import cli as training

# ---- what is trained ----


class Model(NamedTuple):
    variant: str
    width: float
    size: int

    @property
    def name(self) -> str:
        return f"{'' if self.variant == 'separable' else f'{self.variant}-'}{self.width:g}-{self.size}"


# The paper's grid; for the digits one of the same proportions, which two cores finish in half an hour.
IMAGES = dict(widths=(1.0, 0.75, 0.5, 0.25), sizes=(224, 192, 160, 128), seeds=1, options=())
DIGITS = dict(
    widths=(0.5, 0.375, 0.25, 0.125), sizes=(56, 48, 40, 32), seeds=3, options=("--epochs", "15")
)
OWN = {"--width", "--size", "--variant", "--seed", "--resume", "--overwrite", "--evaluate", "--compare"}


def models(widths: Sequence[float], sizes: Sequence[int]) -> list[Model]:
    """The grid from its largest model on, then the two that tables 4 and 5 compare it with."""
    grid = [Model("separable", width, size) for width in widths for size in sizes]
    return grid + [Model(variant, widths[0], sizes[0]) for variant in ("conv", "shallow")]


# ---- rows ----

FIELDS = [
    "model", "variant", "width", "size", "seed", "mult_adds", "parameters", "classes", "images", "epochs",
    "test_accuracy", "test_top5", "test_loss", "seconds", "options",
]  # fmt: skip
NUMBERS = dict.fromkeys(FIELDS[4:10], int) | dict.fromkeys(FIELDS[10:14], float) | dict(width=float, size=int)
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a grid.csv; TrainError where it is not one."""
    if not path.is_file():
        raise TrainError(f"{path}: there is no such file; a grid writes it")
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != FIELDS:
            raise TrainError(f"{path}: must have the columns {', '.join(FIELDS)}, got {reader.fieldnames}")
        return [{k: NUMBERS.get(k, str)(v) for k, v in row.items()} for row in reader]


def write(path: Path, rows: Iterable[Row]) -> None:
    from mnops.train.checkpoint import write_atomically

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def run(chosen: Sequence[Model], seeds: int, options: Sequence[str], out: Path) -> list[Row]:
    """Trains what is not in out/grid.csv yet, one seed of every model after the other; returns all rows."""
    from mnops.train import checkpoint
    from mnops.train.distributed import world

    path = out / "grid.csv"
    rows = read(path) if path.exists() else []
    made_with = shlex.join(options)
    for row in rows:
        if row["options"] != made_with:
            raise TrainError(f"{path}: was made with {row['options']!r}, got {made_with!r}")
    done = {(row["model"], row["seed"]) for row in rows}
    todo = [(m, seed) for seed in range(seeds) for m in chosen if (m.name, seed) not in done]
    explicit = vars(training.parser().parse_args(list(options)))
    with world(explicit.get("device")) as w:
        for number, (model, seed) in enumerate(todo, 1):
            folder = out / f"{model.name}-seed{seed}"
            last = folder / "last.pt"
            if w.rank == 0:
                print(f"[{number}/{len(todo)}] MobileNet {model.name}, seed {seed}", flush=True)
            rest = {"seed": seed, "out": str(folder), "resume": last.exists(), "compare": 0.0}
            result = training.train({**explicit, **model._asdict(), **rest})
            if w.rank == 0:
                rows.append(_row(model, seed, result, checkpoint.load(last), made_with))
                write(path, rows)
                last.unlink()  # best.pt stays; the row says that the run is over
    return rows


def _row(model: Model, seed: int, result: dict[str, float], state: dict[str, Any], made_with: str) -> Row:
    from mnops import tables

    classes = len(state["classes"])
    counted = tables.mobilenet(model.width, model.size, model.variant, classes)
    return {
        "model": model.name, **model._asdict(), "seed": seed, "mult_adds": counted.mult_adds,
        "parameters": counted.parameters, "classes": classes, "images": state["images"],
        "epochs": state["settings"]["epochs"], "test_accuracy": result["accuracy"],
        "test_top5": result["top5"], "test_loss": result["loss"], "seconds": round(state["seconds"], 2),
        "options": made_with,
    }  # fmt: skip


# ---- what it shows ----

# ImageNet top-1. TF-slim's released weights by width and size; the paper's own numbers, by table.
SLIM = {
    1.0: (70.9, 70.0, 68.0, 65.2), 0.75: (68.4, 67.2, 65.3, 62.1), 0.5: (63.3, 61.7, 59.1, 56.3),
    0.25: (49.8, 47.7, 45.5, 41.5),
}  # fmt: skip
PRINTED = {
    ("separable", 1.0, 224): 70.6, ("separable", 0.75, 224): 68.4, ("separable", 0.5, 224): 63.7,
    ("separable", 0.25, 224): 50.6, ("separable", 1.0, 192): 69.1, ("separable", 1.0, 160): 67.2,
    ("separable", 1.0, 128): 64.4, ("separable", 0.5, 160): 60.2, ("conv", 1.0, 224): 71.7,
    ("shallow", 1.0, 224): 65.3,
}  # fmt: skip


# 97.5 % quantiles of Student's t for 2, 3, ... 10 seeds: three runs tell less than their spread seems to say.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


class Effect(NamedTuple):
    """A difference of test accuracy in percentage points, one value a seed, and the paper's on ImageNet,
    which is above zero; None where these are other steps than the paper's."""

    name: str
    differences: tuple[float, ...]
    paper: float | None

    @property
    def error(self) -> float:
        """Half the 95 % interval of the mean: its standard error over the seeds times Student's t."""
        n = len(self.differences)
        return STUDENT[min(n, len(STUDENT) + 1) - 2] * statistics.stdev(self.differences) / n**0.5

    @property
    def verdict(self) -> str:
        if len(self.differences) < 2:
            return "one seed: no verdict"
        mean = statistics.mean(self.differences)
        if abs(mean) <= self.error:
            return "not shown: the interval holds 0"
        return "shown, as in the paper" if mean > 0 else "the other way round"


def effects(rows: Sequence[Row]) -> list[Effect]:
    """Every effect of tables 4 to 7 that the rows can tell: a seed counts where it has both sides.

    Steps of width are averaged over the sizes, steps of size over the widths, both as far as trained.
    """
    accuracy = {(r["variant"], r["width"], r["size"], r["seed"]): 100 * r["test_accuracy"] for r in rows}
    grid = {key[1:3] for key in accuracy if key[0] == "separable"}
    widths, sizes = (sorted({g[i] for g in grid}, reverse=True) for i in range(2))
    seeds = sorted({key[3] for key in accuracy})

    def effect(name: str, pairs: list[tuple[tuple, tuple]], paper: float | None) -> Effect:
        differences = []
        for seed in seeds:
            both = [(accuracy.get((*a, seed)), accuracy.get((*b, seed))) for a, b in pairs]
            if both and all(None not in pair for pair in both):
                differences.append(statistics.mean(a - b for a, b in both))
        return Effect(name, tuple(differences), paper)

    def steps(values: list, paper: tuple[float, ...], what: str, pairs) -> Iterable[Effect]:
        """From each value to the next smaller one, and over all of them."""
        whole = [(0, len(values) - 1)] if len(values) > 2 else []
        for a, b in [*itertools.pairwise(range(len(values))), *whole]:
            own = paper[a] - paper[b] if len(values) == len(paper) else None
            a, b = values[a], values[b]
            yield effect(f"{what} {a:g} over {b:g}", pairs(a, b), own)

    kind = "separable"
    found = [
        *steps(widths, (70.6, 68.4, 63.7, 50.6), "width",
               lambda a, b: [((kind, a, size), (kind, b, size)) for size in sizes]),
        *steps(sizes, (70.6, 69.1, 67.2, 64.4), "size",
               lambda a, b: [((kind, width, a), (kind, width, b)) for width in widths]),
    ]  # fmt: skip
    if widths:
        base = widths[0], sizes[0]
        found.append(effect("full convolution over separable", [(("conv", *base), (kind, *base))], 1.1))
    if len(widths) > 1:
        thin = kind, widths[1], sizes[0]
        found.append(effect("thin over shallow", [(thin, ("shallow", *base))], 3.1))
    return [e for e in found if e.differences]


def summaries(rows: Sequence[Row]) -> list[tuple[Row, list[float]]]:
    """Each model's first row and its accuracies in percent, from most mult-adds on."""
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    groups = sorted(by_model.values(), key=lambda own: -own[0]["mult_adds"])
    return [(own[0], [100 * r["test_accuracy"] for r in own]) for own in groups]


def report(rows: Sequence[Row]) -> str:
    """Accuracies with their spread over the seeds, and which of the paper's effects they show."""
    names = "mult-adds", "parameters", "accuracy, %", "deviation", "seeds"
    lines = [f"{'model':18}{names[0]:>14}{names[1]:>12}{names[2]:>13}{names[3]:>11}{names[4]:>7}"]
    for row, accuracies in summaries(rows):
        spread = f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        lines.append(f"{row['model']:18}{row['mult_adds']:>14,}{row['parameters']:>12,}"
                     f"{statistics.mean(accuracies):>13.2f}{spread:>11}{len(accuracies):>7}")  # fmt: skip
    lines += ["", f"{'difference, points':34}{'mean':>8}{'95 % +-':>9}{'seeds':>7}{'paper':>8}"]
    for e in effects(rows):
        error = f"{e.error:.2f}" if len(e.differences) > 1 else ""
        lines.append(f"{e.name:34}{statistics.mean(e.differences):>+8.2f}{error:>9}{len(e.differences):>7}"
                     f"{'+' if e.paper is None else f'{e.paper:+.1f}':>8}  {e.verdict}")  # fmt: skip
    images, classes = rows[0]["images"], rows[0]["classes"]
    lines.append(f"Trained on {images} images of {classes} classes; the paper's column is ImageNet's.")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Figures 4 and 5: accuracy against mult-adds and against parameters; left these rows, right ImageNet."""
    import matplotlib

    from mnops import tables

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mnops"  # the same rows, the same file
    from matplotlib import pyplot, ticker

    own = [(r["variant"], r["size"], r["mult_adds"], r["parameters"], a) for r, a in summaries(rows)]
    own.sort(key=lambda point: point[0] != "separable")  # the grid first in the legend
    known = [("separable", w, n, a) for w, line in SLIM.items() for n, a in zip(IMAGES["sizes"], line)]
    theirs = []
    for variant, width, size, accuracy in [*known, *((*key, a) for key, a in PRINTED.items())]:
        counted = tables.mobilenet(width, size, variant)
        theirs.append((variant, size, counted.mult_adds, counted.parameters, [accuracy]))
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    seeds = max(len(accuracies) for *_, accuracies in own)
    spread = f", {seeds} seeds" if seeds > 1 else ""
    trained = f"trained here: {rows[0]['images']:,} images, {rows[0]['classes']} classes{spread}"
    published = "ImageNet: TF-slim's weights (dots), the paper (rings)"
    for column, (title, points) in enumerate([(trained, own), (published, theirs)]):
        colors = {size: f"C{i}" for i, size in enumerate(sorted({p[1] for p in points}, reverse=True))}
        for row, (unit, what) in enumerate([("million mult-adds", 2), ("million parameters", 3)]):
            ax, named = axes[row][column], set()
            for i, point in enumerate(points):
                variant, size, accuracies = point[0], point[1], point[4]
                label = f"{size} pixels" if variant == "separable" else f"{variant.title()} MobileNet-{size}"
                ring = column == 1 and i >= len(known)
                ax.errorbar(
                    point[what] / 1e6, statistics.mean(accuracies),
                    statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                    fmt={"separable": "o", "conv": "^", "shallow": "s"}[variant], capsize=2, elinewidth=1,
                    color=colors[size], mfc="none" if ring else None, ms=9 if ring else 6,
                    label=None if label in named else label,
                )  # fmt: skip
                named.add(label)
            ax.set(xscale="log", xlabel=unit, ylabel="top-1 accuracy, %")
            ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("")
            ax.grid(alpha=0.3)
            if row == 0:
                ax.set_title(title)
            else:
                ax.legend(fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    number = training.number
    p = argparse.ArgumentParser(
        prog="python -m mnops grid", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Trains the paper's 16 models, width x resolution, and Conv and Shallow MobileNet; on "
                    "the digits without --data. Further options are those of `python -m mnops train`, the "
                    "same for every model. What was killed goes on by the same command.",
    )  # fmt: skip
    p.add_argument("--data", metavar="DIR", help="as of train [the digits]")
    p.add_argument("--widths", type=number(float, 0, above=True), nargs="+",
                   help="[1 0.75 0.5 0.25; digits: 0.5 0.375 0.25 0.125]")  # fmt: skip
    p.add_argument("--sizes", type=number(int, 1), nargs="+", help="[224 192 160 128; digits: 56 48 40 32]")
    p.add_argument("--seeds", type=number(int, 1), help="runs of each model [1; digits: 3]")
    p.add_argument("--out", help="folder of rows, report, plot and weights [runs/grid]", metavar="DIR")
    p.add_argument("--report", action="store_true", help="no training: report and plot of the rows in OUT")
    return p


def main(argv: list[str] | None = None) -> int:
    """The command: 0; 2 for a mistake of the user's, told on stderr; 130 for ^C."""
    known, options = parser().parse_known_args(argv)
    given = vars(known)
    scale = {**(IMAGES if "data" in given else DIGITS), **given}
    out = Path(scale.get("out", "runs/grid"))
    try:
        if own := OWN.intersection(option.partition("=")[0] for option in options):
            raise TrainError(f"{sorted(own)[0]}: is set by the grid: --widths, --sizes, --seeds, --out")
        data = ("--data", given["data"]) if "data" in given else ()
        widths, sizes = (sorted(set(scale[name]), reverse=True) for name in ("widths", "sizes"))
        if "report" in given:
            rows = read(out / "grid.csv")
        else:
            rows = run(models(widths, sizes), scale["seeds"], (*data, *scale["options"], *options), out)
        if os.environ.get("RANK", "0") != "0":  # of torchrun: one of them speaks
            return 0
        if not rows:
            raise TrainError(f"{out / 'grid.csv'}: has no row yet")
        text = report(rows)
        (out / "report.txt").write_text(text)
        print(text, end="")
        try:
            plot(rows, out / "grid.svg")
        except ModuleNotFoundError as e:
            missing = f"no plot, which needs the package {e.name}: pip install matplotlib, then --report"
            print(f"mnops grid: {missing}", file=sys.stderr)
        print(f"rows and report in {out}")
    except TrainError as e:
        print(f"mnops grid: {e}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as e:
        if e.name not in ("PIL", "sklearn", "tqdm"):
            raise
        print(f"mnops grid: needs the package {e.name}: pip install 'mnops[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mnops grid: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0
