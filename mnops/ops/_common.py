"""What the ops share: pending tensors, the contract, the choice of a backend, autograd and registration."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mnops import backends, reference
from mnops.reference import ACTIVATIONS, layout, wide

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Pending(NamedTuple):
    """A stored tensor x (N, C, H, W) whose BatchNorm and activation the next op applies as it loads:

    z = act((x - mean) * (var + eps)^(-1/2) * weight + bias), with vectors (C,).

    mean and var None: z = act(x). weight None: 1. bias None: 0.
    """

    x: Tensor
    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    act: str = "none"


# ---- arguments: from what the user gives to what the schemas take ----


def pending_args(x: Tensor | Pending, cast: bool = True) -> tuple:
    """x, mean, var, gamma, beta, eps, act of the schemas. Under autocast a convolution's x takes the autocast dtype
    (weights stay fp32: the kernels accumulate in fp32 anyway); norm vectors of half modules are widened."""
    if not isinstance(x, Pending):
        x = Pending(x)
    t, mean, var, gamma, beta, eps, act = x
    if not isinstance(t, Tensor):
        raise TypeError(f"x must be a Tensor or a Pending one, got {type(t).__name__}")
    if cast and t.dtype == torch.float32 and torch.is_autocast_enabled(t.device.type):
        t = t.to(torch.get_autocast_dtype(t.device.type))
    if mean is not None or var is not None or gamma is not None or beta is not None:
        dtype = wide(t)
        mean, var, gamma, beta = (
            v if v is None or v.dtype == dtype else v.to(dtype) for v in (mean, var, gamma, beta)
        )
    return t, mean, var, gamma, beta, eps, act


def pair(op: str, what: str, value: int | Sequence[int]) -> list[int]:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{op}: {what} must be one int or two, got {value}")
        return list(value)
    return [value, value]


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Padding before and after one dimension so that the output has ceil(size / stride) pixels, as TensorFlow's SAME:
    the odd pixel goes after, so stride 2 on an even size pads one side only, and depends on the input's size."""
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def four_sides(
    op: str, padding: int | Sequence[int] | str, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]
) -> list[int]:
    """[top, bottom, left, right] from one int, (height, width), the four themselves, "same" or "valid"."""
    if isinstance(padding, str):
        if padding == "valid":
            return [0, 0, 0, 0]
        if padding != "same":
            raise ValueError(f'{op}: padding must be ints, "same" or "valid", got {padding!r}')
        if x.dim() != 4 or weight.dim() != 4:
            return [0, 0, 0, 0]  # the contract refuses it
        top, bottom = same_padding(x.shape[2], weight.shape[2], stride[0], dilation[0])
        left, right = same_padding(x.shape[3], weight.shape[3], stride[1], dilation[1])
        return [top, bottom, left, right]
    if isinstance(padding, (tuple, list)):
        if len(padding) == 4:
            return list(padding)
        if len(padding) != 2:
            raise ValueError(f"{op}: padding must be one int, two or four, got {padding}")
        height, width = padding
        return [height, height, width, width]
    return [padding] * 4


# ---- the contract: plain ifs, because they run at every call and are traced with symbolic sizes ----


def check_pending(op: str, x: Tensor, mean, var, gamma, beta, eps: float, act: str) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be (N, C, H, W), got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    _, channels, height, width = x.shape
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"{op}: C, H and W of x must be positive, got {tuple(x.shape)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if mean is None and var is None and gamma is None and beta is None:
        return
    if mean is None or var is None:
        raise ValueError(f"{op}: mean and var must be given together, and with weight and bias")
    dtype = wide(x)
    for what, v in (("mean", mean), ("var", var), ("weight of the norm", gamma), ("bias of the norm", beta)):
        if v is None:
            continue
        if v.dim() != 1 or v.shape[0] != channels:
            raise ValueError(f"{op}: {what} must be (C,) with C = {channels} as in x, got {tuple(v.shape)}")
        if v.dtype != dtype:
            raise TypeError(f"{op}: {what} must be {dtype} for x of {x.dtype}, got {v.dtype}")
        if v.device != x.device:
            raise ValueError(f"{op}: {what} must be on {x.device} as x, got {v.device}")


def check_weight(op: str, x: Tensor, weight: Tensor) -> None:
    if weight.dtype != x.dtype and (weight.dtype != torch.float32 or x.dtype == torch.float64):
        rule = f"{x.dtype} as x" if wide(x) == x.dtype else f"{x.dtype} as x or torch.float32"
        raise TypeError(f"{op}: weight must be {rule}, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"{op}: weight must be on {x.device} as x, got {weight.device}")


def out_size(
    op: str, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of y: floor((size + padding - dilation * (K - 1) - 1) / stride) + 1."""
    if stride[0] < 1 or stride[1] < 1:
        raise ValueError(f"{op}: stride must be positive, got {list(stride)}")
    if dilation[0] < 1 or dilation[1] < 1:
        raise ValueError(f"{op}: dilation must be positive, got {list(dilation)}")
    top, bottom, left, right = padding
    if top < 0 or bottom < 0 or left < 0 or right < 0:
        raise ValueError(f"{op}: padding must not be negative, got {list(padding)}")
    _, _, height, width = x.shape
    reach = weight.shape[2] - 1
    spare_h, spare_w = height + top + bottom - dilation[0] * reach - 1, width + left + right - dilation[1] * reach - 1
    if spare_h < 0 or spare_w < 0:
        raise ValueError(
            f"{op}: the kernel must fit the padded input, got K = {weight.shape[2]}, dilation {list(dilation)}, "
            f"padding {list(padding)} on {height} x {width}"
        )
    return spare_h // stride[0] + 1, spare_w // stride[1] + 1


def check_measure(op: str, x: Tensor, measure: bool) -> None:
    if measure and x.shape[0] == 0:
        raise ValueError(f"{op}: measuring needs at least one value per channel, got an empty batch {tuple(x.shape)}")


# ---- fake outputs ----


def like(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


def conv_outputs(x: Tensor, shape: Sequence[int], measure: bool) -> tuple[Tensor, Tensor, Tensor]:
    vectors = (x.new_empty(shape[1] if measure else 0, dtype=wide(x)) for _ in range(2))
    return like(x, shape), *vectors


def _vector_grads(x: Tensor, vectors: Sequence[Tensor | None], need: bool) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[1] if need and v is not None else 0, dtype=wide(x)) for v in vectors)


def conv_backward_fake(g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act, *rest):
    need_input, need_weight = rest[-2:]
    dx = like(x, x.shape) if need_input else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if need_weight else 0)
    return dx, dweight, *_vector_grads(x, (mean, var, gamma, beta), need_input)


def norm_backward_fake(g, x, mean, var, gamma, beta, eps, act):
    return like(x, x.shape), *_vector_grads(x, (mean, var, gamma, beta), True)


# ---- calls ----


def call(op: Any, args: tuple) -> Any:
    """op(*args), below autograd where no gradient can be asked for: the Python formula costs 10 to 60 us a call."""
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    ):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def run(name: str, args: tuple) -> Any:
    """The op on the backend that serves it; args are the schema's, x first."""
    return call(_overloads[backends.choose(name, args[0].device.type), name], args)


# ---- autograd: what is kept for backward is x, y (the next op's x: one storage), weight and vectors ----


def conv_setup_context(ctx, inputs, output):
    x, weight, mean, var, gamma, beta, eps, act, *geometry, measure = inputs
    y, mean_y, _ = output
    ctx.set_materialize_grads(False)
    ctx.rest = (eps, act, *geometry)
    # y is only read through dL/dmean_y and dL/dvar_y
    ctx.save_for_backward(x, weight, mean, var, gamma, beta, *((y, mean_y) if measure else ()))


def conv_backward(op: Any, ctx, g, g_mean, g_var):
    x, weight, mean, var, gamma, beta, *measured = ctx.saved_tensors
    n_args = len(ctx.needs_input_grad)
    if not measured:
        if g is None:
            return (None,) * n_args
        g_mean = g_var = None
        measured = g, x.new_empty(0, dtype=wide(x))
    y, mean_y = measured
    if g is None:
        g = torch.zeros_like(y)
    need_x, need_weight, *need_vectors = ctx.needs_input_grad[:6]
    args = (g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, *ctx.rest)
    dx, dweight, *dvectors = call(op, (*args, need_x or any(need_vectors), need_weight))
    grads = (d if need else None for d, need in zip((dx, dweight, *dvectors), ctx.needs_input_grad[:6], strict=True))
    return *grads, *(None,) * (n_args - 6)


def norm_setup_context(ctx, inputs, output):
    *tensors, eps, act = inputs
    ctx.rest = (eps, act)
    ctx.save_for_backward(*tensors)


def norm_backward(op: Any, ctx, g):
    grads = call(op, (g, *ctx.saved_tensors, *ctx.rest))
    return *(d if need else None for d, need in zip(grads, ctx.needs_input_grad[:5], strict=True)), None, None


def _reference_vjp(name: str) -> tuple[Callable, Callable]:
    """setup_context and backward of a backward op: the vector-Jacobian product of its reference."""
    function = getattr(reference, name)

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in inputs))
        ctx.others = tuple(None if isinstance(a, Tensor) else a for a in inputs)

    def backward(ctx, *grads):
        create_graph, need = torch.is_grad_enabled(), ctx.needs_input_grad
        with torch.enable_grad():
            # Views, so that the product is partial in each argument: y is an argument, and depends on x.
            tensors = (t.view_as(t) if n else t for t, n in zip(ctx.saved_tensors, need, strict=True))
            args = [o if t is None else t for t, o in zip(tensors, ctx.others, strict=True)]
            outputs = [(o, g) for o, g in zip(function(*args), grads, strict=True) if g is not None and o.requires_grad]
        if not outputs:
            return (None,) * len(need)
        wanted = [a for a, n in zip(args, need, strict=True) if n]
        found = iter(torch.autograd.grad(*zip(*outputs), create_graph=create_graph, allow_unused=True, inputs=wanted))
        return tuple(next(found) if n else None for n in need)

    return setup_context, backward


# ---- registration ----

_libraries: dict[str, torch.library.Library] = {}  # kept alive: a Library's registrations end with it
_overloads: dict[tuple[str, str], Any] = {}  # (namespace, op): what run() calls


def _python_kernel(backend: backends.Backend, name: str) -> Callable:
    def kernel(*args):
        import importlib

        return getattr(importlib.import_module(backend.module), name)(*args)

    return kernel


def register(
    name: str, fake: Callable, fake_backward: Callable, setup_context: Callable, backward: Callable,
    flops: Callable, flops_backward: Callable,
) -> None:  # fmt: skip
    """Gives op `name` and its backward op their fake kernels, autograd formulas and FLOP formulas on every backend.

    backward(op, ctx, *grads) calls `op`, the backward op of the backend that ran forward. The schemas are those of
    the native library; a backend of another namespace gets the same ones.
    """
    name_backward = f"{name}_backward"
    for backend in {b.namespace: b for b in backends.BACKENDS.values()}.values():
        namespace = backend.namespace
        for op, fake_kernel in ((name, fake), (name_backward, fake_backward)):
            if backend.module is not None:
                library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
                schema = str(getattr(torch.ops.mnops, op).default._schema).removeprefix("mnops::")
                library.define(schema, tags=torch.Tag.pt2_compliant_tag)
                library.impl(op, _python_kernel(backend, op), "CompositeExplicitAutograd")
            torch.library.register_fake(f"{namespace}::{op}", fake_kernel)
        forward_op, backward_op = (getattr(getattr(torch.ops, namespace), op) for op in (name, name_backward))
        _overloads[namespace, name] = forward_op.default
        torch.library.register_autograd(
            f"{namespace}::{name}", _bind(backward, backward_op.default), setup_context=setup_context
        )
        setup_again, backward_again = _reference_vjp(name_backward)
        torch.library.register_autograd(f"{namespace}::{name_backward}", backward_again, setup_context=setup_again)
        register_flop_formula(forward_op)(flops)
        register_flop_formula(backward_op)(flops_backward)


def _bind(backward: Callable, op: Any) -> Callable:
    return lambda ctx, *grads: backward(op, ctx, *grads)
