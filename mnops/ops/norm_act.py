"""norm_act: makes a pending tensor real, at the network's end, at a tap, wherever a stock module follows."""

from torch import Tensor
from torch.fx import Proxy

from mnops.ops import _contract as c
from mnops.ops import _register as r

NAME = "norm_act"


def norm_act(x: Tensor | c.Pending, residual: Tensor | None = None) -> Tensor:
    """z = act((x - mean) * rstd * gamma + beta), stored; with a residual z + residual, in the same pass.

    Backward from g = dL/dz: gp = g * act'(pre), and from it all gradients as in `depthwise_conv2d`; dresidual
    is g.

    Args:
        x: `Pending` (N, C, H, W). A Tensor, or one with neither norm nor activation pending, is z itself.
        residual: of x's shape and dtype.

    Returns:
        z (N, C, H, W) in x's dtype and memory format.

    Raises:
        ValueError, TypeError: with the rule and the value received.
    """
    if isinstance(x, c.Pending) and x.act == "none" and all(v is None for v in x[1:5]):
        x = x.x
    if isinstance(x, (Tensor, Proxy)):
        return x if residual is None else x + residual
    args = c.pending_args(x, cast=False)
    if residual is not None:
        args = (*args, residual)
    return r.run(NAME, args, check)


def check(x, mean, var, gamma, beta, eps, act, residual=None) -> None:
    """The contract."""
    c.check_pending(NAME, x, mean, var, gamma, beta, eps, act)
    if residual is None:
        return
    if residual.shape != x.shape:
        raise ValueError(f"{NAME}: residual must be {tuple(x.shape)} as x, got {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"{NAME}: residual must be {x.dtype} as x, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"{NAME}: residual must be on {x.device} as x, got {residual.device}")


def fake(*args):
    check(*args)
    return r.like(args[0], args[0].shape)


def setup_context(ctx, inputs, output):
    r.norm_setup_context(ctx, inputs[:7], output)


def backward(op, ctx, g):
    norm = r.norm_backward(op, ctx, g) if any(ctx.needs_input_grad[:5]) else (None,) * 7
    return *norm, *(g if need else None for need in ctx.needs_input_grad[7:])  # residual, if it was given


def flops(*args, **kwargs) -> int:
    return 0  # torch.utils.flop_counter counts products only: so totals compare with the stock network's


r.register(NAME, fake, r.norm_backward_fake, setup_context, backward, flops, flops)
