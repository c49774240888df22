"""Memory of a step: kept for the backward, and allocated at once at most; and which kernels ran."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from mnops.memory import from_torch


def hold_freed_memory() -> None:
    """malloc keeps what is freed from now on, where it is glibc's.

    Contenders that share a process would else pay for fresh pages, or not, by the sizes that ran before them: a
    depthwise layer of stock PyTorch took 15 or 31 ms.
    """
    mmap_max, trim_threshold = -4, -1  # numbers of malloc.h
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def saved_bytes(forward: Callable[[], object], device: str) -> int:
    """Bytes that `forward` allocates and that are still held after it, for its backward."""
    alive: list[object] = []
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        alive.append(forward())
        return torch.cuda.memory_allocated() - before
    with from_torch(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        alive.append(forward())
    return sum(e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")


def peak_bytes(call: Callable[[int], object], device: str) -> int:
    """Most bytes that PyTorch's allocator held at once during one call, beyond those held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with from_torch(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call(0)
    held = peak = 0
    events = (e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def kernels(call: Callable[[int], object], device: str, most: int = 3) -> str:
    """The kernels (on a CPU: the operators) that took the most time of one call, with their shares."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as prof:
        call(0)
        if device == "cuda":
            torch.cuda.synchronize()
    time = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [
        e for e in prof.key_averages() if device == "cpu" or e.device_type == torch.autograd.DeviceType.CUDA
    ]
    total = sum(getattr(e, time) for e in events) or 1
    events.sort(key=lambda e: -getattr(e, time))
    return "; ".join(f"{e.key[:80]} {getattr(e, time) / total:.0%}" for e in events[:most])
