"""bench startup: what the first call costs, each contender in processes of its own with cold compiler caches.

import   importing the contender's package, torch being imported already (for torch itself: from nothing)
infer    from the imported package to the first logits of MobileNet-1.0-224, one image
train    from the imported package to the end of the first training step, four images
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from tqdm import tqdm

from . import harness, machine, rows
from .harness import Options
from .network_case import NetworkCase
from .peers import PEERS
from .shapes import networks

PASSES = ("import", "infer", "train")
IMPORT = (
    "import time{before}; start = time.perf_counter(); import {package}; print(time.perf_counter() - start)"
)


def run(options: Options) -> None:
    quick = options.rounds[0] < 7
    have = {rows.key(r): r["commit"] for r in rows.read(options.results)}
    commit, plain = (
        machine.commit(),
        {"suite": "startup", "case": "1.0-224", "op": "mobilenet_v1", "dtype": "float32"},
    )
    base = {**plain, **harness.identity(options), "form": "network", "check": "ok", "count": 1}
    todo = {}
    for phase in PASSES:
        for name in dict.fromkeys(("torch-channels_last", *options.peers)):
            row = {
                **base,
                "pass": phase,
                "batch": {"train": 4}.get(phase, 1),
                "contender": name,
                "layout": PEERS[name].layout,
            }
            serves = phase == "import" or phase in PEERS[name].passes
            if serves and (options.fresh or have.get(rows.key(row)) != commit):
                todo[phase, name] = row
    rounds = 1 if quick else 2
    # a compiler takes a minute, which noise hardly moves: once
    once = {(phase, name) for phase, name in todo if phase != "import" and "compile" in name}
    times: dict[tuple[str, str], list[float]] = {job: [] for job in todo}
    with tqdm(total=rounds * (len(todo) - len(once)) + len(once), unit="process", dynamic_ncols=True) as bar:
        for turn in range(rounds):
            for phase, name in [job for job in times if turn == 0 or job not in once]:
                bar.set_postfix_str(f"{phase} {name}")
                got = first_call(phase, name, options)
                if isinstance(got, float):
                    times[phase, name].append(got)
                else:
                    bar.write(f"left out: {name}: {got}")
                    del times[phase, name]
                bar.update()
    made = []
    for phase in PASSES:
        same = {n: t for (p, n), t in times.items() if p == phase}
        against = next((n for n in same if n.startswith("mnops")), next(iter(same), None))
        for name, values in same.items():
            made.append(
                {
                    **todo[phase, name],
                    **rows.summarize(values, same[against][: len(values)]),
                    "against": against,
                }
            )
            print(f"{phase:7} {name:20} {made[-1]['p50_ms']:9.1f} ms")
    rows.write(options.results, made)


def first_call(phase: str, name: str, options: Options) -> float | str:
    """Seconds, or why there are none."""
    with tempfile.TemporaryDirectory() as cold:
        env = {"TORCHINDUCTOR_CACHE_DIR": cold, "TRITON_CACHE_DIR": cold}
        command = [
            sys.executable,
            "-m",
            "benchmarks.startup",
            phase,
            name,
            options.device,
            str(options.threads),
        ]
        if phase == "import":
            package = PEERS[name].package
            before = "" if package == "torch" else ", torch"
            command = [sys.executable, "-c", IMPORT.format(before=before, package=package)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=machine.ROOT, env={**os.environ, **env}
        )
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return (done.stderr.strip().splitlines() or ["it printed nothing"])[-1][:160]


def child(phase: str, name: str, device: str, threads: int) -> float | str:
    """What runs in the process of a contender."""
    peer = PEERS[name]
    case = NetworkCase(networks()[0], phase, {"train": 4}.get(phase, 1), torch.float32)
    if reason := peer.why_not(case, device):  # imports the package as well
        return reason
    torch.set_num_threads(threads)
    _ = case.weights
    torch.zeros(1, device=device)
    start = time.perf_counter()
    peer.build(case, device).call(0)
    machine.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(child(*sys.argv[1:4], int(sys.argv[4]))))
