"""Timing: the sides take turns, round by round, so that a slow minute hits all of them."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable

import torch

Call = Callable[[int], object]  # one step of work on buffer i
Sample = Callable[[int, int], float]  # seconds of one call, over so many in a row, the first on buffer i

SAMPLE = {"cpu": 0.03, "cuda": 0.005}  # seconds: a sample shorter than this is repeated until it is not
REST = 0.005  # seconds between contenders, in which the last one's worker threads stop spinning


def sample(call: Call, repeats: int, first: int, device: str) -> float:
    """Seconds of one call, over `repeats` calls in a row on consecutive buffers."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(first, first + repeats):
            call(i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for i in range(first, first + repeats):
        call(i)
    return (time.perf_counter() - begin) / repeats


def interleave(
    samples: dict[str, Sample],
    device: str,
    budget: float,
    rounds: tuple[int, int] = (7, 40),
    tick: Callable[[float], None] = lambda share: None,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one value a round.

    Every round times each contender once, in a shuffled order. The number of rounds is what fits into
    `budget` seconds, within `rounds`. `tick` hears the share of the rounds that is done.
    """
    repeats, cost = {}, 0.0
    for name, take in samples.items():
        take(2, 0)  # warm-up: allocator, autotuning, lazy packing
        once = take(1, 2)
        repeats[name] = max(1, round(SAMPLE[device] / once))
        cost += once * (repeats[name] + 1) + REST
    count = max(rounds[0], min(rounds[1], int(budget / cost)))
    times: dict[str, list[float]] = {name: [] for name in samples}
    order, shuffle = list(samples), random.Random(0).shuffle
    for r in range(count):
        shuffle(order)
        for name in order:
            if device == "cpu":
                time.sleep(REST)
            # a long step is its own warm-up; a short one gets its code and weights back into cache first
            if repeats[name] > 1:
                samples[name](1, r)
            times[name].append(samples[name](repeats[name], r * repeats[name]))
        tick((r + 1) / count)
    return times


@functools.cache
def capture() -> tuple[torch.cuda.Stream, tuple[int, int], torch.cuda.CUDAGraph]:
    """The stream that everything to be captured runs on from its first call (a backward runs on the stream of
    its forward), the memory pool of all graphs, and a graph that keeps the pool.

    One pool serves, as graphs are replayed one after the other; a pool each for batch 256 and six contenders
    would not fit on the device.
    """
    stream, pool, keeper = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(keeper, pool=pool, stream=stream):
        torch.zeros(1, device="cuda")
    return stream, pool, keeper


def graphed(call: Call, buffers: int) -> Call:
    """`call` as a replayed CUDA graph per buffer: what is left when launching costs nothing."""
    stream, pool, _ = capture()
    for i in range(3):
        call(i % buffers)
    graphs = []
    for i in range(buffers):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            call(i)
        graphs.append(graph)
    return lambda i: graphs[i % buffers].replay()
