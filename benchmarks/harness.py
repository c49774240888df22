"""Runs cases: builds every contender, checks it, times them in turns, writes the rows. Resumable."""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from . import machine, memory, rows, timing
from .contender import Apart, Contender
from .layer_case import LayerCase
from .peers import MINE, PEERS, Case
from .rows import Row
from .step import error, tolerance

LOST = "lost: "  # check of a contender whose kernel ruined the GPU's context
BUSY = 1.0  # load average of the last minute, above which somebody else is computing


class DeviceLost(Exception):
    """A contender's kernel ruined the GPU's context: only another process can go on. `row` is the contender's."""

    def __init__(self, row: Row) -> None:
        super().__init__(f"{row['contender']}: {row['check']}")
        self.row = row


@dataclass(frozen=True)
class Options:
    """How to measure."""

    peers: tuple[str, ...]
    results: Path
    device: str = "cpu"
    threads: int = 0  # 0: as many as torch takes
    launch: str = "call"  # call | graph (CUDA graph replay)
    budget: float = 8.0  # seconds of timing per case
    rounds: tuple[int, int] = (7, 40)
    fresh: bool = False  # measure again what is already there
    end: float = math.inf  # of time.monotonic: no case begins after it


def run(cases: Iterable[Case], options: Options) -> list[Row]:
    """The rows of `cases`, each case written to `options.results` when it is done.

    Raises DeviceLost, the culprit's row written: the next call of the same commit leaves it out.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces each of its runs otherwise
    options = replace(options, threads=options.threads or torch.get_num_threads())
    cases = list(cases)
    made: list[Row] = []
    with (
        tqdm(
            total=len(cases),
            unit="case",
            bar_format="{l_bar}{bar}| {n:.1f}/{total} cases [{elapsed}<{remaining}]{postfix}",
            dynamic_ncols=True,
        ) as bar,
        threads(options.threads),
    ):
        for reason in sorted({r for case in cases for r in absent(case, options)}):
            bar.write(reason)
        if (load := os.getloadavg()[0]) > BUSY:
            bar.write(f"the machine is busy (load {load:.1f}): these will not be its best figures")
        for done, case in enumerate(cases):
            c = case.columns
            bar.set_postfix_str(f"{c['case']} {c['form']} {c['pass']} {c['batch']} {c['dtype']}")
            if options.fresh or not finished(case, options):
                if time.monotonic() > options.end:
                    bar.write(f"time is over: {len(cases) - done} cases are left for the next call")
                    break
                try:
                    new = measure(case, options, lambda share, done=done: advance(bar, done + share))
                except DeviceLost as e:
                    rows.write(options.results, [e.row])
                    raise
                rows.write(options.results, new)
                for row in new:
                    bar.write(line(row))
                made += new
            advance(bar, done + 1)
    return made


def measure(case: Case, options: Options, tick: Callable[[float], None] = lambda share: None) -> list[Row]:
    """One row for each contender of one case."""
    device = options.device
    torch._dynamo.reset()  # each case compiles for itself, as a user's only network would
    common = {**case.columns, **identity(options), "cache_bytes": machine.last_level_cache(device)}
    gone = {r["contender"] for r in known(case, options) if r["check"].startswith(LOST)}
    served = [PEERS[name] for name in options.peers if name not in gone and PEERS[name].why_not(case, device) is None]
    before = machine.rates(device, case.dtype)
    limit = tolerance(case, device)
    ready: dict[str, Contender | Apart] = {}
    made: dict[str, Row] = {}

    def failed(name: str, e: Exception) -> None:
        """Whatever a contender dies of belongs into its row, and the others go on."""
        made[name]["check"] = f"failed: {type(e).__name__}: {' '.join(str(e).split())[:160]}"
        ready.pop(name, None)
        if machine.lost(device):
            made[name]["check"] = LOST + made[name]["check"].removeprefix("failed: ")
            raise DeviceLost(made[name]) from e

    for peer in served:
        row = made[peer.name] = {**common, "contender": peer.name, "layout": peer.layout}
        try:
            row["backend"] = peer.backend(case, device)
            contender = start(peer.name, case, options)
            row["error"] = error(contender.outputs(), peer.truth(case))
            row["check"] = "ok" if row["error"] <= limit else "wrong"
            if row["check"] == "ok":
                contender.ready()
                ready[peer.name] = contender
            else:
                contender.close()
        except Exception as e:
            failed(peer.name, e)
    times = timed(ready, options, tick, failed)
    floor = floors(case, *map(max, before, machine.rates(device, case.dtype)))
    against = next((n for n in [*MINE, *times] if n in times), None)
    for name, values in times.items():
        made[name].update(rows.summarize(values, times[against]), against=against)
        try:
            made[name].update(ready[name].observe(made[name]["backend"]))
        except Exception as e:  # it has its times
            made[name]["kernel"] = f"not observed: {type(e).__name__}"
        ready[name].close()
    gc.collect()
    return [{**row, **floor} for row in made.values()]


def timed(
    ready: dict[str, Contender | Apart],
    options: Options,
    tick: Callable[[float], None],
    failed: Callable[[str, Exception], None],
) -> dict[str, list[float]]:
    """Seconds per call of each contender, a value a round. One that fails is told to `failed`, and the others begin
    anew."""
    running = ""

    def sample(name: str, *args: int) -> float:
        nonlocal running
        running = name
        return ready[name].sample(*args)

    while ready:
        samples = {name: functools.partial(sample, name) for name in ready}
        try:
            return timing.interleave(samples, options.device, options.budget, options.rounds, tick)
        except Exception as e:
            failed(running, e)
    return {}


def start(name: str, case: Case, options: Options) -> Contender | Apart:
    """A network on a CPU is trained and run by a process that does nothing else: so each contender has one."""
    if case.suite == "net" and options.device == "cpu":
        _ = case.weights  # drawn here, the same for all
        return Apart(name, case, options.device, options.launch, options.threads)
    memory.hold_freed_memory()
    return Contender(name, case, options.device, options.launch)


def floors(case: Case, copy: float, gemm: float) -> Row:
    """What the machine could do at best, by the rates measured around the case."""
    floor = 1e3 * max(case.bytes / copy, case.flops / gemm) / 1e9
    return {"copy_gbs": copy, "gemm_gflops": gemm, "floor_ms": floor}


def identity(options: Options) -> Row:
    return {
        "threads": options.threads,
        "launch": options.launch,
        "machine": machine.name(options.device),
        "torch": torch.__version__,
        **machine.gpu_software(options.device),
        "commit": machine.commit(),
        "date": datetime.date.today().isoformat(),
    }


def finished(case: Case, options: Options) -> bool:
    """Whether the file has a row of this commit and torch for every contender that would run."""
    have = {r["contender"] for r in known(case, options)}
    return all(n in have for n in options.peers if not PEERS[n].why_not(case, options.device))


def known(case: Case, options: Options) -> list[Row]:
    """The file's rows of this case, commit and torch."""
    now = {**case.columns, **identity(options)}
    keys = {rows.key({**now, "contender": n}) for n in options.peers}
    same = (now["commit"], now["torch"])
    return [r for r in rows.read(options.results) if rows.key(r) in keys and (r["commit"], r["torch"]) == same]


def absent(case: Case, options: Options) -> Iterator[str]:
    for name in options.peers:
        reason = PEERS[name].why_not(case, options.device)
        if reason and reason.startswith("needs"):
            yield f"left out: {name} {reason}"


def line(row: Row) -> str:
    what = f"{row['case']:18} {row['form']:10} {row['pass']:8} {row['contender']:20}"
    if row["check"] != "ok":
        return f"{what} {row['check']}" + (f" (error {row['error']:.1e})" if row["check"] == "wrong" else "")
    return (
        f"{what} {row['p50_ms']:9.3f} ms  x{row['ratio']:.2f} [{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]"
        f"  {row['p50_ms'] / row['floor_ms']:5.2f} of the floor  error {row['error']:.0e}"
    )


def advance(bar: tqdm, to: float) -> None:
    bar.update(to - bar.n)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def layer_cases(
    layers: Iterable,
    forms: Iterable[str],
    passes: Iterable[str],
    batches: Iterable[int],
    dtypes: Iterable[torch.dtype],
) -> list[LayerCase]:
    forms, passes, batches, dtypes = map(list, (forms, passes, batches, dtypes))
    return [
        LayerCase(layer, form, phase, batch, dtype)
        for layer in layers
        for dtype in dtypes
        for batch in batches
        for phase in passes
        for form in forms
    ]
