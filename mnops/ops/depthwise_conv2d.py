"""depthwise_conv2d: one (K, K) filter a channel, that normalises on load and measures on store."""

from collections.abc import Sequence

from torch import Tensor

from mnops.ops import _contract as c
from mnops.ops import _register as r

NAME = "depthwise_conv2d"


def depthwise_conv2d(
    x: Tensor | c.Pending,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    measure: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise convolution that applies x's pending norm as it loads, and measures its output as it stores.

        z      = act(pre), pre = (x - mean) * rstd * gamma + beta     never stored; a Tensor x is z itself
        y      = conv(z, weight), groups = C                          padding pads z with zeros
        mean_y = mean(y), var_y = mean((y - mean_y)^2)                over N, H, W; differentiable

    Backward, from g = dL/dy, g_mean = dL/dmean_y, g_var = dL/dvar_y, with P = N * Ho * Wo:

        gy       = g + g_mean / P + 2 (y - mean_y) g_var / P
        gz       = conv_transpose(gy, weight)        dL/dweight = correlate(z, gy)
        gp       = gz * act'(pre)                    dL/dx      = gp * gamma * rstd
        dL/dbeta = sum gp                            dL/dgamma  = sum gp * (x - mean) * rstd
        dL/dmean = -gamma * rstd * sum gp            dL/dvar    = -1/2 * gamma * rstd^2 * dL/dgamma

    BatchNorm is that of arXiv:1502.03167, its fusion with the convolutions around it arXiv:1807.01702's.

    Args:
        x: (N, C, H, W), float32, float64, float16 or bfloat16, channels_last or contiguous, or `Pending`.
        weight: (C, 1, K, K) in x's dtype, or float32 with half x.
        stride, dilation: int or (height, width).
        padding: int, (height, width), (top, bottom, left, right), "valid" or "same" (TensorFlow's SAME).
        measure: return the statistics of y, over at least one value per channel.

    Returns:
        y (N, C, Ho, Wo) in x's dtype and memory format; mean and biased variance of the stored y, (C,)
        float32 (float64 with float64), or (0,) without `measure`.

    Raises:
        ValueError, TypeError: with the rule and the value received.
    """
    x, *pending = c.pending_args(x)
    stride, dilation = c.pair(NAME, "stride", stride), c.pair(NAME, "dilation", dilation)
    padding = c.four_sides(NAME, padding, x, weight, stride, dilation)
    args = (x, weight, *pending, stride, padding, dilation, measure)
    return r.run(NAME, args, check)


def check(
    x, weight, mean, var, gamma, beta, eps, act, stride, padding, dilation, measure, name=NAME
) -> tuple[int, ...]:
    """The contract; returns the shape of y."""
    c.check_pending(name, x, mean, var, gamma, beta, eps, act)
    n, channels, _, _ = x.shape
    shape = weight.shape
    if len(shape) != 4 or shape[0] != channels or shape[1] != 1 or shape[2] != shape[3]:
        rule = f"weight must be (C, 1, K, K) with C = {channels} as in x"
        raise ValueError(f"{name}: {rule}, got {tuple(shape)}")
    c.check_weight(name, x, weight)
    c.check_measure(name, x, measure)
    return n, channels, *c.out_size(name, x, weight, stride, padding, dilation)


def fake(*args):
    return r.conv_outputs(args[0], check(*args), measure=args[-1])


def flops(x_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    n, channels, height, width = out_shape[0]
    return 2 * n * channels * height * width * weight_shape[2] * weight_shape[3]


def flops_backward(g_shape, g_mean, g_var, y, mean_y, x_shape, weight_shape, *args, **kwargs) -> int:
    need_input, need_weight = args[-2:]
    return (need_input + need_weight) * flops(x_shape, weight_shape, out_shape=(g_shape,))


r.register(NAME, fake, r.conv_backward_fake, r.conv_setup_context, r.conv_backward, flops, flops_backward)
