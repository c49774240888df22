"""bench kernels: the micro-kernels of each instruction set, called on NumPy arrays on one thread: no
torch dispatcher, no autograd, no thread pool. The list of instruction sets is the package's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from . import harness, shapes
from .harness import Options
from .layer_case import EPS, LayerCase
from .peers import PEERS, Peer, eager
from .step import Step


def run(options: Options) -> None:
    own = [
        KernelPeer(f"kernel-{name}", "NHWC", eager, "mnops", ("forward", "backward"))
        for name in instruction_sets()
    ]
    PEERS.update({peer.name: peer for peer in own})
    layers = [layer for layer in shapes.layers("mobilenet_v1") if layer.op in ("depthwise", "pointwise")]
    made = [
        LayerCase(layer, "chained", phase, 4, torch.float32, "kernels")
        for layer in (layers[:2] if options.results.stem.startswith("bench-quick") else layers)
        for phase in ("forward", "backward")
    ]
    harness.run(made, replace(options, threads=1, peers=tuple(peer.name for peer in reversed(own))))


def instruction_sets() -> list[str]:
    """Those that are built and that this CPU has, best last."""
    from mnops import _C

    return [c["name"] for c in _C.cpu_capabilities() if c["built"] and c["supported"]]


@dataclass(frozen=True)
class KernelPeer(Peer):
    def truth(self, case: LayerCase) -> list[Tensor]:
        return case.truth("chained")

    def backend(self, case: LayerCase, device: str) -> str:
        return f"mnops {self.name}"

    def build(self, case: LayerCase, device: str) -> Step:
        from mnops import _C

        c, isa = case.layer, self.name.removeprefix("kernel-")
        buffers = case.buffers("channels_last", device)
        weight = case.module()[0].weight
        pending = case.pending(buffers[0][0])
        norm = dict(zip(("mean", "var", "gamma", "beta"), map(array, pending)), eps=EPS, act=c.act)
        depthwise = c.op == "depthwise"
        where = (
            dict(stride=(c.stride,) * 2, padding=[c.padding] * 4, dilation=(c.dilation,) * 2)
            if depthwise
            else {}
        )
        w = array(weight)[:, 0] if depthwise else array(weight)[:, :, 0, 0]
        rows = nhwc if depthwise else lambda t: nhwc(t).reshape(-1, t.shape[1])
        sets = [(rows(x), rows(g)) for x, g in buffers]
        forward: Callable = getattr(_C, f"{c.op}_conv2d")
        backward: Callable = getattr(_C, f"{c.op}_conv2d_backward")
        y, mean, var = forward(isa, sets[0][0], w, norm, **where)
        g_mean, g_var = (array(t) for t in case.incoming(buffers[0][1]))

        def call(i: int) -> tuple[np.ndarray, ...]:
            x, g = sets[i % len(sets)]
            if case.phase == "forward":
                return forward(isa, x, w, norm, **where)
            return backward(isa, g, y, g_mean, g_var, mean, x, w, norm, **where)

        def outputs() -> list[Tensor]:
            given = (y, mean, var, *call(0)) if case.phase == "backward" else call(0)
            images = {0: buffers[0][1].shape, 3: buffers[0][0].shape}  # y and dx
            return [
                nchw(a, images[i])
                if i in images
                else torch.from_numpy(a).view(weight.shape if i == 4 else -1)
                for i, a in enumerate(given)
            ]

        return Step(call, outputs)


def array(t: Tensor) -> np.ndarray:
    return np.ascontiguousarray(t.detach().numpy())


def nhwc(t: Tensor) -> np.ndarray:
    return array(t.permute(0, 2, 3, 1))


def nchw(a: np.ndarray, shape: torch.Size) -> Tensor:
    n, c, h, w = shape
    return torch.from_numpy(a).view(n, h, w, c).permute(0, 3, 1, 2)
