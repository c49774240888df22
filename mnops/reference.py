"""The definition of every op in stock PyTorch: forward and backward, differentiable, on any device.

Each function takes the arguments of its schema, `torch.ops.mnops.<name>`, in the same order. Half precision
is computed in fp32 and rounded where a tensor is stored; fp64 stays fp64. The backward functions spell the
equations out rather than ask autograd: so autograd through the forward checks them, and they can be
differentiated again.

A *pending* norm (mean, var, gamma, beta, eps, act) belongs to x and is applied on load:

    z = act(pre),   pre = (x - mean) * rstd * gamma + beta,   rstd = (var + eps)^(-1/2)

mean and var None: z = act(x). gamma None: 1. beta None: 0. Padding pads z with zeros.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Vector = Tensor | None


def _hardswish_grad(p: Tensor) -> Tensor:
    return torch.where(p <= -3, 0.0, torch.where(p < 3, p / 3 + 0.5, 1.0))


def _silu_grad(p: Tensor) -> Tensor:
    s = torch.sigmoid(p)
    return s * (1 + p * (1 - s))


# name: (act, act'). At a kink act' is what torch's own backward takes there.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "none": (lambda p: p, torch.ones_like),
    "relu": (F.relu, lambda p: (p > 0).to(p.dtype)),
    "relu6": (F.relu6, lambda p: ((p > 0) & (p < 6)).to(p.dtype)),
    "hardswish": (F.hardswish, _hardswish_grad),
    "silu": (F.silu, _silu_grad),
}


def wide(x: Tensor) -> torch.dtype:
    """The dtype that sums, statistics and norm vectors of x have: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def layout(x: Tensor) -> torch.memory_format:
    """Memory format of what is made from x: contiguous NCHW is given back as such, all else channels_last."""
    nchw = x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if nchw else torch.channels_last


def _store(z: Tensor, x: Tensor) -> Tensor:
    if torch._C._are_functorch_transforms_active():  # torch.func.vmap knows no memory formats
        return z.to(dtype=x.dtype, copy=z is x)
    return z.to(dtype=x.dtype, memory_format=layout(x), copy=z is x)


def _channel(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1)


def _pre(x: Tensor, mean: Vector, var: Vector, gamma: Vector, beta: Vector, eps: float) -> Tensor:
    x = x.to(wide(x))
    if mean is None:
        return x
    scale = (var + eps).rsqrt() if gamma is None else (var + eps).rsqrt() * gamma
    pre = (x - _channel(mean)) * _channel(scale)
    return pre if beta is None else pre + _channel(beta)


def _pending_backward(
    gz: Tensor, x: Tensor, mean: Vector, var: Vector, gamma: Vector, beta: Vector, eps: float, act: str
) -> tuple[Tensor, ...]:
    """From gz = dL/dz to dL/dx, dL/dmean, dL/dvar, dL/dgamma, dL/dbeta; sums run over N, H, W.

    gp     = gz * act'(pre)
    dbeta  = sum gp
    dgamma = sum gp * (x - mean) * rstd          not sum gp * x: |mean| / std may be 1000
    dmean  = -gamma * rstd * sum gp
    dvar   = -1/2 * gamma * rstd^2 * dgamma
    dx     = gp * gamma * rstd
    """
    gp = gz * ACTIVATIONS[act][1](_pre(x, mean, var, gamma, beta, eps))
    if mean is None:
        return _store(gp, x), *(gp.new_empty(0) for _ in range(4))
    rstd = (var + eps).rsqrt()
    scale = rstd if gamma is None else rstd * gamma
    dbeta = gp.sum((0, 2, 3))
    dgamma = (gp * (x.to(gp.dtype) - _channel(mean))).sum((0, 2, 3)) * rstd
    dx = _store(gp * _channel(scale), x)
    return (
        dx,
        -scale * dbeta,
        -0.5 * scale * rstd * dgamma,
        gp.new_empty(0) if gamma is None else dgamma,
        gp.new_empty(0) if beta is None else dbeta,
    )


def _conv2d(x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation, measure):
    z = ACTIVATIONS[act][0](_pre(x, mean, var, gamma, beta, eps))
    top, bottom, left, right = padding
    z = F.pad(z, (left, right, top, bottom))
    groups = x.shape[1] // weight.shape[1]
    y = _store(F.conv2d(z, weight.to(z.dtype), None, stride, 0, dilation, groups), x)
    if not measure:
        return y, z.new_empty(0), z.new_empty(0)
    var_y, mean_y = torch.var_mean(y.to(z.dtype), (0, 2, 3), correction=0)
    return y, mean_y, var_y


def _conv2d_backward(
    g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act,
    stride, padding, dilation, need_input, need_weight,
):
    """P = N * Ho * Wo:

    gy = g + g_mean / P + 2 * (y - mean_y) * g_var / P
    gz = conv_transpose(gy, w),   gw = correlate(z, gy),   then _pending_backward(gz)
    """
    gy, count = g.to(wide(x)), g.numel() // max(g.shape[1], 1)
    if g_mean is not None:
        gy = gy + _channel(g_mean) / count
    if g_var is not None:
        gy = gy + (y.to(gy.dtype) - _channel(mean_y)) * _channel(g_var) * (2 / count)
    z = ACTIVATIONS[act][0](_pre(x, mean, var, gamma, beta, eps))
    (top, bottom, left, right), (height, width) = padding, z.shape[2:]
    z = F.pad(z, (left, right, top, bottom))
    groups, need = x.shape[1] // weight.shape[1], [need_input, need_weight, False]
    gz, gw, _ = torch.ops.aten.convolution_backward(
        gy, z, weight.to(z.dtype), None, stride, [0, 0], dilation, False, [0, 0], groups, need
    )
    if need_weight:
        gw = gw.to(weight.dtype, memory_format=torch.contiguous_format)
    else:
        gw = weight.new_empty(0)
    if not need_input:
        return x.new_empty(0), gw, *(z.new_empty(0) for _ in range(4))
    gz = gz[:, :, top : top + height, left : left + width]
    dx, *vectors = _pending_backward(gz, x, mean, var, gamma, beta, eps, act)
    return dx, gw, *vectors


def depthwise_conv2d(
    x: Tensor, weight: Tensor, mean: Vector = None, var: Vector = None, gamma: Vector = None,
    beta: Vector = None, eps: float = 1e-5, act: str = "none", stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0), dilation: Sequence[int] = (1, 1), measure: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = conv(z, weight), one (K, K) filter a channel; mean and biased variance over N, H, W of stored y.

    x (N, C, H, W); weight (C, 1, K, K); padding [top, bottom, left, right] -> y, mean (C,), var (C,); without
    `measure` mean and var are (0,).
    """
    return _conv2d(x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation, measure)


def depthwise_conv2d_backward(
    g: Tensor, g_mean: Vector, g_var: Vector, y: Tensor, mean_y: Tensor, x: Tensor, weight: Tensor,
    mean: Vector, var: Vector, gamma: Vector, beta: Vector, eps: float, act: str, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], need_input: bool = True, need_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dmean, dvar, dgamma, dbeta from g = dL/dy, g_mean = dL/dmean_y, g_var = dL/dvar_y."""
    return _conv2d_backward(
        g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act,
        stride, padding, dilation, need_input, need_weight,
    )


def pointwise_conv2d(
    x: Tensor, weight: Tensor, mean: Vector = None, var: Vector = None, gamma: Vector = None,
    beta: Vector = None, eps: float = 1e-5, act: str = "none", measure: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As depthwise_conv2d with weight (O, C, 1, 1): a product over channels at every pixel."""
    return _conv2d(x, weight, mean, var, gamma, beta, eps, act, (1, 1), (0, 0, 0, 0), (1, 1), measure)


def pointwise_conv2d_backward(
    g: Tensor, g_mean: Vector, g_var: Vector, y: Tensor, mean_y: Tensor, x: Tensor, weight: Tensor,
    mean: Vector, var: Vector, gamma: Vector, beta: Vector, eps: float, act: str,
    need_input: bool = True, need_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As depthwise_conv2d_backward."""
    return _conv2d_backward(
        g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act,
        (1, 1), (0, 0, 0, 0), (1, 1), need_input, need_weight,
    )


def stem_conv2d(
    x: Tensor, weight: Tensor, mean: Vector = None, var: Vector = None, gamma: Vector = None,
    beta: Vector = None, eps: float = 1e-5, act: str = "none", stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0), measure: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As depthwise_conv2d with a dense weight (O, C, K, K)."""
    return _conv2d(x, weight, mean, var, gamma, beta, eps, act, stride, padding, (1, 1), measure)


def stem_conv2d_backward(
    g: Tensor, g_mean: Vector, g_var: Vector, y: Tensor, mean_y: Tensor, x: Tensor, weight: Tensor,
    mean: Vector, var: Vector, gamma: Vector, beta: Vector, eps: float, act: str, stride: Sequence[int],
    padding: Sequence[int], need_input: bool = True, need_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As depthwise_conv2d_backward."""
    return _conv2d_backward(
        g, g_mean, g_var, y, mean_y, x, weight, mean, var, gamma, beta, eps, act,
        stride, padding, (1, 1), need_input, need_weight,
    )


def separable_conv2d(
    x: Tensor, depthwise_weight: Tensor, weight: Tensor, mean: Vector, var: Vector, gamma: Vector, beta: Vector,
    eps: float, act: str, mid_mean: Vector, mid_var: Vector, mid_gamma: Vector, mid_beta: Vector, mid_eps: float,
    mid_act: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """y of depthwise_conv2d, the norm `mid` of what it gives, and pointwise_conv2d; rounded to x's dtype once."""
    wide_x, taps, product = (t.to(wide(x)) for t in (x, depthwise_weight, weight))
    y, _, _ = depthwise_conv2d(wide_x, taps, mean, var, gamma, beta, eps, act, stride, padding, dilation)
    y, _, _ = pointwise_conv2d(y, product, mid_mean, mid_var, mid_gamma, mid_beta, mid_eps, mid_act)
    return _store(y, x)


# How run_layers writes layers down: each is so many ints (its kind's index here, the value that it reads, its
# arguments) and one eps. A tensor is an index, -1 for none; an activation one into ACTS.
LAYER_KINDS = ("stem", "depthwise", "pointwise", "norm", "sum", "pool")
LAYER_INTS = 11
GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}
ACTS = tuple(ACTIVATIONS)


def run_layers(
    x: Tensor, others: Sequence[Tensor], tensors: Sequence[Tensor], eps: Sequence[float], layers: Sequence[int],
    results: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Values x, others and what each layer makes of them in turn; those of `results`."""
    raw = [(x.contiguous(memory_format=torch.channels_last), ()) for x in (x, *others)]
    convolutions = dict(stem=stem_conv2d, depthwise=depthwise_conv2d, pointwise=pointwise_conv2d)
    for kind, source, args in of_each_layer(len(raw), tensors, eps, layers):
        x, norm = raw[source]
        if kind in convolutions:
            weight, *geometry = args
            if kind == "pointwise" and geometry:
                (gate, of_gate), gating = raw[geometry[0]], GATES[geometry[1]]
                gate = gating((norm_act(gate, *of_gate) if of_gate else gate).to(wide(x)))
                x, norm, geometry = _store(norm_act(x.to(wide(x)), *(norm or NO_NORM)) * gate, x), (), ()
            y, _, _ = convolutions[kind](x, weight, *(norm or NO_NORM), *geometry)
            raw.append((y, ()))
        elif kind == "norm":
            mean, var, gamma, beta = (v if v is None else v.to(wide(x)) for v in args[:4])
            if mean is None and beta is not None:
                mean, var, beta, args = -beta, torch.ones_like(beta), None, (*args[:4], 0.0, args[5])
            raw.append((norm_act(x, *norm) if norm else x, (mean, var, gamma, beta, *args[4:])))
        elif kind == "sum":
            z, other = (norm_act(t, *n) if n else t for t, n in (raw[source], raw[args[0]]))
            raw.append((_store(z.to(wide(z)) + other, z), ()))
        else:
            raw.append((norm_act_pool(x, *(norm or NO_NORM))[:, :, None, None], ()))
    for i in results:
        refuse_unknown(i, len(raw))
    return [norm_act(x, *norm) if norm else x for x, norm in (raw[i] for i in results)]


NO_NORM = (None, None, None, None, 0.0, "none")


def of_each_layer(
    inputs: int, tensors: Sequence, eps: Sequence[float], layers: Sequence[int]
) -> Iterator[tuple[str, int, tuple]]:
    """Kind, the value that it reads, and its arguments: of a convolution the weight and what follows the pending
    norm in the schema, of a pointwise one the gate's value and kind, if there is one; of a norm the norm.

    ValueError where what is written down means nothing.
    """
    if len(layers) != LAYER_INTS * len(eps):
        rule = f"a layer has {LAYER_INTS} ints and an eps"
        raise ValueError(f"run_layers: {rule}, got {len(layers)} and {len(eps)}")
    for i in range(len(eps)):
        kind, x, *a = layers[LAYER_INTS * i : LAYER_INTS * (i + 1)]
        kind = _item(LAYER_KINDS, kind, "unknown kind of layer")
        refuse_unknown(x, inputs + i)
        if kind == "norm":
            vectors = (None if j < 0 else _item(tensors, j, "there is no tensor") for j in a[:4])
            args = *vectors, eps[i], _item(ACTS, a[4], "unknown activation")
        elif kind == "sum":
            refuse_unknown(a[0], inputs + i)
            args = (a[0],)
        elif kind == "pool":
            args = ()
        else:
            rest = {"stem": (a[1:3], a[3:7]), "depthwise": (a[1:3], a[3:7], a[7:9]), "pointwise": ()}[kind]
            if kind == "pointwise" and a[1] >= 0:
                refuse_unknown(a[1], inputs + i)
                rest = a[1], _item(list(GATES), a[2], "unknown kind of gate")
            if kind == "pointwise" and a[3] >= 0:  # the packed weight, which is only sooner there
                _item(tensors, a[3], "there is no tensor")
            args = _item(tensors, a[0], "there is no weight"), *rest
        yield kind, x, args


def refuse_unknown(value: int, known: int) -> None:
    if not 0 <= value < known:
        raise ValueError(f"run_layers: value {value} is read where {known} are known")


def _item(items: Sequence, i: int, otherwise: str) -> Any:
    if not 0 <= i < len(items):
        raise ValueError(f"run_layers: {otherwise} {i}")
    return items[i]


def norm_act(
    x: Tensor, mean: Vector = None, var: Vector = None, gamma: Vector = None, beta: Vector = None,
    eps: float = 1e-5, act: str = "none", residual: Tensor | None = None,
) -> Tensor:
    """z + residual, (N, C, H, W): the pending norm and activation applied. dresidual is g."""
    z = ACTIVATIONS[act][0](_pre(x, mean, var, gamma, beta, eps))
    return _store(z if residual is None else z + residual, x)


def norm_act_backward(
    g: Tensor, x: Tensor, mean: Vector, var: Vector, gamma: Vector, beta: Vector, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dmean, dvar, dgamma, dbeta from g = dL/dz."""
    return _pending_backward(g.to(wide(x)), x, mean, var, gamma, beta, eps, act)


def norm_act_pool(
    x: Tensor, mean: Vector = None, var: Vector = None, gamma: Vector = None, beta: Vector = None,
    eps: float = 1e-5, act: str = "none",
) -> Tensor:
    """The mean of z over H and W, (N, C)."""
    return ACTIVATIONS[act][0](_pre(x, mean, var, gamma, beta, eps)).mean((2, 3)).to(x.dtype)


def norm_act_pool_backward(
    g: Tensor, x: Tensor, mean: Vector, var: Vector, gamma: Vector, beta: Vector, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As norm_act_backward with g (N, C): gz = g / (H * W) at every pixel."""
    gz = (g.to(wide(x)) / (x.shape[2] * x.shape[3]))[:, :, None, None].expand(x.shape)
    return _pending_backward(gz, x, mean, var, gamma, beta, eps, act)
