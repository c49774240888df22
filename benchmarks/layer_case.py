"""One layer as a benchmark: its floor, its truth in fp64, and a step of it.

form   standalone  real tensor in, real tensor out: convolution, BatchNorm, activation
       chained     raw tensor in, raw tensor out, as inside a network: pending BatchNorm and activation,
                   convolution, statistics. Only mnops has it; its peers run the standalone layer beside it,
                   whose BatchNorm is on the small side at stride 2, so the comparison leans to the peers
pass   train       forward and backward in training mode
       forward     forward in training mode (batch statistics), nothing kept
       backward    the backward alone
       infer       forward in eval mode
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import machine, stock
from .shapes import Layer
from .step import FORMATS, Buffers, Step

EPS = 1e-5
MOST_BUFFERS = 64  # tiny layers stay in cache rather than take gigabytes of copies


@dataclass(frozen=True)
class LayerCase:
    layer: Layer
    form: str
    phase: str
    batch: int
    dtype: torch.dtype
    suite: str = "ops"

    @property
    def columns(self) -> dict[str, Any]:
        c = self.layer
        shape = f"{c.channels}x{c.height}x{c.width}->{c.out_channels} k{c.kernel} s{c.stride} p{c.padding}"
        work = dict(suite=self.suite, case=c.name, op=c.op, form=self.form, batch=self.batch, count=c.count)
        size = dict(shape=f"{shape} d{c.dilation} {c.act}", dtype=str(self.dtype)[6:])
        return {**work, **size, "pass": self.phase, "bytes": self.bytes, "flops": self.flops}

    @property
    def differentiated(self) -> bool:
        return self.phase in ("train", "backward")

    @property
    def groups(self) -> int:
        return self.layer.channels if self.layer.op == "depthwise" else 1

    @property
    def output_size(self) -> tuple[int, int]:
        c = self.layer
        reach = 2 * c.padding - c.dilation * (c.kernel - 1) - 1
        return (c.height + reach) // c.stride + 1, (c.width + reach) // c.stride + 1

    @property
    def bytes(self) -> int:
        """Least traffic of the fused form: each tensor crosses memory once a pass that needs it."""
        c = self.layer
        i = self.batch * c.channels * c.height * c.width
        o = self.batch * c.out_channels * math.prod(self.output_size)
        w = c.out_channels * c.channels // self.groups * c.kernel**2
        # a standalone layer comes back to its output twice: to normalise it, and to start its norm's backward
        # from two sums over it
        again = 0 if self.form == "chained" or self.phase == "infer" else 2 * o
        forward = i + o + again + w
        backward = (1 if c.op == "stem" else 2) * i + 2 * o + again + 3 * w  # an image needs no gradient
        elements = {"train": forward + backward, "backward": backward}.get(self.phase, forward)
        return elements * self.dtype.itemsize

    @property
    def flops(self) -> int:
        c = self.layer
        filter_macs = c.channels // self.groups * c.kernel**2
        macs = self.batch * c.out_channels * math.prod(self.output_size) * filter_macs
        gradients = 1 if c.op == "stem" else 2
        return 2 * macs * {"train": 1 + gradients, "backward": gradients}.get(self.phase, 1)

    # what every contender is given: the same weights, the same inputs

    def _new(self) -> nn.Sequential:
        c = self.layer
        shape = (c.channels, c.out_channels, c.kernel, c.stride, c.padding, c.dilation, self.groups)
        return stock.conv_bn_act(*shape, c.act)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return stock.randomize(self._new()).state_dict()

    def module(self) -> nn.Sequential:
        """A new stock module."""
        module = self._new()
        module.load_state_dict(self.weights)
        module[0].to(self.dtype)  # BatchNorm stays fp32, as every mixed-precision recipe has it
        return module.train(self.phase != "infer")

    def buffers(self, layout: str, device: str) -> Buffers:
        """(x, gradient of y), as many as it takes to leave the cache between two visits to the same one."""
        c = self.layer
        draw = machine.drawn(1)  # where that takes no seconds
        x = draw(self.batch, c.channels, c.height, c.width)
        g = draw(self.batch, c.out_channels, *self.output_size)
        pair = (x.numel() + g.numel()) * self.dtype.itemsize
        number = min(MOST_BUFFERS, max(2, math.ceil(2 * machine.last_level_cache(device) / pair)))
        leaf = self.differentiated and c.op != "stem"

        def place(t: Tensor) -> Tensor:
            return t.to(device, self.dtype, memory_format=FORMATS[layout], copy=True)

        return [(place(x).requires_grad_(leaf), place(g)) for _ in range(number)]

    def pending(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """mean, var, gamma, beta of the norm that x waits for; the stem's image waits for none."""
        if self.layer.op == "stem":
            return None, None, None, None
        with torch.no_grad():
            mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False)
            generator = torch.Generator().manual_seed(2)
            gamma = 0.5 + torch.rand(len(mean), generator=generator)
            beta = torch.rand(len(mean), generator=generator) - 0.5
        return tuple(vector(t, x).requires_grad_(self.differentiated) for t in (mean, var, gamma, beta))

    def incoming(self, g: Tensor) -> list[Tensor]:
        """Gradients of the mean and the variance of y."""
        generator = torch.Generator().manual_seed(3)
        return [vector(torch.randn(self.layer.out_channels, generator=generator), g) for _ in range(2)]

    # what they do with it

    def step(self, f: Callable[[Tensor], Tensor], parameters: list[Tensor], buffers: Buffers) -> Step:
        """The standalone layer as `f`."""
        return self._step(lambda x: [f(x)], parameters, buffers, [])

    def chained_step(self, link: Callable[..., list[Tensor]], weight: Tensor, buffers: Buffers) -> Step:
        """The chained layer as `link(x, weight, mean, var, gamma, beta) -> [y, mean, var]`."""
        pending = self.pending(buffers[0][0])
        wanted = [weight, *(t for t in pending if t is not None)]
        incoming = [] if self.phase == "infer" else self.incoming(buffers[0][1])
        return self._step(lambda x: link(x, weight, *pending), wanted, buffers, incoming)

    def _step(
        self,
        f: Callable[[Tensor], list[Tensor]],
        wanted: list[Tensor],
        buffers: Buffers,
        incoming: list[Tensor],
    ) -> Step:
        """`f` on the buffers in turn; its gradients go to x and to `wanted`, from g and `incoming`."""

        def forward(i: int) -> list[Tensor]:
            with torch.set_grad_enabled(self.differentiated):
                return f(buffers[i % len(buffers)][0])

        def backward(i: int, y: list[Tensor], keep: bool = False) -> list[Tensor]:
            x, g = buffers[i % len(buffers)]
            into = [t for t in (x, *wanted) if t.requires_grad]
            return [*y, *torch.autograd.grad(y, into, [g, *incoming], retain_graph=keep)]

        if self.phase == "train":
            train = lambda i: backward(i, forward(i))  # noqa: E731
            return Step(train, lambda: train(0), lambda: forward(0), wanted, len(buffers))
        if self.phase == "backward":
            graphs = [forward(i) for i in range(len(buffers))]
            again = lambda i: backward(i, graphs[i % len(graphs)], keep=True)  # noqa: E731
            return Step(again, lambda: again(0), buffers=len(buffers))
        return Step(forward, lambda: forward(0), buffers=len(buffers))

    def truth(self, form: str = "standalone") -> list[Tensor]:
        """The outputs of a step of `form`, computed in fp64 by stock PyTorch."""
        return _truth(self, form)


@lru_cache(2)  # the contenders of a case ask one after the other
def _truth(case: LayerCase, form: str) -> list[Tensor]:
    device = machine.fastest()
    x, g = case.buffers("NCHW", device)[0]
    buffers = [(x.detach().double().requires_grad_(x.requires_grad), g.double())]
    module = case.module().to(device).double()
    if form == "standalone":
        step = case.step(module, list(module.parameters()), buffers)
    else:
        step = case.chained_step(stock_link(case), module[0].weight, buffers)
    return [t.detach() for t in step.outputs()]


def stock_link(case: LayerCase) -> Callable[..., list[Tensor]]:
    """The chained form written out in stock PyTorch."""
    c, act = case.layer, stock.activation(case.layer.act)

    def link(x: Tensor, weight: Tensor, *norm: Tensor | None) -> list[Tensor]:
        if norm[0] is not None:
            mean, var, gamma, beta = (t[:, None, None] for t in norm)
            x = act((x - mean) * (var + EPS).rsqrt() * gamma + beta)
        y = F.conv2d(x, weight, None, c.stride, c.padding, c.dilation, case.groups)
        return [y] if case.phase == "infer" else [y, y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)]

    return link


def vector(t: Tensor, like: Tensor) -> Tensor:
    """A channel vector for a tensor: fp32, or fp64 beside fp64."""
    return t.to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
