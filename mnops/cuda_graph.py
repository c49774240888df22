"""A whole training or inference step as one CUDA graph: what is left of it when launching costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls: what is compiled, tuned or allocated on first use is there before the capture


class graph:
    """step as a CUDA graph: `step = mnops.graph(step)`, then `loss = step(images, labels)` as before.

    Every call does one step on the tensors it is given. The first WARM_UP calls run step itself; the next one
    captures it, and from then on a call copies its tensors to where the graph reads them and replays it. On
    CPU tensors step is called as it is.

    What a capture asks of step: no wait for the GPU (`.item()`, printing a loss), the same shapes at every
    call, and an optimizer that keeps its numbers on the GPU where it needs them (`capturable=True` for Adam;
    a learning rate that changes is a tensor). What it returns is overwritten by the next call: clone what is
    kept.

    Args:
        step: a function of tensors, for example forward, loss, backward and `optimizer.step()`, with
            `optimizer.zero_grad(set_to_none=True)` at its beginning.

    Raises (when called):
        TypeError, ValueError: with the rule and the value received, before anything ran.
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step
        self.calls = 0
        self.captured: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        for i, t in enumerate(inputs):
            if not isinstance(t, Tensor):
                raise TypeError(f"graph: a step is given tensors, got {type(t).__name__} as argument {i}")
        devices = {t.device for t in inputs}
        if all(d.type == "cpu" for d in devices) and (inputs or not torch.cuda.is_available()):
            return self.step(*inputs)
        if len(devices) > 1 or any(d.type != "cuda" for d in devices):
            raise ValueError(
                f"graph: all tensors must be on one GPU, got {', '.join(sorted(map(str, devices)))}"
            )
        with torch.cuda.device(next(iter(devices), None)):
            return self._run(inputs)

    def _run(self, inputs: tuple[Tensor, ...]) -> Any:
        if self.calls == 0:
            self.signature = [(tuple(t.shape), t.dtype, t.device) for t in inputs]
            self.stream = torch.cuda.Stream()
        signature = [(tuple(t.shape), t.dtype, t.device) for t in inputs]
        if signature != self.signature:
            raise ValueError(f"graph: shapes, dtypes and device must be {self.signature}, got {signature}")
        if self.calls < WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            self.calls += 1
            return outputs
        if self.captured is None:
            self.inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=self.stream):
                self.outputs = self.step(*self.inputs)
            self.captured = captured
        with torch.no_grad():
            for mine, given in zip(self.inputs, inputs):
                mine.copy_(given, non_blocking=True)
        self.captured.replay()
        return self.outputs
