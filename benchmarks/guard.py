"""bench guard: has anything become slower? A short subset is measured again, and its ratios to stock PyTorch,
which the machine's mood hardly moves, are compared with the committed ones."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from . import harness, rows, shapes
from .harness import Options
from .layer_case import LayerCase
from .network_case import NetworkCase
from .rows import Row

LAYERS = {"dw3s1_128x56", "dw3s2_64x112", "dw3s1_512x14", "pw_128-128x56"}
NETWORK = "0.25-224"
TOO_NOISY = 0.25  # relative spread of both beyond which a comparison says nothing
SLACK = 0.05  # besides the spread of both measurements: two builds of the same source differ by this much


def subset() -> list[LayerCase | NetworkCase]:
    chosen = [c for c in shapes.layers("mobilenet_v1") if c.name in LAYERS]
    network = next(n for n in shapes.networks() if n.name == NETWORK)
    return [
        *harness.layer_cases(chosen, ["chained"], ["train"], [16], [torch.float32]),
        NetworkCase(network, "train", network.train_batch, torch.float32),
    ]


def run(options: Options) -> int:
    """0: as fast as the committed rows; 1: slower or wrong; 2: nothing to compare with, or too noisy."""
    committed = {rows.key(r): r for r in rows.read(options.results)}
    with tempfile.TemporaryDirectory() as folder:
        quiet = replace(
            options,
            results=Path(folder) / "quick.csv",
            peers=("mnops", "torch-channels_last"),
            budget=min(options.budget, 4.0),
        )
        new = harness.run(subset(), quiet)
    pairs = [
        (r, committed[rows.key(r)]) for r in new if rows.key(r) in committed and r["contender"] != "mnops"
    ]
    compared = [pair for pair in pairs if all(r["check"] == "ok" and r["against"] == "mnops" for r in pair)]
    for row in new:
        if row["check"] != "ok":
            print(f"{row['case']}: {row['contender']} is {row['check']}")
    if not compared:
        print(f"guard: {options.results} has no rows of this machine and these cases: run `bench all` first")
        return 2
    verdicts = {verdict(now, then) for now, then in compared}
    if "slower" in verdicts or any(r["check"] != "ok" for r in new):
        return 1
    return 2 if "unclear" in verdicts else 0


def verdict(now: Row, then: Row) -> str:
    """slower: the ratio to the peer fell by more than spread and slack; unclear: they are too big."""
    noise = spread(then) + spread(now)
    least = then["ratio"] * (1 - SLACK - noise)
    found = "unclear" if noise > TOO_NOISY else "slower" if now["ratio"] < least else "ok"
    told = f"x{now['ratio']:.2f}, committed x{then['ratio']:.2f}, least x{least:.2f}: {found}"
    print(f"{now['case']:16} {now['pass']:6} {told}")
    return found


def spread(row: Row) -> float:
    """Half the interquartile range, relative to the median."""
    return (row["ratio_q3"] - row["ratio_q1"]) / 2 / row["ratio"]
