"""mnops.fuse: the fused kernels for a network that somebody already has.

Only convolutions change: those that an op serves and a BatchNorm follows become a subclass that computes the
same by mnops and returns a LazyTensor (mnops/lazy.py), at which the model's own BatchNorm and activation are
noted and left to the next fused convolution. Parameters, buffers, children and hooks stay where they are.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mnops import backends, compiled, lazy, ops, sync
from mnops.lazy import LazyTensor, real
from mnops.nn import BATCH_NORMS, served_by, statistics
from mnops.ops import Pending
from mnops.ops._contract import DTYPES, norm_args

__all__ = ["FusionReport", "fuse", "fusion_report", "unfuse"]


class Conv2d(nn.Conv2d):
    """What fuse makes of an nn.Conv2d, by its class alone: same parameters, same output, a LazyTensor."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if backends.recording(x):
            return super().forward(x)
        weight, bias = self.weight, self.bias  # once: a parametrised one is computed at every look
        op, traced = served_by(self), torch.compiler.is_compiling()
        why = _why_stock(self, op, x, weight, traced)
        if why is not None:
            if not traced:
                lazy.fell_back(self.__dict__.get("mnops_name", ""), why)
            return self._conv_forward(x, weight, bias)
        return (_convolve_traced if traced else _convolve)(self, op, x, weight, bias)


class SyncBatchNorm(nn.SyncBatchNorm):
    """What fuse makes of an nn.SyncBatchNorm: synchronises what a fused convolution measured."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        raw = x.raw if type(x) is LazyTensor and lazy.unchanged(x) else None
        if raw is None or raw.mean is None or sync.group_of(self) is None:
            return super().forward(x)
        lazy.take(x)
        if self.running_var is not None:
            lazy.settle(self.running_var)
        mean, var = statistics(self, *raw, measured=True)
        norm = norm_args(raw.y, mean, var, self.weight, self.bias, self.eps, "none")
        return LazyTensor(Pending(raw.y, *norm), x.nchw, x.source)


FUSED = {nn.Conv2d: Conv2d, nn.SyncBatchNorm: SyncBatchNorm}
STOCK = {fused: stock for stock, fused in FUSED.items()}


def _why_stock(conv: nn.Conv2d, op: str | None, x: Tensor, weight: Tensor, traced: bool) -> str | None:
    """Why this call is stock's, or None: what the ops do not take, and what is to raise stock's errors."""
    if not traced and type(x) is LazyTensor and x.pending is not None:
        x = x.pending.x  # of the same shape, dtype and device, and quicker to ask
    if type(x) not in lazy.PLAIN:
        return f"its input is a {type(x).__name__}"
    if type(weight) not in lazy.PLAIN:
        return f"its weight is a {type(weight).__name__}"
    shape, dtype, device = x.shape, x.dtype, x.device
    if len(shape) != 4 or shape[1] != conv.in_channels or x.numel() == 0:
        return f"its input has shape {tuple(shape)}"
    if device != weight.device or dtype not in DTYPES:
        return f"its input is {dtype} on {device}, its weight on {weight.device}"
    device = device.type
    if op is None:
        return "no op serves its geometry any more"
    if not backends.chosen_native(f"{op}_conv2d", device):
        return f"only the reference serves {op}_conv2d on {device}"
    if torch.is_autocast_enabled(device):
        if dtype == torch.float64 or weight.dtype not in (torch.float32, torch.get_autocast_dtype(device)):
            return f"its input is {dtype}, its weight {weight.dtype}, under autocast"
    elif dtype != weight.dtype:
        return f"its input is {dtype}, its weight {weight.dtype}"
    if not traced and backends.transformed():
        return "a transform of torch.func is active"
    return None


def _convolve(conv: nn.Conv2d, op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> LazyTensor:
    name = conv.__dict__.get("mnops_name", "")
    lazily = type(x) is LazyTensor
    nchw = x.nchw if lazily else _is_nchw(x)
    if lazily:
        if lazy._listeners:
            lazy.tell(x.source, f"chained into {name}" if lazy.unchanged(x) else f"read by {name}")
        x = lazy.pending_of(x)
    if isinstance(x, Tensor):
        x = x.contiguous(memory_format=torch.channels_last)
    return lazy.lazy_output(*_run(conv, op, x, weight), bias, _keeps_nchw(nchw, weight), name)


def _convolve_traced(conv: nn.Conv2d, op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    compiled.chain_this_graph()
    nchw = _keeps_nchw(_is_nchw(x), weight)
    y, _, _ = _run(conv, op, x.contiguous(memory_format=torch.channels_last), weight)
    return compiled.conv_output(y, bias, nchw)


def _run(conv: nn.Conv2d, op: str, x: Tensor | Pending, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if op == "depthwise":
        return ops.depthwise_conv2d(x, weight, conv.stride, conv.padding, conv.dilation, conv.training)
    if op == "pointwise":
        return ops.pointwise_conv2d(x, weight, conv.training)
    return ops.stem_conv2d(x, weight, conv.stride, conv.padding, conv.training)


def _is_nchw(x: Tensor) -> bool:
    return x.is_contiguous() or x.stride(1) != 1


def _keeps_nchw(nchw: bool, weight: Tensor) -> bool:
    """As stock: either side in channels_last makes the output so."""
    return nchw and (weight.is_contiguous() or not weight.is_contiguous(memory_format=torch.channels_last))


# ---- finding ----


@dataclasses.dataclass
class Layer:
    """A convolution: its norm, which op serves it, or why it is left alone, and what became of its output."""

    name: str
    conv: nn.Conv2d
    norm: str = ""
    op: str = ""
    why_not: str = ""
    gains: bool = False
    events: list[str] = dataclasses.field(default_factory=list)


def _layers(model: nn.Module) -> list[Layer]:
    """Every convolution once, in order, and the BatchNorm after it by its siblings' order or names."""
    found: dict[nn.Module, Layer] = {}
    for path, parent in _visited(model):
        children = [c for c in parent.named_children() if not isinstance(c[1], nn.Identity)]
        for i, (name, child) in enumerate(children):
            if not isinstance(child, nn.Conv2d) or child in found:
                continue
            layer = found[child] = Layer(f"{path}.{name}" if path else name, child)
            following = children[i + 1] if i + 1 < len(children) else ("", None)
            if not _is_norm_of(following[1], child) and not isinstance(parent, nn.Sequential):
                following = _by_name(name, parent) or following
            layer.op = served_by(child) or ""
            if "forward" in child.__dict__:
                layer.why_not = "its forward was replaced by another"
            elif type(child) not in (nn.Conv2d, Conv2d):
                layer.why_not = f"{type(child).__name__} may compute anything"
            elif not layer.op:
                layer.why_not = "neither depthwise, 1x1 nor a first layer"
            elif not _is_norm_of(following[1], child):
                what = type(following[1]).__name__ if following[1] is not None else "nothing"
                layer.why_not = f"no BatchNorm follows, but {what}"
            if _is_norm_of(following[1], child):
                layer.norm = following[0]
    layers = [found[m] for m in model.modules() if m in found]
    _judge(layers)
    return layers


def _judge(layers: list[Layer]) -> None:
    """Which layers are worth fusing: a depthwise one; a 1x1 one beside such a one, so that they are chained;
    one beside such a 1x1. A first layer, beside either. Others gain little and may lose: a 1x1 between dense
    ones is bound by arithmetic, and the tensors around it are real."""
    line = [layer for layer in layers if layer.norm or layer.op == "depthwise"]  # not squeeze-excite's
    pairs = [p for pair in itertools.pairwise(line) for p in (pair, pair[::-1])]
    good = {layer.name for layer in line if layer.op == "depthwise"}
    while True:
        more = {b.name for a, b in pairs if a.name in good and a.op != "stem" and not b.why_not} - good
        if not more:
            break
        good |= more
    for layer in layers:
        layer.gains = layer.name in good


def _visited(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules, without what mnops already runs fused."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(prefix) for prefix in inside):
            continue
        if any(c.__module__.startswith(("mnops.nn", "mnops.models")) for c in type(module).__mro__):
            inside.append(f"{path}." if path else "")
            continue
        yield path, module


def _is_norm_of(norm: nn.Module | None, conv: nn.Conv2d) -> bool:
    return isinstance(norm, BATCH_NORMS) and norm.num_features == conv.out_channels


def _by_name(name: str, parent: nn.Module) -> tuple[str, nn.Module] | None:
    """conv1 -> bn1, conv -> norm and the like, where all convolutions were registered before all norms."""
    for norm in ("bn", "norm", "batchnorm", "batch_norm"):
        other = name.replace("conv", norm)
        if other != name and other in parent._modules:
            return other, parent._modules[other]
    return None


# ---- the three functions ----


def fuse(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> nn.Module:
    """Runs the convolutions of a model, with the BatchNorms and activations after them, by mnops; in place.

    Every depthwise convolution that a BatchNorm follows is fused, and the 1x1 convolutions and first layer
    (at most 16 channels in) beside such ones; others, as in a ResNet, would gain nothing. The class of a
    fused convolution changes, nothing else. Calling fuse again takes in what was added since.

    Fused layers are chained wherever one's output goes to the next through nothing but BatchNorm, relu,
    relu6, hardswish, silu or a concatenation of channels; another activation, as GELU, gets a real tensor.
    `mnops.fusion_report` says what happened, `mnops.fallback_warnings` warns of layers that fall back at run
    time. channels_last is the fast layout: contiguous inputs are converted for a chain, and its results back.
    torch.compile of the model gets its layers chained too (mnops/compiled.py), of a part the chains inside it;
    what is recorded to run elsewhere (torch.export, torch.onnx, torch.jit.trace, torch.fx) is stock.
    A BatchNorm's parameters and statistics may change between two layers' calls by PyTorch only: a change by
    NumPy or another library that shares their memory is not seen by what is pending on them.

    Args:
        model: any module; itself, not a copy, is changed.
        filter_fn: filter_fn(conv, name) chooses, of all that can be fused, in place of the rule above.

    Returns:
        model.

    Raises:
        TypeError: model is no module, or a compiled, scripted or exported one.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        rule = "model must be a torch.nn.Module, and not a scripted one"
        raise TypeError(f"fuse: {rule}, got {type(model).__name__}")
    found = False
    for layer in _layers(model):
        if layer.why_not or not (filter_fn(layer.conv, layer.name) if filter_fn else layer.gains):
            continue
        found = True
        layer.conv.__class__ = Conv2d
        layer.conv.__dict__["mnops_name"] = layer.name
    for _, module in _visited(model):
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = SyncBatchNorm
    if found and not _is_watched(model):
        _watch(model)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undoes fuse, in place: the model is what it was, parameters as they are now."""
    for module in model.modules():
        if type(module) in STOCK:
            module.__class__ = STOCK[type(module)]
            module.__dict__.pop("mnops_name", None)
        _unwatch(module)
    return model


def watch_as_one(model: nn.Module) -> None:
    """The hooks of a fused model, and of the parts of it that were given to fuse, on the whole of it alone."""
    watched = [module for module in model.modules() if _is_watched(module)]
    for module in watched:
        _unwatch(module)
    if watched:
        _watch(model)


def _is_watched(module: nn.Module) -> bool:
    return _give_real in module._forward_hooks.values()


def _watch(model: nn.Module) -> None:
    model.register_forward_pre_hook(_adopt)
    model.register_forward_hook(_give_real, prepend=True)


def _unwatch(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_adopt, _give_real)]:
            del hooks[key]


def _adopt(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a fused model: what came after fuse belongs to it too.

    SyncBatchNorms; and FSDP2, which frees the parameters of a part when its forward is through: what is
    pending on them is made real before.
    """
    if sync.distributed() and not torch.compiler.is_compiling():
        sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
        for m in module.modules():
            if type(m) is nn.SyncBatchNorm:
                m.__class__ = SyncBatchNorm
            elif isinstance(m, sharded) and _give_real not in m._forward_hooks.values():
                m.register_forward_hook(_give_real, prepend=True)


def _give_real(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a fused model: nothing pending leaves it, or waits when the parameters change."""
    if torch.compiler.is_compiling():
        return None
    lazy.settle()
    if type(output) is Tensor:
        return None
    return torch.utils._pytree.tree_map_only(LazyTensor, real, output)


class FusionReport(list[Layer]):
    """The convolutions of a model, printable."""

    def __str__(self) -> str:
        rows = []
        for layer in self:
            if layer.why_not:
                said = f"left alone: {layer.why_not}"
            elif type(layer.conv) is not Conv2d:
                said = "not fused" if layer.gains else "left alone: no depthwise convolution is beside it"
            else:
                said = f"fused: {layer.op} + {layer.norm}"
                if layer.events:
                    said += "; " + ", ".join(dict.fromkeys(layer.events))
            rows.append((layer.name, said))
        width = max((len(name) for name, _ in rows), default=0)
        fused = sum(type(layer.conv) is Conv2d for layer in self)
        lines = [f"{name:{width}}  {said}" for name, said in rows]
        return "\n".join([*lines, f"{fused} of {len(rows)} convolutions fused"])


@torch.no_grad()
def fusion_report(model: nn.Module, *inputs: Any) -> FusionReport:
    """What was fused and what was left alone, with reasons; print it.

    With example inputs the model is run once, in eval mode, and the report also says where each output was
    chained or made real, and by what.
    """
    report = FusionReport(_layers(model))
    if inputs:
        events = {layer.name: layer.events for layer in report}
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with lazy.listening(lambda name, what: events.get(name, []).append(what)):
                model(*inputs)
        finally:
            for module in training:
                module.training = True
    return report
