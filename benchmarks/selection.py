"""Choosing among rows: what tables and figures are both made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from . import rows, shapes
from .rows import Row

RUNTIMES = {"onnxruntime", "openvino", "xnnpack"}
GROUP = [c for c in rows.KEY if c != "contender"]


class Group(dict[str, Row]):
    """The rows of one case, by contender."""

    @property
    def first(self) -> Row:
        return next(iter(self.values()))

    @property
    def mine(self) -> Row | None:
        """The row of mnops, or of the first backend that was named."""
        named = (row for name, row in self.items() if name.startswith("mnops-"))
        return self.get("mnops") or next(named, None)

    def best(self, among: Callable[[str], bool]) -> Row | None:
        """The fastest contender that is not mnops and satisfies `among`."""
        others = [r for name, r in self.items() if not name.startswith(("mnops", "kernel")) and among(name)]
        return min(others, key=lambda r: r["p50_ms"], default=None)


def stock(name: str) -> bool:
    """PyTorch in any of its forms."""
    return name not in RUNTIMES


def anyone(name: str) -> bool:
    return True


def groups(table: Iterable[Row], **where: object) -> list[Group]:
    """The cases whose columns are as in `where`, each with its right and timed rows."""
    found: dict[tuple, Group] = {}
    for row in table:
        if row["check"] == "ok" and all(row[c] == value for c, value in where.items()):
            found.setdefault(tuple(row[c] for c in GROUP), Group())[row["contender"]] = row
    return [_one_run(g) for g in found.values()]


def _one_run(g: Group) -> Group:
    """Without rows that were measured beside another mnops than the newest: their ratios are to that."""
    own = g.mine or g.first
    return Group({name: r for name, r in g.items() if r["commit"] == own["commit"]})


def usual_threads(table: list[Row]) -> float:
    """All of the machine's: the number that figures are quoted for."""
    return max((r["threads"] for r in table), default=1)


def network_layers(table: list[Row], op: str, form: str) -> list[Group]:
    """MobileNet's layers of one kind: forward and backward, batch 16, fp32, all threads."""
    names = {layer.name for layer in shapes.layers("mobilenet_v1")}
    usual = {
        "pass": "train",
        "batch": 16,
        "dtype": "float32",
        "launch": "call",
        "threads": usual_threads(table),
    }
    return [g for g in groups(table, suite="ops", op=op, form=form, **usual) if g.first["case"] in names]
