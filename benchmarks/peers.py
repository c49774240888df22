"""The contenders: mnops, and everything a user might run instead, each used the way its users use it.

A new peer is one entry of PEERS: how it turns a stock module into something callable, and where it does not
serve.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import machine
from .layer_case import EPS, LayerCase
from .network_case import NetworkCase, TorchvisionCase
from .step import FORMATS, Step

Case = LayerCase | NetworkCase
Prepare = Callable[[nn.Module, Tensor], Callable[[Tensor], Any]]


class Absent(Exception):
    """This peer cannot run here, and why."""


@dataclass(frozen=True)
class Peer:
    name: str
    layout: str  # of the input it is given
    prepare: Prepare  # (module, example input) -> callable
    package: str = "torch"
    passes: tuple[str, ...] = ("train", "forward", "backward", "infer")
    cpu_fp32_only: bool = False

    def why_not(self, case: Case, device: str) -> str | None:
        """None if this peer does `case`, else the reason in words."""
        if case.phase not in self.passes:
            return f"does {' and '.join(self.passes)} only"
        if self.cpu_fp32_only and (device != "cpu" or case.dtype != torch.float32):
            return "is run for fp32 on the CPU only"
        return missing(self.package)

    def build(self, case: Case, device: str) -> Step:
        module = case.module().to(device, memory_format=FORMATS[self.layout])
        buffers = case.buffers(self.layout, device)
        f = self.prepare(module, buffers[0][0])
        return case.step(f, list(module.parameters()), buffers)

    def truth(self, case: Case) -> list[Tensor]:
        return case.truth()

    def backend(self, case: Case, device: str) -> str:
        """The library that does the work, with its version."""
        return f"{self.package} {importlib.metadata.version(self.package)}"


def missing(package: str) -> str | None:
    """None if `package` imports, else why not."""
    try:
        if package == "timm":
            machine.import_torchvision()
        importlib.import_module(package)
    except Exception as e:  # a broken package raises anything
        return f"needs the package {package} ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
    return None


# PyTorch


def eager(module: nn.Module, x: Tensor) -> Callable:
    return module


def compiled(mode: str | None = None) -> Prepare:
    return lambda module, x: torch.compile(module, mode=mode, dynamic=False)


def frozen(module: nn.Module, x: Tensor) -> Callable:
    """Compiled with the weights as constants: folded into the convolutions and packed for them."""
    f = torch.compile(module, dynamic=False)
    first = [torch._inductor.config.patch(freezing=True)]  # dynamo, too, looks at this while it compiles

    def run(x: Tensor) -> Tensor:
        with first.pop() if first else contextlib.nullcontext():
            return f(x)

    return run


# Other runtimes: inference from an exported graph, BatchNorm folded by their own optimizers


def onnxruntime(module: nn.Module, x: Tensor) -> Callable:
    import onnxruntime as ort

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), file, dynamo=False, input_names=["x"])
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})[0]


def openvino(module: nn.Module, x: Tensor) -> Callable:
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = ov.convert_model(module, example_input=x, input=list(x.shape))
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: request.infer([x.numpy()], share_inputs=True)[0]


def executorch(module: nn.Module, x: Tensor) -> Callable:
    """XNNPACK, which PyTorch reaches through ExecuTorch."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lowered = to_edge_transform_and_lower(
            torch.export.export(module, (x,)), partitioner=[XnnpackPartitioner()]
        )
    program = Runtime.get().load_program(lowered.to_executorch().buffer)
    method = program.load_method("forward")

    def run(x: Tensor, owner: Any = program) -> Tensor:  # a method does not keep its program alive
        return method.execute([x])[0]

    return run


# timm


class Timm(Peer):
    """timm's own network. It has ReLU6, which costs what ReLU does; its truth has it too."""

    def why_not(self, case: Case, device: str) -> str | None:
        if type(case) is not NetworkCase or case.network.width != 1.0:
            return "has the whole network at width 1.0 only"
        return super().why_not(case, device)

    def build(self, case: Case, device: str) -> Step:
        machine.import_torchvision()  # which timm imports
        from timm import create_model

        module = create_model("mobilenetv1_100")
        module.load_state_dict(case.weights)
        module = module.train(case.phase != "infer").to(device, memory_format=FORMATS[self.layout])
        return case.step(module, list(module.parameters()), case.buffers(self.layout, device))

    def truth(self, case: Case) -> list[Tensor]:
        return case.truth("relu6")


# mnops


@dataclass(frozen=True)
class Mnops(Peer):
    """mnops itself: `forced` names a backend, `options` go to mnops.MobileNet, `deploy`: others are, for inference."""

    forced: str | None = None
    deploy: bool = True
    options: tuple[tuple[str, Any], ...] = ()

    def why_not(self, case: Case, device: str) -> str | None:
        if self.options and type(case) is not NetworkCase:
            return "is an option of mnops.MobileNet"
        if not self.deploy and not isinstance(case, TorchvisionCase):
            return "is a fused network, not deployed"
        if case.suite == "ops" and case.layer.op == "stem" and case.form == "standalone":
            return "has the stem in the chained form only"
        return super().why_not(case, device) or self._unserved(case, device)

    def _unserved(self, case: Case, device: str) -> str | None:
        import mnops
        from mnops import backends

        unknown = [
            name for name, _ in self.options if name not in inspect.signature(mnops.MobileNet).parameters
        ]
        if unknown:
            return f"needs an mnops whose MobileNet has {unknown[0]}"
        if self.forced and self.forced not in backends.BACKENDS:
            return f"needs an mnops with the backend {self.forced}"
        reason = self.forced and backends.why_not(self.forced, f"{_op(case)}_conv2d", device)
        return f"needs the backend {self.forced}: {reason}" if reason else None

    def build(self, case: Case, device: str) -> Step:
        with self._backend():
            step = self._build(case, device)
        if not self.forced:
            return step

        def within(f: Callable | None) -> Callable | None:
            def run(*args: Any) -> Any:
                with self._backend():
                    return f(*args)

            return f and run

        return replace(
            step, call=within(step.call), outputs=within(step.outputs), forward=within(step.forward)
        )

    def truth(self, case: Case) -> list[Tensor]:
        return case.truth() if case.suite == "net" else case.truth(case.form)

    def backend(self, case: Case, device: str) -> str:
        from mnops import backends

        chosen = backends.choose(f"{_op(case)}_conv2d", device)
        return "mnops " + (
            self.forced or next(b.name for b in backends.BACKENDS.values() if b.namespace == chosen)
        )

    @contextlib.contextmanager
    def _backend(self) -> Iterator[None]:
        import mnops

        with mnops.backend(self.forced) if self.forced else contextlib.nullcontext():
            yield

    def _build(self, case: Case, device: str) -> Step:
        import mnops

        buffers = case.buffers(self.layout, device)
        if case.suite == "ops" and case.form == "chained":
            return case.chained_step(
                _link(case), case.module()[0].weight.to(device).requires_grad_(), buffers
            )
        if isinstance(case, TorchvisionCase):
            module = mnops.fuse(case.module())
            if case.phase == "infer" and self.deploy:
                module = mnops.deploy(module)
        elif case.suite == "net":
            module = mnops.MobileNet(width_mult=case.network.width, **dict(self.options))
            module.load_state_dict(case.weights)
        else:
            module = Fused(case.module(), case)
        module = module.train(case.phase != "infer").to(device, memory_format=FORMATS[self.layout])
        return case.step(self.prepare(module, buffers[0][0]), list(module.parameters()), buffers)


def _op(case: Case) -> str:
    """The op whose backend stands for the case."""
    return "depthwise" if case.suite == "net" else case.layer.op


class Fused(nn.Module):
    """A stock conv-BN-act run through mnops' function."""

    def __init__(self, stock: nn.Sequential, case: LayerCase):
        super().__init__()
        self.stock, self.op, self.act = stock, case.layer.op, case.layer.act
        c = case.layer
        self.where = (
            dict(stride=c.stride, padding=c.padding, dilation=c.dilation) if c.op == "depthwise" else {}
        )

    def forward(self, x: Tensor) -> Tensor:
        import mnops

        conv, bn = self.stock[0], self.stock[1]
        f = mnops.depthwise_conv_bn_act if self.op == "depthwise" else mnops.pointwise_conv_bn_act
        return f(
            x,
            conv.weight,
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            training=self.training,
            momentum=bn.momentum,
            eps=bn.eps,
            act=self.act,
            **self.where,
        )


def _link(case: LayerCase) -> Callable[..., list[Tensor]]:
    import mnops

    c, measure = case.layer, case.phase != "infer"
    op = getattr(mnops.ops, f"{c.op}_conv2d")
    where = {
        "depthwise": dict(stride=c.stride, padding=c.padding, dilation=c.dilation),
        "stem": dict(stride=c.stride, padding=c.padding),
        "pointwise": {},
    }[c.op]

    def link(x: Tensor, weight: Tensor, *norm: Tensor | None) -> list[Tensor]:
        given = x if norm[0] is None else mnops.Pending(x, *norm, EPS, c.act)
        return list(op(given, weight, measure=measure, **where))[: 3 if measure else 1]

    return link


COMPILED = (
    "train",
    "forward",
    "infer",
)  # a compiled backward gives its buffers away, and cannot be run twice

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Mnops("mnops", "channels_last", eager, "mnops"),
        Mnops("mnops-nchw", "NCHW", eager, "mnops"),
        Mnops("mnops-compile", "channels_last", compiled(), "mnops"),
        Mnops("mnops-recompute", "channels_last", eager, "mnops", ("train",), options=(("recompute", True),)),
        Mnops("mnops-fused", "channels_last", eager, "mnops", ("infer",), deploy=False),
        Mnops("mnops-reference", "channels_last", eager, "mnops", forced="reference"),
        Mnops("mnops-cuda", "channels_last", eager, "mnops", forced="cuda"),
        Mnops("mnops-triton", "channels_last", eager, "mnops", forced="triton"),
        Peer("torch-nchw", "NCHW", eager),
        Peer("torch-channels_last", "channels_last", eager),
        Peer("torch-compile", "channels_last", compiled(), passes=COMPILED),
        Peer("torch-compile-nchw", "NCHW", compiled(), passes=COMPILED),
        Peer("torch-compile-max", "channels_last", compiled("max-autotune-no-cudagraphs"), passes=COMPILED),
        Peer("torch-frozen", "channels_last", frozen, passes=("infer",)),
        Timm("timm", "channels_last", eager, "timm"),
        Peer("onnxruntime", "NCHW", onnxruntime, "onnxruntime", ("infer",), True),
        Peer("openvino", "NCHW", openvino, "openvino", ("infer",), True),
        Peer("xnnpack", "NCHW", executorch, "executorch", ("infer",), True),
    )
}
MINE = [name for name in PEERS if name.startswith("mnops")]
