"""pointwise_conv2d: a 1x1 convolution; the input's pending norm is applied on load, the output measured on store."""

from torch import Tensor

from mnops.ops import _common as c

NAME = "pointwise_conv2d"


def pointwise_conv2d(
    x: Tensor | c.Pending, weight: Tensor, measure: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """1x1 convolution that normalises on load and measures on store: at every pixel a product over channels.

        y[n, :, h, w] = weight @ z[n, :, h, w],   z = act((x - mean) * rstd * gamma + beta)

    The statistics and the backward are those of `depthwise_conv2d` with gz = weight^T gy and
    dL/dweight = sum over pixels of gy z^T.

    Args:
        x: (N, C, H, W), float32, float64, float16 or bfloat16, channels_last or contiguous; or a `Pending` one.
        weight: (O, C, 1, 1) in x's dtype, or float32 with half x.
        measure: return the statistics of y, over at least one value per channel.

    Returns:
        y (N, O, H, W) in x's dtype and memory format; mean and biased variance of the stored y, (O,) float32
        (float64 with float64), or (0,) without `measure`.

    Raises:
        ValueError, TypeError: with the rule and the value received.
    """
    x, *pending = c.pending_args(x)
    args = (x, weight, *pending, measure)
    check(*args)
    return c.run(NAME, args)


def check(x, weight, mean, var, gamma, beta, eps, act, measure) -> tuple[int, ...]:
    """The contract; returns the shape of y."""
    c.check_pending(NAME, x, mean, var, gamma, beta, eps, act)
    n, channels, height, width = x.shape
    if weight.dim() != 4 or weight.shape[1] != channels or weight.shape[2] != 1 or weight.shape[3] != 1:
        raise ValueError(
            f"{NAME}: weight must be (O, C, 1, 1) with C = {channels} as in x, got {tuple(weight.shape)}"
        )
    c.check_weight(NAME, x, weight)
    c.check_measure(NAME, x, measure)
    return n, weight.shape[0], height, width


def fake(x, weight, mean, var, gamma, beta, eps, act, measure):
    return c.conv_outputs(x, check(x, weight, mean, var, gamma, beta, eps, act, measure), measure)


def flops(x_shape, weight_shape, *args, **kwargs) -> int:
    n, channels, height, width = x_shape
    return 2 * n * channels * height * width * weight_shape[0]


def flops_backward(g_shape, g_mean, g_var, y, mean_y, x_shape, weight_shape, *args, **kwargs) -> int:
    need_input, need_weight = args[-2:]
    return (need_input + need_weight) * flops(x_shape, weight_shape)


c.register(
    NAME, fake, c.conv_backward_fake, c.conv_setup_context, c.conv_backward, flops, flops_backward
)
