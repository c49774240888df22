"""A whole network as a benchmark: MobileNet, or one of torchvision's or timm's.

pass   train   forward, cross-entropy, backward, SGD update
       infer   forward in eval mode
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import machine, stock
from .layer_case import LayerCase
from .shapes import Layer, Network
from .step import FORMATS, Buffers, Step

CLASSES = 1000


@dataclass(frozen=True)
class NetworkCase:
    network: Network
    phase: str
    batch: int
    dtype: torch.dtype
    suite = "net"
    form = "network"

    @property
    def columns(self) -> dict[str, Any]:
        n = self.network
        work = dict(
            suite=self.suite, case=n.name, op="mobilenet_v1", form=self.form, batch=self.batch, count=1
        )
        size = dict(shape=f"3x{n.size}x{n.size} width {n.width}", dtype=str(self.dtype)[6:])
        return {**work, **size, "pass": self.phase, "bytes": self.bytes, "flops": self.flops}

    @cached_property
    def layers(self) -> list[LayerCase]:
        """Every convolution, in order."""
        width, size = self.network.width, self.network.size
        made = [Layer("stem", "stem", 3, round(32 * width), size, size, 3, 2, 1, 1, "relu", 1)]
        size = (size + 1) // 2
        for out, stride in (block for stage in stock.STAGES for block in stage):
            c = made[-1].out_channels
            made.append(Layer("dw", "depthwise", c, c, size, size, 3, stride, 1, 1, "relu", 1))
            size = (size + stride - 1) // stride
            made.append(Layer("pw", "pointwise", c, round(out * width), size, size, 1, 1, 0, 1, "relu", 1))
        return [LayerCase(layer, "chained", self.phase, self.batch, self.dtype) for layer in made]

    @property
    def bytes(self) -> int:
        """Training: the chained form. Inference: depthwise and pointwise of a block in one kernel, so that
        what is between them is neither written nor read."""
        total = sum(layer.bytes for layer in self.layers)
        if self.phase == "train":
            return total
        between = (
            math.prod(c.output_size) * c.layer.channels for c in self.layers if c.layer.op == "depthwise"
        )
        return total - 2 * sum(between) * self.batch * self.dtype.itemsize

    @property
    def flops(self) -> int:
        classifier = 2 * self.batch * self.layers[-1].layer.out_channels * CLASSES
        return sum(layer.flops for layer in self.layers) + classifier * (3 if self.phase == "train" else 1)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return stock.randomize(stock.StockMobileNet(self.network.width, CLASSES)).state_dict()

    def module(self, act: str = "relu") -> stock.StockMobileNet:
        """A new stock network."""
        module = stock.StockMobileNet(self.network.width, CLASSES, act)
        module.load_state_dict(self.weights)
        return module.train(self.phase != "infer")

    def buffers(self, layout: str, device: str) -> Buffers:
        """(images, labels), fp32: autocast makes a half-precision network of it. Two are enough, as a step
        moves more than a cache holds."""
        x = machine.drawn(1)(self.batch, 3, self.network.size, self.network.size)
        labels = torch.randint(CLASSES, (self.batch,), generator=torch.Generator().manual_seed(2)).to(device)
        return [(x.to(device, memory_format=FORMATS[layout], copy=True), labels) for _ in range(2)]

    def step(self, f: Callable[[Tensor], Tensor], parameters: list[Tensor], buffers: Buffers) -> Step:
        """The network as `f`."""
        device, half = buffers[0][0].device.type, self.dtype in (torch.float16, torch.bfloat16)

        def logits(i: int) -> Any:
            with torch.autocast(device, self.dtype, enabled=half):
                return f(buffers[i % len(buffers)][0])

        def infer(i: int) -> Any:
            with torch.no_grad():
                return logits(i)

        if self.phase == "infer":
            return Step(infer, lambda: [infer(0)], None, parameters)
        # a learning rate of 0 does all the work of an update, and leaves every round the same weights
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)

        def forward(i: int = 0) -> tuple[Tensor, Tensor]:
            y = logits(i)
            return y, F.cross_entropy(y.float() if half else y, buffers[i % len(buffers)][1])

        def train(i: int) -> tuple[Tensor, Tensor]:
            optimizer.zero_grad(set_to_none=True)
            y, loss = forward(i)
            loss.backward()
            optimizer.step()
            return y, loss

        def outputs() -> list[Tensor]:
            y, loss = train(0)
            return [y.detach(), loss.detach(), torch.cat([p.grad.flatten() for p in parameters])]

        return Step(train, outputs, forward, parameters)

    def truth(self, act: str = "relu") -> list[Tensor]:
        """Logits, and in training the loss and every gradient, computed in fp64 by stock PyTorch."""
        return _truth(self, act)


@dataclass(frozen=True)
class TorchvisionCase(NetworkCase):
    """torchvision's network of that name, or of timm/NAME. What it draws at random is left out: all agree."""

    @property
    def columns(self) -> dict[str, Any]:
        return {**super().columns, "op": self.network.name, "shape": f"3x{self.network.size}x{self.network.size}"}

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return self._empty().state_dict()

    def _empty(self) -> nn.Module:
        machine.import_torchvision()
        library, _, name = self.network.name.rpartition("/")
        if library == "timm":
            import timm

            module = timm.create_model(name, drop_rate=0.0)
        else:
            import torchvision

            module = torchvision.models.get_model(name)
        for child in module.modules():
            if hasattr(child, "p"):  # dropout, stochastic depth
                child.p = 0.0
        return module

    def module(self, act: str = "relu") -> nn.Module:
        module = self._empty()
        module.load_state_dict(self.weights)
        return module.train(self.phase != "infer")

    @cached_property
    def work(self) -> tuple[int, int]:
        """Elements that go into and come out of all convolutions, and FLOPs, of one forward."""
        moved = []
        module = self.module().eval()
        for child in module.modules():
            if isinstance(child, nn.Conv2d):
                child.register_forward_hook(lambda m, args, out: moved.append(args[0].numel() + out.numel()))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.empty(1, 3, self.network.size, self.network.size))
        return self.batch * sum(moved), self.batch * counter.get_total_flops()

    @property
    def bytes(self) -> int:
        """Every convolution reads its input and writes its output; backward g, y, x and dx: the chained form."""
        return self.work[0] * self.dtype.itemsize * (3 if self.phase == "train" else 1)

    @property
    def flops(self) -> int:
        return self.work[1] * (3 if self.phase == "train" else 1)


@lru_cache(2)
def _truth(case: NetworkCase, act: str) -> list[Tensor]:
    device = machine.fastest()
    module = case.module(act).to(device).double()
    exact = replace(case, dtype=torch.float64)
    x, labels = case.buffers("NCHW", device)[0]
    return [
        t.detach() for t in exact.step(module, list(module.parameters()), [(x.double(), labels)]).outputs()
    ]
