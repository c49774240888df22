"""The host side that all ops share: launches, the NHWC view of tensors, and how many programs fill the
device.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnops.reference import layout

# What gy is multiplied by before it is rounded to half precision for tensor cores. g, as it was stored, lies
# on the grid of that precision; a gradient of the mean or the variance, spread over all pixels, is often less
# than half a step of it, and g + gm would round back to g at every pixel: in the sum over pixels a whole term
# of BatchNorm's gradient would be missing. Off the grid the rounding errors average out. Twice the golden
# section spreads the 128 mantissas of bf16 most evenly between the grid points.
DITHER = 1.2360679774997898

INTERPRETED_MULTIPROCESSORS = 2  # enough for a second stage with something to merge


class Gpu(NamedTuple):
    """What tiles and grids depend on."""

    capability: int  # 90: 9.0
    multiprocessors: int
    shared: int  # bytes of shared memory of a program, at most


# For code compiled ahead on a machine without a GPU
ASSUMED = {
    80: Gpu(80, 108, 163 << 10),  # A100
    86: Gpu(86, 84, 99 << 10),  # GeForce 30
    89: Gpu(89, 128, 99 << 10),  # L40, GeForce 40
    90: Gpu(90, 132, 227 << 10),  # H100, H200
    100: Gpu(100, 148, 227 << 10),  # B200
    120: Gpu(120, 170, 99 << 10),  # GeForce 50
}


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int


class _State(threading.local):
    inline: bool = False  # the compiler is looking: launches become nodes of its graph
    record: list[Launch] | None = None  # launches are written down here and not done
    capability: int = 90  # of the GPU that is assumed where there is none


_state = _State()


@contextlib.contextmanager
def inlined() -> Iterator[None]:
    """Within, launches go through `torch.library.wrap_triton`, so that a tracer sees the kernels."""
    before, _state.inline = _state.inline, True
    try:
        yield
    finally:
        _state.inline = before


@contextlib.contextmanager
def recorded(capability: int = 90) -> Iterator[list[Launch]]:
    """Within, nothing is launched; the list tells what would have been on that compute capability. For meta
    tensors.
    """
    before, _state.record, _state.capability = (_state.record, _state.capability), [], capability
    try:
        yield _state.record
    finally:
        _state.record, _state.capability = before


def observed() -> bool:
    """Whether launches are written down or traced, and not done."""
    return _state.inline or _state.record is not None


def launch(kernel: Any, grid: Sequence[int], warps: int = 4, stages: int = 2, **arguments: Any) -> None:
    """kernel[grid](**arguments) on the current stream of the tensors' device."""
    if _state.record is not None:
        _state.record.append(Launch(kernel, tuple(grid), arguments, warps, stages))
        return
    if _state.inline:
        torch.library.wrap_triton(kernel)[tuple(grid)](**arguments, num_warps=warps, num_stages=stages)
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[tuple(grid)](**arguments, num_warps=warps, num_stages=stages)
    else:
        kernel[tuple(grid)](**arguments, num_warps=warps, num_stages=stages)


@functools.cache
def _gpu(index: int) -> Gpu:
    p = torch.cuda.get_device_properties(index)
    shared = getattr(p, "shared_memory_per_block_optin", 99 << 10)
    return Gpu(10 * p.major + p.minor, p.multi_processor_count, shared)


def gpu(device: torch.device) -> Gpu:
    if device.type == "cpu":
        return ASSUMED[_state.capability]._replace(multiprocessors=INTERPRETED_MULTIPROCESSORS)
    if device.type != "cuda" or not torch.cuda.is_available():
        return ASSUMED[_state.capability]
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def multiprocessors(device: torch.device) -> int:
    return gpu(device).multiprocessors


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def out_size(
    height: int, width: int, kernel: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[
        int
    ]
) -> tuple[int, int]:
    top, bottom, left, right = padding
    return (
        (height + top + bottom - dilation[0] * (kernel - 1) - 1) // stride[0] + 1,
        (width + left + right - dilation[1] * (kernel - 1) - 1) // stride[1] + 1,
    )


def precision(x: Tensor) -> str:
    """How tl.dot multiplies fp32: by torch's own switch for convolutions. It means nothing for half x."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def nhwc(t: Tensor) -> Tensor:
    """t in channels_last memory: itself, or a copy."""
    return t.contiguous(memory_format=torch.channels_last)


def empty_nhwc(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def restored(y: Tensor, x: Tensor) -> Tensor:
    """y, made in channels_last memory, in the memory format that x asks for."""
    return y.contiguous(memory_format=layout(x))


def vectors(*given: Tensor | None) -> list[Tensor | None]:
    """Per-channel vectors with stride 1."""
    return [v if v is None else v.contiguous() for v in given]


# ---- arguments that kernels share ----


def norm_arguments(
    mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> dict[str, Any]:
    """Of the pending norm: its vectors, and which of them there are."""
    mean, var, gamma, beta = vectors(mean, var, gamma, beta)
    there = dict(NORM=mean is not None, GAMMA=gamma is not None, BETA=beta is not None)
    return dict(mean=mean, var=var, gamma=gamma, beta=beta, **there)


def incoming_arguments(
    g: Tensor, g_mean: Tensor | None, g_var: Tensor | None, y: Tensor, mean_y: Tensor
) -> dict[str, Any]:
    """Of what gy is made of. y is read through g_var only; without it g stands in its place."""
    g_mean, g_var, mean_y = vectors(g_mean, g_var, mean_y)
    g = nhwc(g)
    there = dict(GMEAN=g_mean is not None, GVAR=g_var is not None)
    return dict(g=g, y=g if g_var is None else nhwc(y), g_mean=g_mean, g_var=g_var, mean_y=mean_y, **there)


def dither(g: Tensor, g_mean: Tensor | None, g_var: Tensor | None) -> float:
    """FACTOR of `incoming` where gy is rounded to g's dtype."""
    affine = g_mean is not None or g_var is not None
    return DITHER if affine and g.dtype != torch.float32 else 1.0
