"""One row schema for every benchmark, kept as CSV: one file per machine, one line per (work, contender).

A line is replaced when the same contender does the same work on the same machine again, so a file always
holds the newest figure of everything; its history is in git.
"""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# what was done, by whom, where: rows that agree in all of these are the same measurement
KEY = (
    "suite",
    "case",
    "op",
    "form",
    "pass",
    "batch",
    "shape",
    "dtype",
    "launch",
    "contender",
    "threads",
    "machine",
)
COLUMNS = (
    *KEY,
    "backend",  # the library (or mnops backend) that did the work, with its version
    "layout",  # of the input: NCHW | channels_last
    "count",  # how often the network holds this layer
    "check",  # ok | wrong | failed: why. Only ok rows have times
    "error",  # largest relative L2 error of any output or gradient against the same computation in fp64
    "rounds",
    "p20_ms",
    "p50_ms",
    "p80_ms",  # one step of work
    "against",
    "ratio",
    "ratio_q1",
    "ratio_q3",  # time / time of `against` in the same round: median and quartiles
    "bytes",
    "flops",  # what the fused form must move and compute
    "copy_gbs",
    "gemm_gflops",
    "floor_ms",  # measured in the same run; floor = max(bytes / copy, flops / gemm)
    "saved_bytes",  # allocated by the forward and held after it, for the backward
    "peak_bytes",  # most that was allocated at once in one step, beyond what was there before it
    "kernel",  # what the profiler saw run, with its share of the time
    "cache_bytes",
    "torch",
    "capability",
    "triton",
    "driver",  # of the GPU
    "commit",
    "date",
)
NUMBERS = {
    "batch",
    "threads",
    "count",
    "error",
    "rounds",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "ratio",
    "ratio_q1",
    "ratio_q3",
    "bytes",
    "flops",
    "copy_gbs",
    "gemm_gflops",
    "floor_ms",
    "saved_bytes",
    "peak_bytes",
    "cache_bytes",
}


def key(row: Row) -> tuple[str, ...]:
    return tuple(_text(row.get(column)) for column in KEY)


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    for row in lines:
        row.update({c: float(row[c]) if row.get(c) else None for c in NUMBERS})
    return lines


def read_all(folder: Path) -> list[Row]:
    """The rows of every machine; quick trials (quick*.csv) are not results."""
    return [
        r for path in sorted(folder.glob("*.csv")) if not path.stem.startswith(("quick", "arm-")) for r in read(path)
    ]


def write(path: Path, new: Iterable[Row]) -> None:
    """Put `new` into the file, each in place of the row of its key. A kill leaves the old file or the new."""
    table = {key(r): r for r in read(path)} | {key(r): r for r in new}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows({c: _text(r.get(c)) for c in COLUMNS} for r in table.values())
    os.replace(partial, path)


def summarize(times: list[float], against: list[float]) -> Row:
    """Columns of one contender from its seconds per round and those of the contender it is compared with."""
    ratios = [t / a for t, a in zip(times, against)]
    p20, p50, p80 = (1e3 * quantile(times, q) for q in (0.2, 0.5, 0.8))
    return {
        "rounds": len(times),
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "ratio": statistics.median(ratios),
        "ratio_q1": quantile(ratios, 0.25),
        "ratio_q3": quantile(ratios, 0.75),
    }


def quantile(values: list[float], q: float) -> float:
    """Linear between the two nearest of the sorted values."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = ordered[int(at)]
    return low + (at - int(at)) * (ordered[min(int(at) + 1, len(ordered) - 1)] - low)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}" if abs(value) < 1e5 else f"{value:.0f}"
    return str(value)
