"""Which tile: the first of an op's short list, or with MNOPS_AUTOTUNE=1 the fastest one, measured once and
kept.

What is measured is kept per GPU, Triton version, op, dtype and shape without the batch, in memory and in
~/.cache/mnops/tiles.json ($XDG_CACHE_HOME): a new batch size is no new question. While a CUDA graph is
captured or a compiler is looking, nothing is measured, and what is known is taken.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from mnops.triton.launch import observed

SWITCH = "MNOPS_AUTOTUNE"


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnops" / "tiles.json"


@functools.cache
def _known() -> dict[str, str]:
    """What was measured: key to tile, as it is printed."""
    try:
        return json.loads(_file().read_text())
    except (OSError, ValueError):  # none yet, or not ours
        return {}


def _keep(key: str, tile: Any) -> None:
    _known()[key] = str(tile)
    file = _file()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(_known(), indent=0))
    os.replace(partial, file)  # another process sees the old file or the new


def _milliseconds(call: Callable[[], Any]) -> float:
    try:
        return triton.testing.do_bench(call, return_mode="median")
    except triton.runtime.errors.OutOfResources:  # a tile for a larger GPU
        return float("inf")


def best(
    op: str, shape: Sequence[Any], x: Tensor, candidates: Sequence[Any], run: Callable[[Any], Any]
) -> Any:
    """The tile for `run(tile)`, one of `candidates`, the first guess first."""
    if os.environ.get(SWITCH) != "1" or x.device.type != "cuda" or len(candidates) == 1:
        return candidates[0]
    name = torch.cuda.get_device_name(x.device)
    key = " ".join(str(part) for part in (name, triton.__version__, op, *shape))
    kept = {str(tile): tile for tile in candidates}.get(_known().get(key, ""))
    if kept is None:
        if observed() or torch.cuda.is_current_stream_capturing():
            return candidates[0]
        times = [_milliseconds(functools.partial(run, tile)) for tile in candidates]
        kept = candidates[times.index(min(times))]
        _keep(key, kept)
    return kept
