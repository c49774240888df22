"""pointwise_conv2d: a 1x1 convolution that normalises on load and measures on store."""

from torch import Tensor

from mnops.ops import _contract as c
from mnops.ops import _register as r

NAME = "pointwise_conv2d"


def pointwise_conv2d(
    x: Tensor | c.Pending, weight: Tensor, measure: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """1x1 convolution that applies x's pending norm as it loads, and measures its output as it stores.

        y[n, :, h, w] = weight @ z[n, :, h, w],   z = act((x - mean) * rstd * gamma + beta)

    Statistics and backward are those of `depthwise_conv2d`, with gz = weight^T gy at every pixel and
    dL/dweight = sum over the pixels of gy z^T.

    Args:
        x: (N, C, H, W), float32, float64, float16 or bfloat16, channels_last or contiguous, or `Pending`.
        weight: (O, C, 1, 1) in x's dtype, or float32 with half x.
        measure: return the statistics of y, over at least one value per channel.

    Returns:
        y (N, O, H, W) in x's dtype and memory format; mean and biased variance of the stored y, (O,)
        float32 (float64 with float64), or (0,) without `measure`.

    Raises:
        ValueError, TypeError: with the rule and the value received.
    """
    args = c.pending_args(x)
    args = (args[0], weight, *args[1:], measure)
    return r.run(NAME, args, check)


def check(x, weight, mean, var, gamma, beta, eps, act, measure) -> tuple[int, ...]:
    """The contract; returns the shape of y."""
    c.check_pending(NAME, x, mean, var, gamma, beta, eps, act)
    n, channels, height, width = x.shape
    shape = weight.shape
    if len(shape) != 4 or shape[1] != channels or shape[2] != 1 or shape[3] != 1:
        rule = f"weight must be (O, C, 1, 1) with C = {channels} as in x"
        raise ValueError(f"{NAME}: {rule}, got {tuple(shape)}")
    c.check_weight(NAME, x, weight)
    c.check_measure(NAME, x, measure)
    return n, shape[0], height, width


def fake(*args):
    return r.conv_outputs(args[0], check(*args), measure=args[-1])


def flops(x_shape, weight_shape, *args, **kwargs) -> int:
    n, channels, height, width = x_shape
    return 2 * n * channels * height * width * weight_shape[0]


def flops_backward(g_shape, g_mean, g_var, y, mean_y, x_shape, weight_shape, *args, **kwargs) -> int:
    need_input, need_weight = args[-2:]
    return (need_input + need_weight) * flops(x_shape, weight_shape)


r.register(NAME, fake, r.conv_backward_fake, r.conv_setup_context, r.conv_backward, flops, flops_backward)
