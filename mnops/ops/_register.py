"""Fake outputs, autograd formulas and their registration, which the ops share, and the call of an op."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from mnops import backends, reference
from mnops.ops import _flops
from mnops.reference import layout, wide

# ---- fake outputs ----


def like(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


def conv_outputs(x: Tensor, shape: Sequence[int], measure: bool) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (x.new_empty(shape[1] if measure else 0, dtype=wide(x)) for _ in range(2))
    return like(x, shape), mean, var


def _vector_grads(x: Tensor, vectors: Sequence[Tensor | None], need: bool) -> list[Tensor]:
    return [x.new_empty(x.shape[1] if need and v is not None else 0, dtype=wide(x)) for v in vectors]


def conv_backward_fake(g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act, *rest):
    need_input, need_weight = rest[-2:]
    dx = like(x, x.shape) if need_input else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if need_weight else 0)
    return dx, dweight, *_vector_grads(x, (mean, var, gamma, beta), need_input)


def norm_backward_fake(g, x, mean, var, gamma, beta, eps, act):
    return like(x, x.shape), *_vector_grads(x, (mean, var, gamma, beta), True)


# ---- calls ----

_ops: dict[tuple[str, str], tuple[Any, Any]] = {}  # (namespace, name): the op, its formula for eager calls


def needs_grad(args: tuple) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _below_autograd(op: Any, args: tuple) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def run(name: str, args: tuple, check: Callable) -> Any:
    """The op on the backend that serves it; args are the schema's, x first, check(*args) their contract.

    The compiler sees the plain op. Eager calls go round its registered formula, whose generic wrapper reads
    the schema anew at every call (0.1 ms): through an autograd.Function of the same formula, or through none
    where no gradient can be asked for. Forward-mode AD and torch.func's jvp and grad get the reference:
    stock operations have all the rules. So does what is recorded to be run elsewhere.

    The native kernels refuse whatever breaks the contract before they write anything, so check only words the
    error there (it takes as long as they do on a small image).
    """
    device, compiling = args[0].device.type, torch.compiler.is_compiling()
    if backends.recording(args[0]) or (not compiling and backends.transformed()):
        check(*args)
        return getattr(reference, name)(*args)
    namespace = backends.choose(name, device, args)
    op, function = _ops[namespace, name]
    if compiling:
        check(*args)
        return op(*args)
    strict = namespace == "mnops" and device == "cpu"
    if not strict:
        check(*args)
    try:
        return function.apply(*args) if needs_grad(args) else _below_autograd(op, args)
    except RuntimeError:
        if strict:
            check(*args)
        raise


def _run_backward(op: Any, args: tuple) -> Any:
    return op(*args) if needs_grad(args) else _below_autograd(op, args)


# ---- autograd: kept for backward are x, y (the next op's x: one storage), weight and vectors ----


def conv_setup_context(ctx, inputs, output):
    x, weight, mean, var, gamma, beta, eps, act, *geometry, measure = inputs
    y, mean_y, _ = output
    ctx.set_materialize_grads(False)
    ctx.rest = (eps, act, *geometry)
    # y is read only through dL/dmean_y and dL/dvar_y
    ctx.save_for_backward(x, weight, mean, var, gamma, beta, *((y, mean_y) if measure else ()))


def conv_backward(op: Any, ctx, g, g_mean, g_var):
    x, weight, mean, var, gamma, beta, *measured = ctx.saved_tensors
    needs, others = ctx.needs_input_grad[:6], (None,) * (len(ctx.needs_input_grad) - 6)
    if measured:
        y, mean_y = measured
        g = torch.zeros_like(y) if g is None else g
    elif g is None:
        return *(None,) * 6, *others
    else:  # not read
        g_mean, g_var, y, mean_y = None, None, g, x.new_empty(0, dtype=wide(x))
    need_x, need_weight, *need_vectors = needs
    args = (g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, *ctx.rest)
    dx, dweight, *vectors = _run_backward(op, (*args, need_x or any(need_vectors), need_weight))
    # Of a 1x1 or depthwise weight both memory formats are one memory; optimisers and DDP compare strides.
    if need_weight and dweight.stride() != weight.stride() and weight.is_contiguous() and dweight.is_contiguous():
        dweight = dweight.as_strided(weight.shape, weight.stride())
    grads = dx, dweight, *vectors
    return *(grad if need else None for grad, need in zip(grads, needs)), *others


def norm_setup_context(ctx, inputs, output):
    *tensors, eps, act = inputs
    ctx.rest = (eps, act)
    ctx.save_for_backward(*tensors)


def norm_backward(op: Any, ctx, g):
    grads = _run_backward(op, (g, *ctx.saved_tensors, *ctx.rest))
    return *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad)), None, None


def _reference_vjp(name: str) -> tuple[Callable, Callable]:
    """setup_context and backward of a backward op: the vector-Jacobian product of its reference."""
    function = getattr(reference, name)

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in inputs))
        ctx.others = tuple(None if isinstance(a, Tensor) else a for a in inputs)

    def backward(ctx, *grads):
        create_graph, needs = torch.is_grad_enabled(), ctx.needs_input_grad
        with torch.enable_grad():
            # Views make the product partial in each argument: y is an argument of its own, and depends on x.
            tensors = (t.view_as(t) if need else t for t, need in zip(ctx.saved_tensors, needs))
            args = [other if t is None else t for t, other in zip(tensors, ctx.others)]
            outputs = zip(function(*args), grads)
        outputs = [(out, g) for out, g in outputs if g is not None and out.requires_grad]
        if not outputs:
            return (None,) * len(needs)
        wanted = [a for a, need in zip(args, needs) if need]
        found = torch.autograd.grad(
            [out for out, _ in outputs], wanted, [g for _, g in outputs],
            create_graph=create_graph, allow_unused=True,
        )
        found = iter(found)
        return tuple(next(found) if need else None for need in needs)

    return setup_context, backward


# ---- registration ----

_libraries: dict[str, torch.library.Library] = {}  # kept: a Library's registrations end with it


def register(
    name: str, fake: Callable, fake_backward: Callable, setup_context: Callable, backward: Callable,
    flops: Callable, flops_backward: Callable,
) -> None:  # fmt: skip
    """Gives op `name` and its backward op their fake kernels, autograd and FLOP formulas on every backend.

    backward(op, ctx, *grads) is to call `op`, the backward op of the backend that ran forward. The schemas
    are those of the native library; a backend in Python gets the same ones in its namespace.
    """
    fakes = {name: fake, f"{name}_backward": fake_backward}
    for backend in {b.namespace: b for b in backends.BACKENDS.values()}.values():
        qualified = [f"{backend.namespace}::{op}" for op in fakes]
        for op, fake_kernel in fakes.items():
            if backend.module is not None:
                _define(backend, op)
            torch.library.register_fake(f"{backend.namespace}::{op}", fake_kernel)
        forward_op, backward_op = (getattr(getattr(torch.ops, backend.namespace), op) for op in fakes)
        formula = functools.partial(backward, backward_op.default)
        torch.library.register_autograd(qualified[0], formula, setup_context=setup_context)
        setup_again, backward_again = _reference_vjp(f"{name}_backward")
        torch.library.register_autograd(qualified[1], backward_again, setup_context=setup_again)
        _flops.register(forward_op, flops)
        _flops.register(backward_op, flops_backward)
        function = _function(forward_op.default, setup_context, formula)
        _ops[backend.namespace, name] = forward_op.default, function


def register_inference(name: str, fake: Callable, flops: Callable) -> None:
    """The same for an op that has no gradient."""
    for backend in {b.namespace: b for b in backends.BACKENDS.values()}.values():
        if backend.module is not None:
            _define(backend, name)
        torch.library.register_fake(f"{backend.namespace}::{name}", fake)
        op = getattr(getattr(torch.ops, backend.namespace), name)
        _flops.register(op, flops)
        _ops[backend.namespace, name] = op.default, None


def _define(backend: backends.Backend, op: str) -> None:
    """The schema of torch.ops.mnops in the backend's namespace, and its function of that name as kernel."""
    if backend.namespace not in _libraries:
        _libraries[backend.namespace] = torch.library.Library(backend.namespace, "FRAGMENT")
    library = _libraries[backend.namespace]
    schema = str(getattr(torch.ops.mnops, op).default._schema).removeprefix("mnops::")
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)

    def kernel(*args):
        return getattr(importlib.import_module(backend.module), op)(*args)

    library.impl(op, kernel, "CompositeExplicitAutograd")
    if backend.traced:
        _let_compilers_in(backend, op, kernel)


def _let_compilers_in(backend: backends.Backend, name: str, kernel: Callable) -> None:
    """What torch.library.triton_op does: AOTAutograd, so the compiler, gets the kernels in place of the op; an
    exported program keeps the op."""

    def decompose(mode, op, types, args, kwargs):
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode, importlib.import_module(backend.module).inlined():
            return kernel(*args)

    qualified, library = f"{backend.namespace}::{name}", _libraries[backend.namespace]
    torch.library.register_torch_dispatch(qualified, FunctionalTensorMode, decompose, lib=library)


def _function(op: Any, setup_context: Callable, formula: Callable) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = _below_autograd(op, args)
            setup_context(ctx, args, output)
            return output

        backward = staticmethod(formula)

    # Function.apply itself, without what torch.func needs of it: `run` gives that the reference.
    Function.apply = super(torch.autograd.Function, Function).apply
    Function.__name__ = Function.__qualname__ = f"{op.name()}".replace("::", "_")  # grad_fn's name
    return Function
