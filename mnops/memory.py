"""The memory that results on the CPU lie in is kept between calls (csrc/cpu/memory.h says why)."""

import contextlib
from collections.abc import Iterator

import torch


def empty_cache() -> None:
    """Gives the memory that no tensor uses back to the system, as ``torch.cuda.empty_cache`` does on a GPU.

    Results of 64 KiB or more on the CPU lie in memory of mnops' own, which stays with the process and is used again:
    about as much as was once in use at the same time. ``MNOPS_KEEP_MEMORY=0`` in the environment, and torch before
    2.11, take all memory from torch instead; then this does nothing.
    """
    torch.ops.mnops.empty_cache()


@contextlib.contextmanager
def from_torch() -> Iterator[None]:
    """Results take their memory from torch meanwhile, where ``torch.profiler`` (``profile_memory=True``) sees it."""
    before = torch.ops.mnops.keep_memory(False)
    try:
        yield
    finally:
        torch.ops.mnops.keep_memory(before)
