"""What the numbers were measured on: machine, versions, commit, and the two rates that floors are made of."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# the code that is measured; rows stay valid while it does not change
MEASURED = [
    "csrc",
    "mnops",
    "CMakeLists.txt",
    "setup.py",
    ":!mnops/bench.py",
    ":!mnops/measured.csv",
    ":!mnops/report.py",
    ":!mnops/train",
]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def lost(device: str) -> bool:
    """Whether a kernel has ruined the GPU's context: every call of this process fails from then on."""
    try:
        synchronize(device)
    except Exception:
        return True
    return False


def fastest() -> str:
    """Where the truth is computed."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def drawn(seed: int) -> Callable[..., torch.Tensor]:
    """torch.randn of that seed, on the fastest device: batches for a GPU take a CPU seconds."""
    device = fastest()
    return functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(seed), device=device)


@functools.cache
def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return re.sub(r"\((R|TM)\)|Processor|CPU", "", found[1] if found else platform.processor()).strip()


@functools.cache
def last_level_cache(device: str) -> int:
    """Bytes of the largest cache that `device` reads through."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(
        (int(s[:-1]) * {"K": 1 << 10, "M": 1 << 20}[s[-1]] for s in sizes if s[-1:] in ("K", "M")),
        default=32 << 20,
    )


@functools.cache
def name(device: str) -> str:
    """The name rows and the results file carry, as `AMD EPYC, 2 cores, AVX2`."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def gpu_software(device: str) -> dict[str, str]:
    """What rows of a GPU name beside it: its compute capability (90: 9.0), the versions of Triton and of the driver."""
    if device != "cuda":
        return {}
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        said = "unknown"
    major, minor = torch.cuda.get_device_capability()
    return {"capability": str(10 * major + minor), "triton": triton, "driver": said}


def slug(name: str) -> str:
    """A machine's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def commit() -> str:
    """The last commit that changed the measured code, with a digest of what is not committed of it."""

    def git(*args: str) -> str:
        try:
            said = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
        except OSError:  # not installed
            return ""
        return said.stdout.strip()

    changed = git("diff", "HEAD", "--", *MEASURED)
    # a copy without its history says with MNOPS_COMMIT what it is a copy of
    return (git("log", "-1", "--format=%h", "--", *MEASURED) or os.environ.get("MNOPS_COMMIT", "none")) + (
        "+" + hashlib.sha1(changed.encode()).hexdigest()[:6] if changed else ""
    )


def rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Copy bandwidth in GB/s (bytes read and written, far beyond the cache) and GEMM rate in GFLOP/s."""
    size = 1 << 30 if device == "cuda" else max(4 * last_level_cache(device), 64 << 20)
    a = torch.ones(size // 4, device=device)
    b = torch.empty_like(a)
    # the CPU computes halves in fp32, so its roof is the fp32 rate
    m, half = (4096, dtype) if device == "cuda" else (2048, torch.float32)
    x, w = torch.ones(m, 512, device=device, dtype=half), torch.ones(512, 512, device=device, dtype=half)
    y = torch.empty(m, 512, device=device, dtype=half)
    if device == "cuda":
        x, w, y = (torch.randn(8192, 8192, device=device, dtype=half) for _ in range(3))  # ones run faster
    copy = seconds(lambda: b.copy_(a), device)
    gemm = seconds(lambda: torch.mm(x, w, out=y), device)
    return 2 * a.nbytes / copy / 1e9, 2 * y.numel() * x.shape[1] / gemm / 1e9


def seconds(call, device: str, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds + 2):
        synchronize(device)
        if device == "cuda":  # behind another call, so that no launch is waited for
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call()
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
            continue
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


KEPT: list[torch.library.Library] = []


def import_torchvision() -> None:
    """torchvision's compiled part, which timm does not need, fits only one build of torch. Its Python part needs
    no more than that two of the operators are declared."""
    if importlib.util.find_spec("torchvision") and not hasattr(torch.ops.torchvision, "nms"):
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for op in ("nms", "qnms"):
                with contextlib.suppress(RuntimeError):
                    library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            KEPT.append(library)  # one that is collected takes its operators along
