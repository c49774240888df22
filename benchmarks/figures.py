"""The figures of the report, as SVG: what each shows, from which rows, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .rows import Row
from .selection import Group, groups, network_layers, stock, usual_threads

COLORS = {
    "mnops": "#d62728",
    "mnops-recompute": "#ff9896",
    "mnops-fused": "#f7b6d2",
    "torch-nchw": "#9ecae1",
    "torch-channels_last": "#4292c6",
    "torch-compile": "#08519c",
    "torch-compile-max": "#08306b",
    "torch-frozen": "#6a51a3",
    "timm": "#fdae6b",
    "onnxruntime": "#74c476",
    "openvino": "#238b45",
    "xnnpack": "#bdb76b",
}


class Figure(NamedTuple):
    shows: str
    collect: Callable[
        [list[Row]], Any
    ]  # what draw takes, from the rows of one machine; empty: nothing to draw
    draw: Callable[[Any, Any], None]  # (data, pyplot)


def networks(table: list[Row]) -> dict[str, list[Group]]:
    found = groups(
        table,
        suite="net",
        dtype="float32",
        launch="call",
        threads=usual_threads(table),
    )
    panels = {
        "training step, ms an image": [
            g for g in found if g.first["pass"] == "train" and g.first["batch"] == 16
        ],
        "inference, ms an image": [g for g in found if g.first["pass"] == "infer"],
    }
    return {title: cases for title, cases in panels.items() if any(g.mine for g in cases)}


def draw_networks(panels: dict[str, list[Group]], plt: Any) -> None:
    kept = [g for g in panels.get("training step, ms an image", []) if g.mine and g.mine["saved_bytes"]]
    figure, axes = plt.subplots(
        1, len(panels) + bool(kept), figsize=(5 * (len(panels) + bool(kept)), 4), squeeze=False
    )
    for axis, (title, cases) in zip(axes[0], panels.items()):
        bars(
            axis,
            [f"{g.first['case']}\nbatch {g.first['batch']:.0f}" for g in cases],
            cases,
            lambda r: r["p50_ms"] / r["batch"],
        )
        for i, g in enumerate(cases):
            axis.hlines(g.first["floor_ms"] / g.first["batch"], i - 0.45, i + 0.45, "black", "dotted")
        axis.set_title(title + " (dotted: floor)")
    if kept:
        bars(axes[0][-1], [g.first["case"] for g in kept], kept, lambda r: (r["saved_bytes"] or 0) / 1e6)
        axes[0][-1].set_title("kept for the backward, MB")
    legend(figure)


def layers(table: list[Row]) -> dict[str, list[Group]]:
    panels = {}
    for op in ("depthwise", "pointwise"):
        for form in ("chained", "standalone"):
            panels[f"{op}, {form}"] = [g for g in network_layers(table, op, form) if g.mine]
    return {title: cases for title, cases in panels.items() if cases}


def draw_layers(panels: dict[str, list[Group]], plt: Any) -> None:
    figure, axes = plt.subplots(len(panels), 1, figsize=(12, 3.2 * len(panels)), squeeze=False)
    for axis, (title, cases) in zip(axes[:, 0], panels.items()):
        bars(
            axis,
            [g.first["case"].split("_", 1)[1] + f"\n{g.first['case'].split('_')[0]}" for g in cases],
            cases,
            lambda r: r["ratio"],
        )
        for i, g in enumerate(cases):
            axis.hlines(g.mine["floor_ms"] / g.mine["p50_ms"], i - 0.45, i + 0.45, "black", "dotted")
        axis.axhline(1, color=COLORS["mnops"], linewidth=0.8)
        axis.set_title(f"{title}: time of forward and backward relative to mnops (dotted: floor)")
    legend(figure)


def roofline(table: list[Row]) -> list[Group]:
    found = groups(table, suite="ops", form="chained", dtype="float32", launch="call")
    return [g for g in found if g.mine and g.first["pass"] in ("forward", "backward")] or [
        g for g in found if g.mine and g.first["pass"] == "train"
    ]


ROOFLINE_SIDES = (
    (lambda g: g.mine, "mnops", {"color": "#d62728"}),
    (lambda g: g.best(stock), "best of PyTorch", {"color": "#4292c6", "markerfacecolor": "none"}),
)


def draw_roofline(cases: list[Group], plt: Any) -> None:
    _, axis = plt.subplots(figsize=(7, 5))
    rows = [g.mine for g in cases]
    copy, gemm = (sorted(r[c] for r in rows)[len(rows) // 2] for c in ("copy_gbs", "gemm_gflops"))
    reach = [r["flops"] / r["bytes"] for r in rows]
    xs = [min(reach) / 2, gemm / copy, max(max(reach) * 2, gemm / copy * 2)]
    axis.loglog(
        xs, [min(gemm, x * copy) for x in xs], "k-", label=f"{copy:.0f} GB/s copy, {gemm:.0f} GFLOP/s GEMM"
    )
    for (op, phase), marker in {
        ("depthwise", "forward"): "^",
        ("depthwise", "backward"): "v",
        ("depthwise", "train"): "o",
        ("pointwise", "forward"): ">",
        ("pointwise", "backward"): "<",
        ("pointwise", "train"): "s",
    }.items():
        chosen = [g for g in cases if (g.first["op"], g.first["pass"]) == (op, phase)]
        for pick, who, look in ROOFLINE_SIDES:
            points = [
                (r["flops"] / r["bytes"], r["flops"] / r["p50_ms"] / 1e6) for g in chosen if (r := pick(g))
            ]
            if points:
                axis.plot(
                    *zip(*points),
                    marker,
                    linestyle="none",
                    label=f"{op} {phase}, {who}",
                    **look,
                )
    axis.set_xlabel("FLOP per byte of the fused form")
    axis.set_ylabel("GFLOP/s")
    axis.legend(fontsize=7)


def scaling(table: list[Row]) -> list[Group]:
    found = groups(table, suite="net", case="1.0-224", dtype="float32", launch="call")
    found = [g for g in found if g.mine]
    several = len({g.first["threads"] for g in found}) > 1 or len({g.first["batch"] for g in found}) > 2
    return found if several else []


def draw_scaling(cases: list[Group], plt: Any) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 7))
    most = {c: max(g.first[c] for g in cases) for c in ("threads", "batch")}
    for line, phase in zip(axes, ("train", "infer")):
        for axis, (over, fixed) in zip(line, (("batch", "threads"), ("threads", "batch"))):
            chosen = [g for g in cases if g.first["pass"] == phase and g.first[fixed] == most[fixed]]
            for name in COLORS:
                points = sorted(
                    (g.first[over], 1e3 * g.first["batch"] / g[name]["p50_ms"]) for g in chosen if name in g
                )
                if len(points) > 1:
                    axis.plot(*zip(*points), "o-", color=COLORS[name], label=name)
            axis.set(
                xlabel=f"{over}, at {fixed} {most[fixed]:.0f}",
                ylim=(0, None),
                title={"train": "training", "infer": "inference"}[phase] + ", images/s",
            )
            axis.set_xticks(sorted({g.first[over] for g in chosen}))
    legend(figure)


FIGURES = {
    "networks": Figure("Training step, inference and memory of whole networks", networks, draw_networks),
    "layers": Figure("Each layer against each peer", layers, draw_layers),
    "roofline": Figure("The layers under the roofline of this machine", roofline, draw_roofline),
    "scaling": Figure("Images a second over batch size and threads", scaling, draw_scaling),
}


def bars(axis: Any, labels: list[str], cases: list[Group], value: Callable[[Row], float]) -> None:
    names = [n for n in COLORS if any(n in g for g in cases)]
    width = 0.9 / len(names)
    for k, name in enumerate(names):
        at = [
            (i + (k - (len(names) - 1) / 2) * width, value(g[name])) for i, g in enumerate(cases) if name in g
        ]
        axis.bar(*zip(*at), width, color=COLORS[name], label=name)
    axis.set_xticks(range(len(labels)), labels, fontsize=8)


def legend(figure: Any) -> None:
    """One for all panels, below them."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        found.update(zip(*reversed(axis.get_legend_handles_labels())))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=6, fontsize=8)


def available(table: list[Row]) -> list[tuple[str, str]]:
    """(name, what it shows) of the figures that these rows have data for."""
    return [(name, figure.shows) for name, figure in FIGURES.items() if figure.collect(table)]


def draw(table: list[Row], folder: Path, prefix: str) -> None:
    """Writes every figure that has data as `prefix`-name.svg; the same rows give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    style = {
        "svg.hashsalt": "mnops",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(style):
        for name, _ in available(table):
            FIGURES[name].draw(FIGURES[name].collect(table), plt)
            plt.savefig(folder / f"{prefix}-{name}.svg", metadata={"Date": None})
            plt.close()
