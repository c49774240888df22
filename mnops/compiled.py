"""A fused model under torch.compile: its layers are chained in the compiler's graph.

While the compiler traces, a fused convolution (mnops/fuse.py) puts its op into the graph, and BatchNorm and
activation stay the model's own: right as it is. Before the backend, whichever it is, gets the graph, one walk
through it does what LazyTensor (mnops/lazy.py) does in eager mode: a BatchNorm takes the statistics that the
op measured, it and the activation after it are left to the next op, and what others read is made real.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from mnops import backends, lazy, ops
from mnops.lazy import Raw
from mnops.ops import Pending
from mnops.reference import wide


def chain_this_graph() -> None:
    """While torch.compile traces: its backend, whichever it is, gets the graph chained."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        backend = output.compiler_fn
    except (ImportError, AttributeError):
        return  # the compiler of another torch, whose insides are others: the graph is right unchained too
    if not hasattr(backend, "chains"):

        @functools.wraps(backend)
        def compiler_fn(gm: GraphModule, *args: Any, **kwargs: Any) -> Any:
            for part in list(gm.modules()):  # bodies of checkpoints too
                if isinstance(part, GraphModule):
                    _Chain(part.graph).run()
                    part.recompile()
            return backend(gm, *args, **kwargs)

        compiler_fn.chains = True
        output.compiler_fn = compiler_fn


chain_this_graph._dynamo_marked_constant = True  # the compiler calls it, and does not look inside


def leave_to_python(function: Callable) -> None:
    """Called by what the compiler leaves to Python, as torch's own modules outside of a graph, it is left too."""
    with contextlib.suppress(AttributeError):  # of another torch: it is compiled then, call by call, and right too
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        frames.set_code_exec_strategy(function.__code__, skip)


leave_to_python(lazy.LazyTensor.__torch_function__.__func__)


@dataclass
class Left:
    """A value whose norm and activation are left to its readers; in Pending and Raw are nodes."""

    pending: Pending
    raw: Raw | None
    nchw: bool = False
    real: Node | None = None  # from then on: a reader may have changed it in place


def conv_output(x: Tensor, bias: Tensor | None, nchw: bool) -> Tensor:
    """What a fused convolution returns in a graph: x with its bias, in the format that stock gives it."""
    if bias is not None:
        bias = bias.to(wide(x))
        x = ops.norm_act(Pending(x, -bias, torch.ones_like(bias), eps=0.0))
    return x.contiguous() if nchw else x


class _Chain:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.left: dict[Node, Left] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                found = self.rule(node)
                if isinstance(found, Left):
                    self.left[node] = found
                elif not found:
                    if node.op == "call_function" and node.meta.get("example_value") is None:
                        for value in self.left.values():  # the grad mode or autocast changes
                            self.make_real(value)
                    node.args = torch.fx.map_arg(node.args, self.real_of)
                    node.kwargs = torch.fx.map_arg(node.kwargs, self.real_of)
        for node in reversed(self.left):
            if not node.users:
                self.graph.erase_node(node)

    def rule(self, node: Node) -> Left | bool | None:
        """What node's value is if it is left; True if node is as it shall be; None: it reads real tensors."""
        if node.op not in ("call_function", "call_method"):
            return None
        rule = RULES.get(_name(node) or node.target)
        return rule and rule(self, node, *node.args, **node.kwargs)

    def open(self, x: Any) -> Left | None:
        """What x is, if it is left still."""
        value = self.left.get(x) if isinstance(x, Node) else None
        return value if value is not None and value.real is None else None

    def real_of(self, node: Node) -> Node:
        return self.make_real(self.left[node]) if node in self.left else node

    def make_real(self, value: Left) -> Node:
        if value.real is None:
            p = value.pending
            real = p.x if p.mean is None and p.act == "none" else self.norm_act(p)
            value.real = self.graph.call_method("contiguous", (real,)) if value.nchw else real
        return value.real

    def norm_act(self, p: Pending, *residual: Node) -> Node:
        namespace = getattr(torch.ops, backends.choose("norm_act", _example(p.x).device.type))
        return self.graph.call_function(namespace.norm_act.default, (*p, *residual))

    def items(self, found: Node, given: Iterable[bool]) -> list[Node | None]:
        call = self.graph.call_function
        return [call(operator.getitem, (found, i)) if there else None for i, there in enumerate(given)]

    # ---- rules: their arguments after node are those of the function that node calls ----

    def conv(self, node, x, weight, mean, var, gamma, beta, eps, act, *rest):
        value = self.open(x)
        if value is None or value.nchw or mean is not None or act != "none":
            return None
        node.args = (value.pending.x, weight, *value.pending[1:], *rest)
        return True

    def item(self, node, x, index):
        if isinstance(x, Node) and RULES.get(_name(x)) is _Chain.conv and index == 0:
            return Left(Pending(node), Raw(node, None, None, None))
        value = self.open(x)
        return value if value and lazy.covers(index, _example(value.pending.x).shape) else None

    def cat(self, node, tensors, dim=0, **rest):
        if not isinstance(tensors, (list, tuple)):  # a node that makes a named tuple
            return None
        values = [self.open(x) for x in tensors]
        parts = [value and value.pending for value in values]
        if dim != 1 or rest or not lazy.may_concatenate(parts) or len({value.nchw for value in values}) != 1:
            return None
        found = self.graph.call_function(_concatenated, ([tuple(p) for p in parts],))
        items = self.items(found, [any(p[i] is not None for p in parts) for i in range(5)])
        items[0].meta["example_value"] = _example(node)
        return Left(Pending(*items, *parts[0][5:]), None, values[0].nchw)

    def add_bias(self, node, x, mean, var, gamma, beta, eps, act, *residual):
        """As conv_output does it."""
        value = self.open(x)
        if value is None or value.raw is None or eps != 0 or residual:
            return None
        (bias,) = mean.args
        return Left(Pending(x, mean, var, eps=0.0), value.raw._replace(bias=bias))

    def contiguous(self, node, x, memory_format=torch.contiguous_format):
        value = self.open(x)
        nchw = memory_format == torch.contiguous_format
        if value is None or value.nchw == nchw:
            return value
        return Left(value.pending, value.raw, nchw)

    def size(self, node, x, *args):
        value = self.open(x)
        if value is not None:
            node.args = (value.pending.x, *args)
        return value is not None

    def batch_norm(
        self, node, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
        eps=1e-5,
    ):  # fmt: skip
        value = self.open(input)
        if value is None or value.raw is None:
            return None
        y, call = value.raw.y, self.graph.call_function
        conv, mean, var = y.args[0], None, None
        if not (conv.args[-1] if training else None not in (running_mean, running_var)):
            return None  # as lazy.py's rule
        if training:
            mean, var = (call(operator.getitem, (conv, i)) for i in (1, 2))
        raw = y, mean, var, value.raw.bias
        found = call(_vectors, (*raw, running_mean, running_var, weight, bias, training, momentum, eps))
        vectors = self.items(found, (True, True, weight is not None, bias is not None))
        return Left(Pending(y, *vectors, eps), None, value.nchw)

    def activation(self, node, x, act, inplace):
        value = self.open(x)
        if value is None or act is None or value.pending.act != "none":
            return None
        pending = value.pending._replace(act=act)
        if not inplace:
            return Left(pending, None, value.nchw)
        value.pending, value.raw = pending, None
        return value

    def sum(self, node, x, other):
        """The pending norm of x and the sum in one pass."""
        value = self.open(x)
        if value is None or value.nchw or value.pending.mean is None or not _alike(x, other):
            return None
        return self.norm_act(value.pending, self.real_of(other))

    def add(self, node, input, other, **rest):  # alpha, out
        out = None if rest else self.sum(node, other, input) or self.sum(node, input, other)
        return out and Left(Pending(out), None, real=out)

    def add_in_place(self, node, input, other, **rest):
        out = None if rest else self.sum(node, input, other)
        if out is not None:
            self.left[input].real = out
        return out and self.left[input]


def _vectors(y: Tensor, mean: Any, var: Any, bias: Any, *norm: Any) -> tuple:
    """mean, var, gamma and beta of the norm, the running statistics updated."""
    return lazy.normalised(Raw(y, mean, var, bias), *norm)[1:5]


def _concatenated(parts: list[tuple]) -> tuple:
    return tuple(lazy.concatenate([Pending(*p) for p in parts]))


def _name(node: Node) -> str:
    """Of an mnops op, on whatever backend; or nothing."""
    op = node.target
    known = isinstance(op, torch._ops.OpOverload) and op.namespace.startswith("mnops")
    return f"mnops::{op._opname}" if known else ""


def _example(node: Node) -> Any:
    return node.meta.get("example_value")


def _alike(a: Node, b: Any) -> bool:
    if not isinstance(b, Node) or not isinstance(_example(b), Tensor):
        return False
    a, b = _example(a), _example(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _activation(read: Callable) -> Callable:
    return lambda chain, node, *args, **kwargs: chain.activation(node, *read(*args, **kwargs))


RULES: dict[Any, Callable] = {
    **dict.fromkeys((f"mnops::{op}_conv2d" for op in ("depthwise", "pointwise", "stem")), _Chain.conv),
    operator.getitem: _Chain.item, "mnops::norm_act": _Chain.add_bias, "contiguous": _Chain.contiguous,
    "size": _Chain.size, "dim": _Chain.size,
    F.batch_norm: _Chain.batch_norm,
    **{func: _activation(read) for func, read in lazy.ACTIVATIONS.items()},
    **{f.__name__: _activation(lazy.ACTIVATIONS[f]) for f in (Tensor.relu, Tensor.relu_)},
    **dict.fromkeys((operator.add, torch.add, "add"), _Chain.add),
    **dict.fromkeys((operator.iadd, "add_"), _Chain.add_in_place),
    **dict.fromkeys((torch.cat, torch.concat), _Chain.cat),
}  # fmt: skip
