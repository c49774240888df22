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

INTERPRETED_MULTIPROCESSORS = 2  # enough for a second stage with something to merge
ASSUMED_MULTIPROCESSORS = 132  # H100, H200: for code compiled ahead on a machine without a GPU


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
def recorded() -> Iterator[list[Launch]]:
    """Within, nothing is launched; the list tells what would have been. For meta tensors."""
    before, _state.record = _state.record, []
    try:
        yield _state.record
    finally:
        _state.record = before


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
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_MULTIPROCESSORS
    if device.type != "cuda" or not torch.cuda.is_available():
        return ASSUMED_MULTIPROCESSORS
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def out_size(
    height: int, width: int, kernel: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
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
