"""A step of work as one contender does it, and how its results are judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
Buffers = list[tuple[Tensor, Tensor]]  # layers: (x, gradient of y); networks: (images, labels)


@dataclass
class Step:
    call: Callable[[int], Any]  # the work, on buffer i
    outputs: Callable[[], list[Tensor]]  # do it on buffer 0 and give what must agree with the truth
    forward: Callable[[], Any] | None = None  # the part of it that keeps tensors for the backward
    parameters: list[Tensor] = field(default_factory=list)
    buffers: int = 2  # of which call takes number i modulo this


def error(got: list[Any], truth: list[Tensor]) -> float:
    """Largest relative L2 error of any output; infinite where a shape or the number of outputs differs."""
    if len(got) != len(truth):
        return math.inf
    worst = 0.0
    for a, b in zip(got, truth):
        b = b.double()
        a = torch.as_tensor(a).detach().to(b.device, torch.float64)
        if a.shape != b.shape:
            return math.inf
        worst = max(worst, ((a - b).norm() / b.norm().clamp_min(1e-30)).nan_to_num(math.inf).item())
    return worst


# A relative L2 error under these is rounding. Activations that change side at zero move single gradients by
# their whole size, and 27 layers multiply that: for a network's gradients the check only catches what is
# plainly wrong (each op has tests of its own). Twice what stock PyTorch in NCHW is off on the same input is
# right as well.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def tolerance(case: Any, device: str) -> float:
    """The largest error of `case` that is not called wrong."""
    module = case.module().to(device)
    stock = case.step(module, list(module.parameters()), case.buffers("NCHW", device))
    rounding = TOLERANCE[case.dtype] * (10 if case.suite == "net" and case.phase == "train" else 1)
    return max(rounding, 2 * error(stock.outputs(), case.truth()))
