"""mnops.deploy: a copy of a network for inference, BatchNorms folded into the convolutions before them."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mnops.fuse import Conv2d as FusedConv2d
from mnops.fuse import SyncBatchNorm as FusedSyncBatchNorm
from mnops.fuse import watch_as_one
from mnops.nn import Folded, has_hooks
from mnops.plan import follow_plans

__all__ = ["deploy"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, FusedConv2d)  # exactly: a subclass may compute anything
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FusedSyncBatchNorm)


def deploy(model: nn.Module) -> nn.Module:
    """A copy of model for inference, on any runtime: every BatchNorm that can be is folded.

        weight' = weight * gamma * rstd    bias' = beta + (bias - mean) * gamma * rstd    computed in fp64

    A BatchNorm is folded where torch.fx sees it, and nothing else, take the output of a convolution; a module
    that torch.fx cannot trace is looked for such pairs in its parts. The copy runs here as the model does,
    fused where it is; exported it is convolutions with bias and activations, without mnops.

    A fused copy runs on a CPU by a plan (mnops/plan.py), its graph, in which all layers in a row are one call: made and
    tried on a copy when it is first called, and again after one of its modules was changed. It reads the tensors as
    they are then, but for the weights of 1x1 convolutions, which it packs once, and again when their version or their
    memory is another: a write through `.data` or NumPy is not seen. The copy's own forward runs under hooks,
    gradients, autocast, torch.func and compilers, and where the graph is not all that a forward does: random numbers,
    attributes written.

    Args:
        model: `mnops.MobileNet`, a model given to `mnops.fuse`, or any other. It is left as it is.

    Returns:
        The copy: in eval mode, to stay there (train() raises RuntimeError), its parameters without gradients.
        A warning names the BatchNorms that were left: behind something else than a convolution, with hooks,
        without running statistics, kept in training mode, or of another class.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"deploy: model must be a torch.nn.Module, got {type(model).__name__}")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for conv, norm in _pairs(model):
        rest = _without_norm(norm)
        if rest is not None:
            conv.weight, conv.bias = _folded(conv, norm)
            _replace(model, norm, rest)
    watch_as_one(model)
    for part, _ in _graphs(model):
        own = type(part) is not FusedConv2d and "forward" not in part.__dict__
        if own and any(type(m) is FusedConv2d for m in part.modules()):
            follow_plans(part)
    left = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if left:
        names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        warnings.warn(f"deploy: {len(left)} BatchNorms are not folded: {names}", stacklevel=2)
    return model


@torch.no_grad()
def _folded(conv: nn.Module, norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    values = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    wide = [v.double() if isinstance(v, torch.Tensor) else v for v in values]
    return tuple(
        nn.Parameter(t.to(conv.weight.dtype), requires_grad=False) for t in fuse_conv_bn_weights(*wide)
    )


def _without_norm(norm: nn.Module) -> nn.Module | None:
    """What a norm's module does after the norm: nothing, or, as timm's BatchNormAct2d, an activation.

    None if that cannot be told: a subclass may compute anything.
    """
    if type(norm) in NORMS:
        return Folded()
    try:
        traced = torch.fx.symbolic_trace(norm)
    except Exception:  # somebody's forward, on a Proxy: it may raise anything
        return None
    graph = traced.graph
    for node in graph.find_nodes(op="call_function", target=torch._assert):  # of the input's rank
        graph.erase_node(node)
    graph.eliminate_dead_code()
    inputs = graph.find_nodes(op="placeholder")
    calls = graph.find_nodes(op="call_function", target=F.batch_norm)
    if len(inputs) != 1 or len(calls) != 1 or calls[0].args[:1] != (inputs[0],) or len(inputs[0].users) != 1:
        return None
    calls[0].replace_all_uses_with(inputs[0])
    graph.eliminate_dead_code()
    if graph.find_nodes(op="get_attr"):  # more is made of the norm's vectors than the norm
        return None
    traced.delete_all_unused_submodules()
    return nn.Sequential(Folded(), torch.fx.GraphModule(traced, graph, type(norm).__name__)).eval()


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever old is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


# ---- which BatchNorm follows which convolution ----


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (*CONVOLUTIONS, _BatchNorm)) or super().is_leaf_module(module, name)


def _graphs(model: nn.Module) -> Iterator[tuple[nn.Module, torch.fx.Graph]]:
    """The graph of the model, or those of its largest parts that can be traced."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # somebody's forward, on a Proxy: it may raise anything
        for child in model.children():
            yield from _graphs(child)
    else:
        yield model, graph


def _pairs(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(convolution, norm): every call of the norm is on the convolution's output, which nothing else sees."""
    users: dict[nn.Module, set] = defaultdict(set)  # of a convolution's output: norms, or None for another
    sources: dict[nn.Module, set] = defaultdict(set)  # of a norm's input
    for part, graph in _graphs(model):
        modules = dict(part.named_modules(remove_duplicate=False))
        called = {node: modules[node.target] for node in graph.nodes if node.op == "call_module"}
        for node in graph.nodes:
            module = called.get(node)
            if isinstance(module, CONVOLUTIONS):
                readers = [called.get(user) for user in node.users]
                users[module] |= {r if isinstance(r, _BatchNorm) else None for r in readers}
            elif isinstance(module, _BatchNorm):
                other = called.get(node.args[0]) if node.args else None
                sources[module].add(other if isinstance(other, CONVOLUTIONS) else None)
            elif node.op == "get_attr":  # a parameter read past its module
                owner = modules.get(node.target.rpartition(".")[0])
                users[owner].add(None)
                sources[owner].add(None)
    return [
        (conv, norm)
        for norm, convs in sources.items()
        for conv in convs
        if len(convs) == 1 and conv is not None and users[conv] == {norm} and _foldable(conv, norm)
    ]


def _foldable(conv: nn.Module, norm: nn.Module) -> bool:
    return (
        type(conv) in CONVOLUTIONS
        and not norm.training  # a model's own train() may keep it so
        and norm.running_mean is not None
        and norm.running_var is not None
        and not has_hooks(conv)
        and not has_hooks(norm)
    )
