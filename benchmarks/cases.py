"""The work that is timed: one layer or one network, in one form, for one pass, with its floor and its fp64 truth.

form   standalone  real tensor in, real tensor out: convolution, BatchNorm, activation
       chained     raw tensor in, raw tensor out, as inside a network: (pending BatchNorm, activation,) convolution,
                   statistics. Only mnops has it; its peers run the standalone layer beside it, which at stride 2 has its
                   BatchNorm on the small side, so the comparison leans to the peers
       network     images in, logits out
pass   train       forward and backward in training mode; for a network the whole step: loss and SGD update as well
       forward     forward in training mode (batch statistics), nothing kept
       backward    the backward alone
       infer       forward in eval mode
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import machine, stock

SHAPES = Path(__file__).parent / "shapes"
EPS = 1e-5
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class Layer(NamedTuple):
    """One line of shapes/*.csv; `count` is how often the network has it."""

    name: str
    op: str  # depthwise | pointwise | stem
    channels: int
    out_channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    act: str
    count: int


class Network(NamedTuple):
    """One line of shapes/networks.csv: a MobileNet."""

    name: str
    width: float
    size: int
    train_batch: int
    infer_batches: tuple[int, ...]


def layers(name: str) -> list[Layer]:
    with (SHAPES / f"{name}.csv").open(newline="") as file:
        return [Layer(*(int(v) if v.isdecimal() else v for v in line.values())) for line in csv.DictReader(file)]


def networks() -> list[Network]:
    with (SHAPES / "networks.csv").open(newline="") as file:
        return [Network(r["name"], float(r["width"]), int(r["size"]), int(r["train_batch"]),
                        tuple(map(int, r["infer_batches"].split()))) for r in csv.DictReader(file)]  # fmt: skip


@dataclass
class Step:
    """One contender's way of doing a case."""

    call: Callable[[int], Any]  # the work, on buffer i
    outputs: Callable[[], list[Tensor]]  # do it on buffer 0 and give what must agree with the truth
    forward: Callable[[], Any] | None = None  # the part of it that keeps tensors for the backward
    parameters: list[Tensor] = field(default_factory=list)


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
        return {"suite": self.suite, "case": c.name, "op": c.op, "form": self.form, "pass": self.phase,
                "batch": self.batch, "shape": f"{c.channels}x{c.height}x{c.width}->{c.out_channels} k{c.kernel} "
                f"s{c.stride} p{c.padding} d{c.dilation} {c.act}", "dtype": str(self.dtype)[6:], "count": c.count,
                "bytes": self.bytes, "flops": self.flops}  # fmt: skip

    @property
    def output_size(self) -> tuple[int, int]:
        c = self.layer
        reach = 2 * c.padding - c.dilation * (c.kernel - 1) - 1
        return (c.height + reach) // c.stride + 1, (c.width + reach) // c.stride + 1

    @property
    def groups(self) -> int:
        return self.layer.channels if self.layer.op == "depthwise" else 1

    @property
    def bytes(self) -> int:
        """Least traffic of the fused form: each tensor crosses memory once a pass that needs it (I in, O out)."""
        c = self.layer
        i = self.batch * c.channels * c.height * c.width
        o = self.batch * c.out_channels * math.prod(self.output_size)
        w = c.out_channels * c.channels // self.groups * c.kernel**2
        # a standalone layer comes back to its output: to normalise it, and for the sums its norm's backward starts from
        again = 0 if self.form == "chained" or self.phase == "infer" else 2 * o
        forward = i + o + again + w
        backward = (1 if c.op == "stem" else 2) * i + 2 * o + again + 3 * w  # the stem has no gradient to store
        wanted = {"train": forward + backward, "backward": backward}.get(self.phase, forward)
        return wanted * self.dtype.itemsize

    @property
    def flops(self) -> int:
        c = self.layer
        macs = self.batch * c.out_channels * math.prod(self.output_size) * (c.channels // self.groups) * c.kernel**2
        gradients = 1 if c.op == "stem" else 2
        return 2 * macs * {"train": 1 + gradients, "backward": gradients}.get(self.phase, 1)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return stock.randomize(self._new()).state_dict()

    def _new(self) -> nn.Sequential:
        c = self.layer
        return stock.conv_bn_act(c.channels, c.out_channels, c.kernel, c.stride, c.padding, c.dilation, self.groups, c.act)

    def module(self) -> nn.Sequential:
        """A stock module for each contender, all with the same weights."""
        module = self._new()
        module.load_state_dict(self.weights)
        module[0].to(self.dtype)  # BatchNorm stays fp32, as every mixed-precision recipe has it
        return module.train(self.phase != "infer")

    @property
    def differentiated(self) -> bool:
        return self.phase in ("train", "backward")

    def buffers(self, layout: str, device: str) -> list[tuple[Tensor, Tensor]]:
        """(x, gradient of y) as often as it takes to leave the cache between two visits to the same one."""
        c = self.layer
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.batch, c.channels, c.height, c.width, generator=generator)
        g = torch.randn(self.batch, c.out_channels, *self.output_size, generator=generator)
        place = dict(device=device, dtype=self.dtype, memory_format=FORMATS[layout])
        number = min(64, max(2, math.ceil(2 * machine.last_level_cache(device) / ((x.nbytes + g.nbytes) / 4 * self.dtype.itemsize))))
        leaf = self.differentiated and c.op != "stem"
        return [(x.to(**place, copy=True).requires_grad_(leaf), g.to(**place, copy=True)) for _ in range(number)]

    @lru_cache(2)  # contenders of a case ask in turn
    def truth(self, form: str) -> list[Tensor]:
        """The outputs of a step of `form`, computed in fp64 by stock PyTorch."""
        x, g = (t.detach().double() for t in self.buffers("NCHW", "cpu")[0])
        x.requires_grad_(self.differentiated and self.layer.op != "stem")
        module = self.module().double()
        if form == "chained":
            p = self.pending(x)
            y = self.link(x, module[0].weight, *p)
            return self._with_gradients(y, [x, module[0].weight, *(t for t in p if t is not None)], g)
        return self._with_gradients([module(x)], [x, *module.parameters()], g)

    def step(self, f: Callable[[Tensor], Tensor], parameters: Iterable[Tensor],
             buffers: list[tuple[Tensor, Tensor]]) -> Step:  # fmt: skip
        """The standalone layer as `f`."""
        return self._step(lambda x: [f(x)], list(parameters), buffers, [])

    def _step(self, f: Callable[[Tensor], list[Tensor]], wanted: list[Tensor], buffers: list[tuple[Tensor, Tensor]],
              incoming: list[Tensor]) -> Step:  # fmt: skip
        """`f` on the buffers in turn; its gradients go to x and to `wanted`, from g and `incoming`."""

        def forward(i: int) -> list[Tensor]:
            with torch.set_grad_enabled(self.differentiated):
                return f(buffers[i % len(buffers)][0])

        def gradients(i: int, y: list[Tensor], keep: bool = False) -> list[Tensor]:
            x, g = buffers[i % len(buffers)]
            into = [t for t in (x, *wanted) if t.requires_grad]
            return [*y, *torch.autograd.grad(y, into, [g, *incoming], retain_graph=keep)]

        if self.phase == "train":
            call = lambda i: gradients(i, forward(i))  # noqa: E731
        elif self.phase == "backward":
            graphs = [forward(i) for i in range(len(buffers))]
            call = lambda i: gradients(i, graphs[i % len(buffers)], keep=True)  # noqa: E731
        else:
            call = forward
        return Step(call, lambda: call(0), (lambda: forward(0)) if self.phase == "train" else None, wanted)

    # the chained form

    def pending(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """mean, var, gamma, beta of the norm that x waits for; the stem's image waits for none."""
        if self.layer.op == "stem":
            return None, None, None, None
        with torch.no_grad():
            mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False)
            generator = torch.Generator().manual_seed(2)
            gamma = 0.5 + torch.rand(len(mean), generator=generator)
            beta = torch.rand(len(mean), generator=generator) - 0.5
        kind = dict(device=x.device, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        return tuple(t.to(**kind).requires_grad_(self.differentiated) for t in (mean, var, gamma, beta))

    def link(self, x: Tensor, weight: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None,
             beta: Tensor | None) -> list[Tensor]:  # fmt: skip
        """y, mean of y, variance of y: the chained form written out in stock PyTorch."""
        c = self.layer
        if mean is not None:
            pre = (x - mean[:, None, None]) * ((var + EPS).rsqrt() * gamma)[:, None, None] + beta[:, None, None]
            x = stock.activation(c.act)(pre)
        y = F.conv2d(x, weight, None, c.stride, c.padding, c.dilation, self.groups)
        return [y] if self.phase == "infer" else [y, y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)]

    def incoming(self, g: Tensor) -> list[Tensor]:
        """Gradients of y, its mean and its variance."""
        generator = torch.Generator().manual_seed(3)
        kind = dict(device=g.device, dtype=torch.float64 if g.dtype == torch.float64 else torch.float32)
        return [g, *(torch.randn(self.layer.out_channels, generator=generator).to(**kind) for _ in range(2))]

    def chained_step(self, link: Callable[..., list[Tensor]], weight: Tensor, buffers: list[tuple[Tensor, Tensor]]) -> Step:
        """The chained layer as `link(x, weight, mean, var, gamma, beta) -> [y, mean, var]`."""
        pending = self.pending(buffers[0][0])
        wanted = [weight, *(t for t in pending if t is not None)]
        return self._step(lambda x: link(x, weight, *pending), wanted, buffers, self.incoming(buffers[0][1])[1:])

    def _with_gradients(self, outputs: list[Tensor], inputs: list[Tensor], g: Tensor) -> list[Tensor]:
        if self.differentiated:
            incoming = self.incoming(g)[: len(outputs)]
            outputs = outputs + list(torch.autograd.grad(outputs, [t for t in inputs if t.requires_grad], incoming))
        return [t.detach() for t in outputs]


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
        return {"suite": self.suite, "case": n.name, "op": "mobilenet_v1", "form": self.form, "pass": self.phase,
                "batch": self.batch, "shape": f"3x{n.size}x{n.size} width {n.width}", "dtype": str(self.dtype)[6:],
                "count": 1, "bytes": self.bytes, "flops": self.flops}  # fmt: skip

    @cached_property
    def layers(self) -> list[LayerCase]:
        """Every convolution in order."""
        size, width = self.network.size, lambda channels: round(channels * self.network.width)
        made = [Layer("", "stem", 3, width(32), size, size, 3, 2, 1, 1, "relu", 1)]
        for out, stride in [block for stage in stock.STAGES for block in stage]:
            channels, size = made[-1].out_channels, (made[-1].height - 1) // made[-1].stride + 1
            made.append(Layer("", "depthwise", channels, channels, size, size, 3, stride, 1, 1, "relu", 1))
            size = (size - 1) // stride + 1
            made.append(Layer("", "pointwise", channels, width(out), size, size, 1, 1, 0, 1, "relu", 1))
        return [LayerCase(layer, "chained", self.phase, self.batch, self.dtype) for layer in made]

    @property
    def bytes(self) -> int:
        """Training: the chained form. Inference: depthwise and pointwise of a block in one kernel."""
        if self.phase == "train":
            return sum(layer.bytes for layer in self.layers)
        # what does not leave the cache: written once, read once
        between = 2 * sum(math.prod(c.output_size) * c.layer.out_channels for c in self.layers if c.layer.op == "depthwise")
        return sum(layer.bytes for layer in self.layers) - between * self.batch * self.dtype.itemsize

    @property
    def flops(self) -> int:
        classifier = 2 * self.batch * self.layers[-1].layer.out_channels * 1000 * (3 if self.phase == "train" else 1)
        return sum(layer.flops for layer in self.layers) + classifier

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return stock.randomize(stock.StockMobileNet(self.network.width)).state_dict()

    def module(self, act: str = "relu") -> stock.StockMobileNet:
        module = stock.StockMobileNet(self.network.width, act=act)
        module.load_state_dict(self.weights)
        return module.train(self.phase != "infer")

    def buffers(self, layout: str, device: str) -> list[tuple[Tensor, Tensor]]:
        """(images, labels). One network step already moves far more than a cache holds."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.batch, 3, self.network.size, self.network.size, generator=generator)
        labels = torch.randint(1000, (self.batch,), generator=generator).to(device)
        # autocast casts the parameters of a half-precision network; its images come as fp32
        return [(x.to(device, memory_format=FORMATS[layout], copy=True), labels) for _ in range(2)]

    @lru_cache(2)
    def truth(self, form: str, act: str = "relu") -> list[Tensor]:
        x, labels = self.buffers("NCHW", "cpu")[0]
        module = self.module(act).double()
        step = self._step(module, module, [(x.double(), labels)], torch.float32)
        return step.outputs()

    def step(self, f: Callable[[Tensor], Tensor], module: nn.Module | None, buffers: list[tuple[Tensor, Tensor]]) -> Step:
        return self._step(f, module, buffers, self.dtype)

    def _step(self, f: Callable, module: nn.Module | None, buffers: list, dtype: torch.dtype) -> Step:
        parameters = [] if module is None else list(module.parameters())
        half = dtype in (torch.float16, torch.bfloat16)
        device = buffers[0][0].device.type

        def logits(i: int) -> Any:
            with torch.autocast(device, dtype, enabled=half):
                return f(buffers[i % len(buffers)][0])

        if self.phase == "infer":

            def call(i: int) -> Any:
                with torch.no_grad():
                    return logits(i)

            return Step(call, lambda: [call(0)], None, parameters)

        # a learning rate of 0 does all the work of the update, and leaves every round the same weights
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)

        def forward() -> Tensor:
            return F.cross_entropy(logits(0).float() if half else logits(0), buffers[0][1])

        def call(i: int) -> Any:
            optimizer.zero_grad(set_to_none=True)
            y = logits(i)
            loss = F.cross_entropy(y.float() if half else y, buffers[i % len(buffers)][1])
            loss.backward()
            optimizer.step()
            return y, loss

        def outputs() -> list[Tensor]:
            y, loss = call(0)
            return [y.detach(), loss.detach(), torch.cat([p.grad.flatten() for p in parameters])]

        return Step(call, outputs, forward, parameters)


Case = LayerCase | NetworkCase


def error(got: list[Any], truth: list[Tensor]) -> float:
    """Largest relative L2 error of any output; infinite where a shape or the number of outputs differs."""
    worst = 0.0 if len(got) == len(truth) else math.inf
    for a, b in zip(got, truth):
        a, b = torch.as_tensor(a).detach().double().cpu(), b.double()
        if a.shape != b.shape:
            return math.inf
        worst = max(worst, ((a - b).norm() / b.norm().clamp_min(1e-30)).nan_to_num(math.inf).item())
    return worst


# A relative L2 error under these is rounding. Activations that change side at zero move single gradients by their whole
# size, and 27 layers multiply that: for a network's gradients the check only catches what is plainly wrong (each op has
# tests of its own). The bound is also four times what stock PyTorch in NCHW is off on the same input.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def tolerance(case: Case, device: str) -> float:
    """The largest error that is not called wrong."""
    module = case.module().to(device)
    own = case.step(module, module if case.suite == "net" else module.parameters(), case.buffers("NCHW", device))
    rounding = TOLERANCE[case.dtype] * (10 if case.suite == "net" and case.phase == "train" else 1)
    return min(0.7, max(rounding, 4 * error(own.outputs(), case.truth("standalone"))))
