"""norm_act_pool: norm_act and the average over height and width in one pass, the normalised tensor never stored."""

from torch import Tensor

from mnops.ops import _common as c

NAME = "norm_act_pool"


def norm_act_pool(x: Tensor | c.Pending) -> Tensor:
    """mean over H, W of z = act((x - mean) * rstd * gamma + beta).

    Backward from g (N, C): gz = g / (H * W) at every pixel, then as `norm_act`.

    Args:
        x: (N, C, H, W), a `Pending` one or a Tensor, which is z itself.

    Returns:
        (N, C) in x's dtype, summed in float32 (float64 with float64).

    Raises:
        ValueError, TypeError: with the rule and the value received.
    """
    args = c.pending_args(x, cast=False)
    check(*args)
    return c.run(NAME, args)


def check(x, mean, var, gamma, beta, eps, act) -> None:
    """The contract."""
    c.check_pending(NAME, x, mean, var, gamma, beta, eps, act)


def fake(x, mean, var, gamma, beta, eps, act):
    check(x, mean, var, gamma, beta, eps, act)
    return x.new_empty(x.shape[:2])


def flops(*args, **kwargs) -> int:
    return 0  # as norm_act


c.register(NAME, fake, c.norm_backward_fake, c.norm_setup_context, c.norm_backward, flops, flops)
