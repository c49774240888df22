"""How a deployed network runs here: as the plan that torch.fx reads from it once, its fused layers in few calls.

A fused model finds out at every call what is chained with what (mnops/lazy.py): right whatever its code does,
but on one small image most of the time. What `mnops.deploy` returns stays as it is. So its graph is kept, in
which each run of fused convolutions, norms, activations, sums and pools is one call of `run_layers`, and all
else what it was. Where that does not hold (hooks, gradients, autocast, a compiler, an export, a module that
was replaced), the network's own forward runs.
"""

import copy
import functools
import inspect
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import inplace_methods
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_flatten, tree_map

from mnops import backends, lazy
from mnops.fuse import Conv2d, _is_nchw, _keeps_nchw
from mnops.nn import has_hooks, served_by
from mnops.ops.run_layers import Layers, run_layers
from mnops.unchanged import Unchanged


def follow_plans(module: nn.Module) -> None:
    """Gives module, of which no more is to change, a forward that runs its plan where that holds."""
    module.forward = functools.partial(_forward, module)  # an attribute: copied and pickled with it
    parameters = inspect.signature(type(module).forward).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    module.forward.__signature__ = inspect.Signature(plain[1:])  # what an export names its inputs by


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if _may_plan(*args, *kwargs.values()) and (known := _plan_of(module, args, kwargs)) is not None:
        try:
            return known.forward(*args, **kwargs)
        except Exception:  # what the layers do not take, stock may; else the error is stock's
            pass
    return type(module).forward(module, *args, **kwargs)


# Of each module: whether it still is what its plan was made of, and the plan.
_plans: weakref.WeakKeyDictionary[nn.Module, tuple[Unchanged | bool, GraphModule | None]] = weakref.WeakKeyDictionary()


def _plan_of(module: nn.Module, args: tuple, kwargs: dict) -> GraphModule | None:
    unchanged, known = _plans.get(module, (False, None))
    if not unchanged:
        if any(has_hooks(m) for m in module.modules() if m is not module):
            return None
        holds = _holds(module, args, kwargs)
        if holds is None:
            return None
        known = plan(module) if holds else None
        _plans[module] = Unchanged(module) if holds else True, known
    return known


def _may_plan(x: Any = None, *others: Any) -> bool:
    inputs = x, *others
    return (
        not torch.compiler.is_compiling()
        and all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in inputs)
        and not backends.wants_stock(x)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))
        and not torch.is_autocast_enabled("cpu")
        and backends.choose("run_layers", "cpu") == backends.BACKENDS["cpu"].namespace
        and not lazy.is_observed()
        and not _has_any_global_hook()
    )


def _holds(module: nn.Module, args: tuple, kwargs: dict) -> bool | None:
    """Whether the plan computes what module does, tried on a copy: a graph knows nothing of random numbers, of what a
    forward leaves on its modules or asks of Python (isinstance). None if module does not take such an input."""
    with torch.random.fork_rng(devices=()):
        try:
            module = copy.deepcopy(module)
            known = plan(module)
        except Exception:  # of somebody's attributes
            return False
        if known is None:
            return False
        unchanged = Unchanged(module)
        for grad in (False, True):
            given, results = tree_map(_drawn_like, (args, kwargs)), []
            for forward in (functools.partial(type(module).forward, module), known.forward):
                args, kwargs = copy.deepcopy(given)
                try:
                    with torch.set_grad_enabled(grad):
                        results.append((tree_map(lazy.real, forward(*args, **kwargs)), args, kwargs))
                except Exception:
                    return False if results else None
            if not unchanged or not _near(*results):
                return False
    return True


def _drawn_like(x: Tensor) -> Tensor:
    return torch.randn_like(x, requires_grad=False) if x.is_floating_point() else x.clone()


def _near(*results: Any) -> bool:
    """But for rounding."""
    (expected, one), (found, other) = map(tree_flatten, results)
    return one == other and all(type(a) is type(b) and _is_near(a, b) for a, b in zip(expected, found))


def _is_near(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return a == b
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        return torch.equal(a, b)
    error, size = (a.double() - b.double()).norm(), a.double().norm()
    return bool(error <= torch.finfo(a.dtype).eps ** 0.5 * size)


class Run(nn.Module):
    """Layers of the plan in one call: values in, results out, in the memory format that stock modules give.

    The weights of products are packed once, and again when PyTorch has changed one.
    """

    def __init__(self, layers: Layers, results: list[int], stems: list[Tensor], products: list[Tensor]) -> None:
        super().__init__()
        self.layers, self.results, self.products = layers, results, products
        self.stems = stems  # the weights that are not of one memory in both formats
        self.packed, self.packed_of = layers, None

    def forward(self, *values: Tensor) -> list[Tensor]:
        x = values[0]
        if x.dtype.itemsize == 2 and any(t.dtype != x.dtype for t in self.layers.tensors):
            raise TypeError("stock convolutions take half tensors beside float32 ones under autocast only")
        found = run_layers(values, self._packed(), self.results)
        if _is_nchw(x) and all(_keeps_nchw(True, weight) for weight in self.stems):
            found = [y.contiguous() for y in found]
        return found

    def _packed(self) -> Layers:
        if any(weight.is_inference() for weight in self.products):  # which count no changes
            return self.layers
        now = [(weight._version, weight.data_ptr()) for weight in self.products]
        if now != self.packed_of:
            self.packed, self.packed_of = self.layers.packed(), now
        return self.packed


class _Proxy(torch.fx.Proxy):
    """torch.fx takes x += y for x = x + y, which is another thing where x is read elsewhere."""


def _in_place(name: str) -> Callable:
    def method(self: _Proxy, other: Any) -> torch.fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in inplace_methods:
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(torch.fx.Tracer):
    """torch.fx patches nn.Module while it traces: what other threads call meanwhile is none of its business."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        mine = threading.get_ident() == self.thread
        return super().call_module(m, forward, args, kwargs) if mine else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        mine = threading.get_ident() == self.thread
        return super().getattr(attr, attr_val, parameter_proxy_cache) if mine else attr_val

    def proxy(self, node: Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, SEEN_THROUGH):
            return False
        return type(module).__module__.startswith("mnops.") or super().is_leaf_module(module, name)


# Modules that are one function, which the rules below know.
SEEN_THROUGH = (
    nn.ReLU, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Dropout2d, nn.Identity,
    nn.Sequential, nn.Sigmoid, nn.Hardsigmoid,
)  # fmt: skip


_tracing = threading.Lock()


def plan(module: nn.Module) -> GraphModule | None:
    """What module computes; None if torch.fx cannot trace it, or nothing in it is fused."""
    try:
        with _tracing:
            graph = _Tracer().trace(module)
    except Exception:  # somebody's forward, on a Proxy: it may raise anything
        return None
    modules = dict(module.named_modules(remove_duplicate=False))
    runs = {f"mnops_run_{i}": _Writer(nodes) for i, nodes in enumerate(_runs(graph, modules))}
    if any(node in run.gates for run in runs.values() for node in run.wanted()):
        return None  # something else stands between a gate and the convolution that it is for
    for name, run in reversed(runs.items()):  # none stands in the graph for what an earlier one reads
        modules[name] = run.replace(graph, name)
    attributes = {node.target: operator.attrgetter(node.target)(module) for node in graph.find_nodes(op="get_attr")}
    return GraphModule(modules | attributes, graph) if runs else None


def _runs(graph: Graph, modules: dict[str, nn.Module]) -> Iterator[dict[Node, tuple]]:
    """Nodes that are layers, one behind the other, as many as there are; with a fused convolution among them. Of each
    the method of _Writer and its arguments."""
    made: dict[Node, bool] = {}  # whose values are those of layers, and whether they are (N, C, 1, 1), a pool's
    nodes: dict[Node, tuple] = {}
    for node in [*graph.nodes, None]:
        if node is not None and (rule := _conv_rule(node, modules, made) or _rule(node, made, modules)):
            write, x, *_ = rule
            made[node] = write is _Writer.pool or made.get(x, False)
            nodes[node] = rule
        elif node is None or node.op not in ("get_attr", "placeholder"):
            if any(write is _Writer.conv and type(rest[0]) is Conv2d for write, _, *rest in nodes.values()):
                yield nodes
            nodes = {}


def _conv_rule(node: Node, modules: dict[str, nn.Module], made: dict[Node, bool]) -> tuple | None:
    """Of a fused convolution, and of a squeeze-and-excite's."""
    conv = modules[node.target] if node.op == "call_module" else None
    x = (*node.args, *node.kwargs.values())
    known = type(conv) in (nn.Conv2d, Conv2d) and len(x) == 1 and isinstance(x[0], Node)
    op = served_by(conv) if known and not isinstance(conv.padding, str) else None
    fused = type(conv) is Conv2d or (op == "pointwise" and made.get(x[0]))
    return (_Writer.conv, *x, conv) if op and fused else None


def _rule(node: Node, made: dict[Node, bool], modules: dict[str, nn.Module]) -> tuple | None:
    """Of what is done with a value of a layer. In place: with one that nobody else sees."""
    if node.op not in ("call_function", "call_method"):
        return None
    target = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    args, kwargs = node.args, dict(node.kwargs)
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Node):
        return None
    alone = x in made and len(x.users) == 1
    if target in lazy.ACTIVATIONS:
        _, act, inplace = lazy.ACTIVATIONS[target](*args, **kwargs)
        known = act is not None and x in made and (alone or not inplace)
        return (_Writer.activation, x, act) if known else None
    if target in (*SUMS, *SUMS_IN_PLACE) and len(args) == 2 and not kwargs:
        shapes = {made.get(a, False) for a in args if isinstance(a, Node)}
        known = (alone or target in SUMS) and any(a in made for a in args) and all(map(_is_tensor, args))
        return (_Writer.sum, *args) if known and shapes == {False} else None
    if target is F.adaptive_avg_pool2d and x in made:
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        return (_Writer.pool, x) if size in (1, (1, 1), [1, 1]) else None
    if target in (torch.mean, Tensor.mean) and x in made:
        given = dict(zip(("dim", "keepdim"), args[1:])) | kwargs
        return (_Writer.pool, x) if given in [{"dim": dim, "keepdim": True} for dim in BOTH] else None
    if target in (F.dropout, F.dropout2d) and alone:
        training = args[2] if len(args) > 2 else kwargs.get("training", True)
        return (_Writer.read, x) if training is False else None
    if target in GATINGS and made.get(x):
        inplace = args[1:] not in ((), (False,)) or kwargs not in ({}, {"inplace": False})
        known = (alone or not inplace) and all(_gated(user, node, made, modules) for user in node.users)
        return (_Writer.gate, x, GATINGS[target]) if known else None
    gates = [a for a in node.all_input_nodes if a in made and _gated(node, a, made, modules)]
    return (_Writer.gated, *(a for a in args if a not in gates), *gates) if len(gates) == 1 else None


def _gated(node: Node, gate: Node, made: dict[Node, bool], modules: dict[str, nn.Module]) -> bool:
    """Whether node multiplies by gate what one fused 1x1 convolution reads, and nothing else."""
    target = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    if target not in PRODUCTS or len(node.args) != 2 or node.kwargs or len(node.users) != 1 or gate not in node.args:
        return False
    (x,), (user,) = [a for a in node.args if a is not gate] or [None], node.users
    rule = _conv_rule(user, modules, made)
    return made.get(x) is False and rule is not None and type(rule[2]) is Conv2d and served_by(rule[2]) == "pointwise"


def _is_tensor(x: Any) -> bool:
    """As far as that is known: no number, no size; no parameter, which would be of another shape."""
    if not isinstance(x, Node) or x.op == "get_attr" or x.target in (getattr, "size", "dim"):
        return False
    return x.target is not operator.getitem or _is_tensor(x.args[0])


SUMS = {operator.add, torch.add, Tensor.add, Tensor.__add__}
SUMS_IN_PLACE = {operator.iadd, Tensor.add_, Tensor.__iadd__}
PRODUCTS = {operator.mul, torch.mul, Tensor.mul, Tensor.__mul__}
GATINGS = {
    F.hardsigmoid: "hardsigmoid", F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", Tensor.sigmoid: "sigmoid",
}  # fmt: skip
BOTH = ((2, 3), [2, 3], (-2, -1), [-2, -1])
NOTHING = (None, None, None, None, 0.0)


class _Writer:
    """Writes a run of nodes down as layers. A value that a norm follows is `open` until somebody reads it: an
    activation makes one layer with it."""

    def __init__(self, nodes: dict[Node, tuple]) -> None:
        self.nodes = nodes
        self.inputs = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in nodes))
        self.layers = Layers(len(self.inputs))
        self.values = {node: i for i, node in enumerate(self.inputs)}
        self.open: dict[int, tuple] = {}  # of a value
        self.stems: list[Tensor] = []
        self.products: list[Tensor] = []
        self.gates: dict[Node, tuple[int, str]] = {}  # of a gate, and of what is multiplied by it
        for self.node, (write, *args) in nodes.items():
            self.values[self.node] = write(self, *args)

    def wanted(self) -> list[Node]:
        """What is read outside of the run."""
        return [node for node in self.nodes if any(user not in self.nodes for user in node.users)]

    def read(self, node: Node) -> int:
        value = self.values[node]
        if value in self.open:
            self.values[node] = self.layers.norm(value, *self.open.pop(value))
        return self.values[node]

    def conv(self, x: Node, conv: nn.Conv2d) -> int:
        gate, layers, x = self.gates.get(x, ()), self.layers, self.read(x)
        weight, (height, width) = conv.weight, conv.padding
        op, padding = served_by(conv), (height, height, width, width)
        if op == "depthwise":
            y = layers.depthwise(x, weight, conv.stride, padding, conv.dilation)
        elif op == "stem":
            y = layers.stem(x, weight, conv.stride, padding)
            self.stems.append(weight)
        else:
            y = layers.pointwise(x, weight, *gate)
            self.products.append(weight)
        if conv.bias is not None:
            self.open[y] = (None, None, None, conv.bias, 0.0)
        return y

    def activation(self, x: Node, act: str) -> int:
        alone = len(x.users) == 1
        norm = self.open.pop(self.values[x], NOTHING) if alone else NOTHING
        return self.layers.norm(self.values[x] if alone else self.read(x), *norm, act)

    def sum(self, x: Node, other: Node) -> int:
        return self.layers.sum(self.read(x), self.read(other))

    def pool(self, x: Node) -> int:
        return self.layers.pool(self.read(x))

    def gate(self, x: Node, gating: str) -> int:
        self.gates[self.node] = self.read(x), gating
        return self.values[x]

    def gated(self, x: Node, gate: Node) -> int:
        self.gates[self.node] = self.gates[gate]
        return self.read(x)

    def replace(self, graph: Graph, name: str) -> Run:
        """Puts a call of the run into graph, in place of its nodes."""
        wanted = self.wanted()
        results = [self.read(node) for node in wanted]
        with graph.inserting_after(next(reversed(self.nodes))):
            call = graph.call_module(name, tuple(self.inputs))
        place = call
        for i, node in enumerate(wanted):
            with graph.inserting_after(place):
                place = graph.call_function(operator.getitem, (call, i))
            node.replace_all_uses_with(place, delete_user_cb=lambda user: user not in self.nodes)
        for node in reversed(self.nodes):
            graph.erase_node(node)
        return Run(self.layers, results, self.stems, self.products)
