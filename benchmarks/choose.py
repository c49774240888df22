"""bench choose: from the rows of GPUs to mnops/measured.csv, by which the registry picks a backend for a layer.

Of each kind of layer (`mnops.measured.Shape`) the backend of least time, forward and backward in the chained form: its
time over the fastest's, summed over the cases (batches, sizes of map, fp16 and bf16) that all of them did right.
"""

from __future__ import annotations

import collections
import csv
import os
import re
from collections.abc import Iterable

from mnops import backends, measured

from .rows import Row
from .selection import Group, groups

Kind = tuple[int, str, measured.Shape]


def choose(rows: Iterable[Row]) -> list[dict[str, object]]:
    """Lines of measured.csv, from rows that name a capability."""
    kinds: dict[Kind, list[dict[str, float]]] = collections.defaultdict(list)
    for group in groups((r for r in rows if r.get("capability")), suite="ops", form="chained", **{"pass": "train"}):
        times = {name: group[f"mnops-{name}"]["p50_ms"] for name in backends.BACKENDS if f"mnops-{name}" in group}
        if times:
            kinds[_kind(group)].append(times)
    lines = []
    for (capability, op, shape), cases in sorted(kinds.items()):
        names = set.intersection(*(set(times) for times in cases))
        score = {n: sum(times[n] / min(times[m] for m in names) for times in cases) for n in names}
        first, *others = sorted(names, key=lambda n: (score[n], n))
        second, ratio = (others[0], f"{score[others[0]] / score[first]:.3f}") if others else ("", "")
        values = capability, op, *shape, first, second, ratio
        lines.append(dict(zip(measured.COLUMNS, values)))
    return lines


def _kind(group: Group) -> Kind:
    row = group.first
    channels, out, kernel, stride = map(int, re.match(r"(\d+)x\d+x\d+->(\d+) k(\d+) s(\d+) ", row["shape"]).groups())
    itemsize = {"float64": 8, "float32": 4}.get(row["dtype"], 2)
    inner = 1 if row["op"] == "depthwise" else channels
    shape = measured.Shape(itemsize, kernel, stride, inner, out)
    return int(row["capability"]), f"{row['op']}_conv2d", shape


def run(rows: Iterable[Row]) -> int:
    """Writes the table; 2, and nothing written, where there is nothing to write."""
    lines = choose(rows)
    if not lines:
        print("choose: there are no right rows of a GPU: `bench table depthwise --device cuda` first")
        return 2
    partial = measured.FILE.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        out = csv.DictWriter(file, measured.COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(lines)
    os.replace(partial, measured.FILE)
    for (capability, op, backend), n in sorted(collections.Counter(
        (line["capability"], line["op"], line["backend"]) for line in lines
    ).items()):
        print(f"{capability} {op:16} {backend:8} {n} kinds of layer")
    return 0
