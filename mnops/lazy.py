"""A pending tensor that passes for a real one: what fused convolutions hand on inside anybody's model.

The model's own code runs, line by line. A fused convolution (mnops/fuse.py) returns a LazyTensor; batch_norm
and an activation applied to it are noted, not computed; the next fused convolution applies them as it loads.
Anything else that touches it gets the real tensor, computed once: nothing needs tracing, and control flow,
shared modules, hooks, branches and in-place operations mean what they mean without mnops.

Two layers make it sound. `__torch_function__` sees what Python code does, above autograd. What goes round it
(an autograd.Function of the user, a backward hook, C++) finds a tensor whose grad_fn is that of the real one
and whose values come by `__torch_dispatch__`. What a tensor waits for, its norm's vectors, may change: so what
somebody still holds is computed when the model's forward ends (`settle`), and nobody gets a value of changed ones.
"""

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnops import backends, ops
from mnops.functional import refuse_single_value, running_statistics, update_running
from mnops.ops import Pending
from mnops.ops import _contract as c
from mnops.ops import _register as r


class FallbackWarning(UserWarning):
    """A fused layer ran as stock modules."""


class Raw(NamedTuple):
    """A convolution's stored output, its statistics if it measured them, and the bias that it lacks."""

    y: Tensor
    mean: Tensor | None
    var: Tensor | None
    bias: Tensor | None


# ---- what happens, told to whoever listens ----

_listeners: list[Callable[[str, str], None]] = []


def tell(source: str, what: str) -> None:
    for listener in _listeners:
        listener(source, what)


@contextlib.contextmanager
def listening(listener: Callable[[str, str], None]) -> Iterator[None]:
    """Calls listener(name of the convolution, what became of its output) at every such event."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


_warn = False


def is_observed() -> bool:
    """Whether somebody wants to be told what happens."""
    return bool(_listeners) or _warn


class fallback_warnings:
    """Switch: warn (FallbackWarning) whenever a fused layer runs as stock modules, and say why.

    mnops.fallback_warnings(True) sets it for good; `with mnops.fallback_warnings(): ...` within the block.
    """

    def __init__(self, enabled: bool = True) -> None:
        global _warn
        self.previous, _warn = _warn, enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        global _warn
        _warn = self.previous


def fell_back(source: str, why: str) -> None:
    if _listeners:
        tell(source, f"stock: {why}")
    if _warn:
        said = f"mnops: {source or 'a fused layer'} ran as stock modules: {why}"
        warnings.warn(said, FallbackWarning, stacklevel=3)


# ---- the tensor ----


class LazyTensor(Tensor):
    """z = act(norm(y)) as `pending` says, not computed. real(z) computes it, as any use does but a few.

    Attributes:
        pending: None once the tensor was changed in place; then only `real` knows.
        raw: of a convolution's own output, before any norm.
        nchw: the memory format that stock modules would have given z.
        source: the name of the convolution.
        passed: something was computed from `pending`: the gradient of that goes past z.
    """

    pending: Pending | None
    raw: Raw | None
    nchw: bool
    source: str
    passed: bool
    _data: Tensor | None  # z, without autograd
    _real: Tensor | None  # z, with it
    _version_seen: int  # of _data
    _vectors: list[Tensor]  # of the norm, and their versions
    _versions: list[int]

    @staticmethod
    def __new__(cls, pending: Pending, nchw: bool, source: str, raw: Raw | None = None) -> "LazyTensor":
        y = pending.x
        _, channels, height, width = y.shape
        pixels = height * width
        strides = (channels * pixels, pixels, width, 1) if nchw else y.stride()
        return Tensor._make_wrapper_subclass(cls, y.shape, strides=strides, dtype=y.dtype, device=y.device)

    def __init__(self, pending: Pending, nchw: bool, source: str, raw: Raw | None = None) -> None:
        """pending: its vectors in the dtype that the schemas want."""
        self.nchw, self.source, self.passed = nchw, source, False
        self._data = self._real = None
        _describe(self, pending, raw)

    # ---- for torch.compile of a part of a model: its graph takes the values ----

    @property
    def computed(self) -> Tensor:
        if self.pending is not None:  # real for good, and for autograd before the graph keeps or changes it
            real(self)
            self.pending = self.raw = None
        return self._data

    def __tensor_flatten__(self):
        return ["computed"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, strides):
        z = LazyTensor(Pending(inner["computed"]), False, "")
        z.pending, z._data = None, inner["computed"]
        z._version_seen = _version(z)
        return z

    def _stable_hash_for_caching(self) -> str:
        return f"computed {tuple(self.shape)} {self.stride()} {self.dtype} {self.device} {self.requires_grad}"

    def __repr__(self, **options: Any) -> str:
        return repr(self.computed if _in_a_compiler() else real(self))

    # ---- what is done with it ----

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _in_a_compiler() or (func in METADATA and args[0].pending is not None):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is not None:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _on_real(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if _here.linking and func is torch.ops.aten.copy_.default:
            return args[0]
        if _in_a_compiler():
            if func is torch.ops.aten.detach.default:
                return cls.__tensor_unflatten__({"computed": args[0].computed.detach()}, None, (), ())
        else:
            written = (a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
            if any(w and type(a) is LazyTensor for w, a in zip(written, args)):
                raise RuntimeError(
                    f"{func} changes a tensor that mnops left pending, out of autograd's sight: give it "
                    "x.clone(), or leave the layer before it out of mnops.fuse by filter_fn"
                )
        args, kwargs = torch.utils._pytree.tree_map_only(LazyTensor, data, (args, kwargs or {}))
        return func(*args, **kwargs)


def _in_a_compiler() -> bool:
    return torch._guards.TracingContext.try_get() is not None


_in_a_compiler._dynamo_marked_constant = True


class _Defer(torch.autograd.Function):
    """Gives a LazyTensor, `out`, the backward of the norm_act that was not run."""

    @staticmethod
    def forward(ctx, x, mean, var, gamma, beta, eps, act, out):
        ctx.rest = (eps, act)
        ctx.save_for_backward(x, mean, var, gamma, beta)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx, g):
        namespace = backends.choose("norm_act_backward", g.device.type)
        op = getattr(torch.ops, namespace).norm_act_backward.default
        return *r.norm_backward(op, ctx, g), None


_Defer.apply = super(torch.autograd.Function, _Defer).apply  # as in mnops/ops/_register.py


class _Here(threading.local):
    """What this thread is about."""

    def __init__(self) -> None:
        self.linking = False
        self.waiting: list[weakref.ref[LazyTensor]] = []


_here = _Here()


def _link(out: Tensor, source: Tensor) -> None:
    """Gives out, of source's values and without history, source's history: to autograd out.copy_(source)."""
    _here.linking = True
    try:
        out.copy_(source)
    finally:
        _here.linking = False


def _describe(out: LazyTensor, pending: Pending, raw: Raw | None) -> None:
    """Makes `pending` what out is, for autograd too: in place, over a value that nothing depends on."""
    grad = any(v is not None and v.requires_grad for v in pending[:5])
    if grad and not torch.is_grad_enabled():  # what is made without autograd is a constant ever after
        grad = False
        pending = Pending(*(a.detach() if isinstance(a, Tensor) else a for a in pending))
        raw = raw and Raw(*(a if a is None else a.detach() for a in raw))
    out.pending, out.raw = pending, raw
    if pending.mean is not None:
        out._vectors = [v for v in pending[1:5] if v is not None and not v.is_inference()]
        out._versions = [v._version for v in out._vectors]
        if len(_here.waiting) > 1000:  # where no forward of a whole model ends
            _held()
        _here.waiting.append(weakref.ref(out))
    if grad:
        with torch._C.DisableTorchFunctionSubclass():
            if out.requires_grad:
                out.detach_()
            if pending.mean is None and pending.act == "none":
                _link(out, pending.x)
            else:
                _Defer.apply(*pending, out)


def lazy_output(
    y: Tensor, mean: Tensor, var: Tensor, bias: Tensor | None, nchw: bool, source: str
) -> LazyTensor:  # fmt: skip
    """The output of a convolution: mean and var as the op gave them, (0,) if it did not measure."""
    raw = Raw(y, mean, var, bias) if mean.numel() else Raw(y, None, None, bias)
    if bias is None:
        return LazyTensor(Pending(y), nchw, source, raw)
    wide = bias.to(c.wide(y))
    return LazyTensor(Pending(y, -wide, torch.ones_like(wide), eps=0.0), nchw, source, raw)


def data(z: LazyTensor) -> Tensor:
    """The values, computed at the first call; no autograd."""
    if z._data is None:
        _refuse_stale(z)
        with torch.no_grad():
            out = ops.norm_act(z.pending)
            if out is z.pending.x:
                out = out.clone()  # others wait for y: nobody may change it
            z._data = (out.contiguous() if z.nchw else out).detach()
        z._version_seen = _version(z)
    elif z._data.is_inference() and not torch.is_inference_mode_enabled():
        z._data = z._data.clone()
    return z._data


def settle(running_var: Tensor | None = None) -> None:
    """Computes what is pending and somebody holds, before the vectors that it waits for may change.

    running_var: only what waits for these running statistics.
    """
    for z in _held():
        if running_var is None or z.pending.var.data_ptr() == running_var.data_ptr():
            data(z)


def _held() -> list[LazyTensor]:
    """What waits for vectors of a norm and is alive; the rest is forgotten."""
    held = []
    for ref in _here.waiting:
        if (z := ref()) is not None:
            z._fix_weakref()
            if z._data is None and not _is_stale(z):
                held.append((ref, z))
    _here.waiting = [ref for ref, _ in held]
    return [z for _, z in held]


def _version(z: LazyTensor) -> int:
    return -1 if z._data.is_inference() else z._data._version


def _is_stale(z: LazyTensor) -> bool:
    """Whether what `pending` says is no longer what it said."""
    return z.pending.mean is not None and [v._version for v in z._vectors] != z._versions


def _refuse_stale(z: LazyTensor) -> None:
    if _is_stale(z):
        raise RuntimeError(
            f"mnops left the output of {z.source or 'a fused layer'} pending, and a vector of its BatchNorm was "
            "changed in place since: read the output before (x.clone()), or leave the layer out of mnops.fuse by "
            "filter_fn"
        )


def real(z: Tensor) -> Tensor:
    """z as a plain tensor, connected to autograd; what is not a LazyTensor is given back."""
    if type(z) is not LazyTensor:
        return z
    if torch._C._are_functorch_transforms_active():  # z is from outside of them
        with torch._C._DisableFuncTorch():
            return _real(z)
    return _real(z)


def _real(z: LazyTensor) -> Tensor:
    connected = _requires_grad(z) and not torch.is_inference_mode_enabled()
    if z._real is None or (connected and not z._real.requires_grad):
        z._real = data(z).detach()
        if connected:  # whoever looks, and in whatever mode: z has its history
            unchanged = torch.autograd._unsafe_preserve_version_counter(z._real)
            with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass(), unchanged:
                _link(z._real, z)
    return z._real


def pending_of(x: Tensor) -> Tensor | Pending:
    """What a fused convolution loads. That x was made real meanwhile is no matter: a checkpoint must save the
    same tensors when it runs again."""
    if type(x) is not LazyTensor:
        return x
    return take(x) if unchanged(x) else real(x)


def _requires_grad(z: LazyTensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return z.requires_grad


def unchanged(z: LazyTensor) -> bool:
    """Whether `pending` still describes z, and to whoever looks: a transform of torch.func knows stock operations."""
    if z.pending is None or torch._C._are_functorch_transforms_active():
        return False
    if z._data is None:
        _refuse_stale(z)
        return True
    return 0 <= z._version_seen == _version(z) and not _is_stale(z)


def take(z: LazyTensor) -> Pending:
    """`pending`, to compute something from it past z."""
    z.passed = True
    return z.pending


def _become(z: LazyTensor, changed: Tensor) -> None:
    """z is now that real tensor, in place: for autograd z.copy_(changed) over a value that is gone."""
    z.pending, z.raw, z._data, z._real = None, None, changed.detach(), changed
    with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
        if z.requires_grad or changed.requires_grad:
            _link(z.detach_(), changed)


def _on_real(func: Callable, args: tuple, kwargs: dict) -> Any:
    """The function on real tensors; those that it changed, or gave away to be changed or watched, stay real."""
    seen: list[LazyTensor] = []
    args, kwargs = _all_real(args, seen), {name: _all_real(value, seen) for name, value in kwargs.items()}
    if _listeners:
        for z in seen:
            tell(z.source, f"made real by {getattr(func, '__name__', func)}")
    before = [_version(z) for z in seen]
    result = func(*args, **kwargs)
    for z, version in zip(seen, before):
        if func in FOR_GOOD or _version(z) != version or _shares_memory(result, z._real):
            _become(z, z._real)
    return result


def _shares_memory(result: Any, z: Tensor) -> bool:
    """Whether somebody got z's memory, who may write there out of sight: by a view, by NumPy."""
    results = result if isinstance(result, (tuple, list)) else (result,)
    return any(isinstance(t, Tensor) and torch._C._is_alias_of(t, z) for t in results)


def _all_real(a: Any, seen: list[LazyTensor]) -> Any:
    """a with real tensors for lazy ones, which are added to seen."""
    if type(a) is LazyTensor:
        seen.append(a)
        return real(a)
    if isinstance(a, (tuple, list)):
        items = [_all_real(item, seen) for item in a]
        return type(a)(*items) if hasattr(a, "_fields") else type(a)(items)
    return a


# ---- what is noted, not computed ----


def normalised(
    raw: Raw, running_mean, running_var, weight, bias, training: bool, momentum: float, eps: float
) -> Pending:  # fmt: skip
    """F.batch_norm of a convolution's output, pending; in training of one that measured."""
    y, mean, var, shift = raw
    if training:
        count = y.numel() // y.shape[1]
        refuse_single_value(count, y)
        if running_mean is not None:
            shifted = mean if shift is None else mean + shift
            update_running(running_mean, running_var, shifted, var, count, momentum)
        if shift is not None:  # shift - shift: a gradient of zero for whoever waits for one (DDP)
            mean = mean + (shift - shift)
    else:
        mean, var = running_statistics(running_mean, running_var)
        if shift is not None:
            mean = mean.to(c.wide(y)) - shift
    return Pending(y, *c.norm_args(y, mean, var, weight, bias, eps, "none"))


def _batch_norm(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):  # fmt: skip
    if type(x) is not LazyTensor or x.raw is None or not unchanged(x):
        return NotImplemented
    if training and x.raw.mean is None:
        fell_back(x.source, "its BatchNorm is in training mode, and the convolution in eval mode")
        return NotImplemented
    if not training and (running_mean is None or running_var is None):
        return NotImplemented
    if training and running_var is not None:
        settle(running_var)
    norm = running_mean, running_var, weight, bias, training, momentum, eps
    take(x)
    return LazyTensor(normalised(x.raw, *norm), x.nchw, x.source)


def _activate(x: Tensor, act: str | None, inplace: bool) -> Any:
    if type(x) is not LazyTensor or act is None or not unchanged(x) or x.pending.act != "none":
        return NotImplemented
    if inplace and (x._data is not None or (not torch.is_grad_enabled() and _requires_grad(x))):
        return NotImplemented  # somebody has that tensor, or autograd is not to see the change
    if not inplace:
        return LazyTensor(take(x)._replace(act=act), x.nchw, x.source)
    pending = x.pending._replace(act=act)
    with torch._C.DisableTorchFunctionSubclass():
        node = x.grad_fn
    if pending.mean is not None and node is not None:  # nothing has used x, so its node may become another
        x.pending, x.raw, node.rest = pending, None, (pending.eps, act)
    else:
        _describe(x, pending, None)
    return x


def _reads(act: str, inplace: bool = False) -> Callable:
    return lambda input, inplace=inplace: (input, act, inplace)


ACTIVATIONS: dict[Callable, Callable] = {  # of its arguments: the tensor, which activation, whether in place
    F.relu: _reads("relu"), torch.relu: _reads("relu"), Tensor.relu: _reads("relu"),
    torch.relu_: _reads("relu", True), Tensor.relu_: _reads("relu", True),
    F.relu6: _reads("relu6"), F.hardswish: _reads("hardswish"), F.silu: _reads("silu"),
    F.hardtanh: lambda input, min_val=-1.0, max_val=1.0, inplace=False: (
        input, "relu6" if (min_val, max_val) == (0, 6) else None, inplace
    ),
}  # fmt: skip


def _sum(x: Any, other: Any) -> Any:
    """x's pending norm and the sum in one pass, in which z is not stored."""
    if type(x) is not LazyTensor or type(other) not in PLAIN or x.nchw or not unchanged(x):
        return NotImplemented
    y = x.pending.x
    if x.pending.mean is None or other.shape != y.shape or other.dtype != y.dtype or other.device != y.device:
        return NotImplemented
    if _listeners:
        tell(x.source, "made real with its sum")
        if type(other) is LazyTensor:
            tell(other.source, "made real by add")
    return ops.norm_act(take(x), real(other))


def _add(input, other, **rest):
    if rest:  # alpha, out
        return NotImplemented
    out = _sum(other, input)  # x + block(x): the block's output is the one that nobody else waits for
    return _sum(input, other) if out is NotImplemented else out


def _add_in_place(input, other, **rest):
    if rest or type(input) is not LazyTensor or input._data is not None:
        return NotImplemented
    out = _sum(input, other)
    if out is not NotImplemented:
        _become(input, out)
    return out


def may_concatenate(parts: list[Pending | None]) -> bool:
    """Whether one norm and activation is pending on all channels: eps and act are no vectors."""
    return all(p is not None and p.mean is not None and p[5:] == parts[0][5:] for p in parts)


def concatenate(parts: list[Pending]) -> Pending:
    """Along the channels, what is pending on them too."""
    xs, means, variances, weights, biases, *_ = zip(*parts)
    if any(w is not None for w in weights):
        weights = [torch.ones_like(m) if w is None else w for w, m in zip(weights, means)]
    if any(b is not None for b in biases):
        biases = [torch.zeros_like(m) if b is None else b for b, m in zip(biases, means)]
    vectors = (None if v[0] is None else torch.cat(v) for v in (means, variances, weights, biases))
    return Pending(torch.cat(xs, 1), *vectors, *parts[0][5:])


def _cat(tensors, dim=0, **rest):
    lazily = all(type(z) is LazyTensor and unchanged(z) for z in tensors)
    if not lazily or dim != 1 or rest or len({z.nchw for z in tensors}) != 1:
        return NotImplemented
    parts = [z.pending for z in tensors]
    if not may_concatenate(parts) or len({p.x.shape[2:] for p in parts}) != 1:
        return NotImplemented
    for z in tensors:
        take(z)
        tell(z.source, "concatenated")
    return LazyTensor(concatenate(parts), tensors[0].nchw, tensors[0].source)


def covers(index: Any, shape: tuple) -> bool:
    """Whether x[index] is all of x, as in GhostNet's x[:, :channels, :, :]."""
    return (
        type(index) is tuple
        and len(index) <= len(shape)
        and all(
            type(s) is slice and s.start in (None, 0) and s.step in (None, 1) and s.stop in (None, n)
            for s, n in zip(index, shape)
        )
    )


def _item(x, index):
    whole = type(x) is LazyTensor and unchanged(x) and covers(index, x.pending.x.shape)
    return x if whole else NotImplemented


PLAIN = (Tensor, nn.Parameter, LazyTensor)


def _gradient(tensors: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.autograd.grad and backward: with respect to z they see what was computed from z itself only."""
    for z in kwargs.get("inputs") or (args[0] if args else ()):
        if type(z) is LazyTensor and z.passed and z.pending is not None:
            raise RuntimeError(
                f"mnops left the output of {z.source or 'a fused layer'} pending, and the gradient goes past it: "
                "call retain_grad() or register_hook() on it before the next layer, or mnops.unfuse the model"
            )
    return NotImplemented


METADATA = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.layout.__get__,
    Tensor.requires_grad.__get__, Tensor.ndim.__get__, Tensor.is_cuda.__get__, Tensor.is_cpu.__get__,
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.__len__,
    Tensor.is_contiguous, Tensor.is_floating_point, Tensor.get_device, torch.is_floating_point, torch.numel,
}  # fmt: skip

FOR_GOOD = {  # watch a tensor, give its memory away or change what autograd knows of it: z is real from then on
    Tensor.grad_fn.__get__, Tensor.register_hook, Tensor.retain_grad, Tensor.requires_grad.__set__,
    Tensor.data.__set__, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr,
    Tensor.untyped_storage, Tensor.storage,
}  # fmt: skip

RULES: dict[Callable, Callable] = {
    F.batch_norm: _batch_norm,
    **{
        func: lambda *args, read=read, **kwargs: _activate(*read(*args, **kwargs))
        for func, read in ACTIVATIONS.items()
    },
    torch.add: _add, Tensor.add: _add, Tensor.__add__: _add, Tensor.__radd__: _add,
    Tensor.add_: _add_in_place, Tensor.__iadd__: _add_in_place,
    torch.cat: _cat, torch.concat: _cat, Tensor.__getitem__: _item,
    torch.autograd.grad: _gradient, torch.autograd.backward: _gradient,
}  # fmt: skip
