"""stem_conv2d: the dense convolution of a network's first layer, few channels in; otherwise as depthwise_conv2d."""

from collections.abc import Sequence

from torch import Tensor

from mnops.ops import _common as c

NAME = "stem_conv2d"


def stem_conv2d(
    x: Tensor | c.Pending,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    measure: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense convolution that normalises on load and measures on store.

    The equations are those of `depthwise_conv2d` with a filter from every input to every output channel.

    Args:
        x: (N, C, H, W), float32, float64, float16 or bfloat16, channels_last or contiguous; or a `Pending` one.
        weight: (O, C, K, K) in x's dtype, or float32 with half x.
        stride: int or (height, width).
        padding: int, (height, width), (top, bottom, left, right), "valid", or "same": TensorFlow's SAME.
        measure: return the statistics of y, over at least one value per channel.

    Returns:
        y (N, O, Ho, Wo) in x's dtype and memory format; mean and biased variance of the stored y, (O,) float32
        (float64 with float64), or (0,) without `measure`.

    Raises:
        ValueError, TypeError: with the rule and the value received.
    """
    x, *pending = c.pending_args(x)
    stride = c.pair(NAME, "stride", stride)
    padding = c.four_sides(NAME, padding, x, weight, stride, [1, 1])
    args = (x, weight, *pending, stride, padding, measure)
    check(*args)
    return c.run(NAME, args)


def check(x, weight, mean, var, gamma, beta, eps, act, stride, padding, measure) -> tuple[int, ...]:
    """The contract; returns the shape of y."""
    c.check_pending(NAME, x, mean, var, gamma, beta, eps, act)
    n, channels, _, _ = x.shape
    if weight.dim() != 4 or weight.shape[1] != channels or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"{NAME}: weight must be (O, C, K, K) with C = {channels} as in x, got {tuple(weight.shape)}"
        )
    c.check_weight(NAME, x, weight)
    c.check_measure(NAME, x, measure)
    return n, weight.shape[0], *c.out_size(NAME, x, weight, stride, padding, (1, 1))


def fake(x, weight, mean, var, gamma, beta, eps, act, stride, padding, measure):
    shape = check(x, weight, mean, var, gamma, beta, eps, act, stride, padding, measure)
    return c.conv_outputs(x, shape, measure)


def flops(x_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    n, _, height, width = out_shape[0]
    o, channels, k, _ = weight_shape
    return 2 * n * o * channels * height * width * k * k


def flops_backward(g_shape, g_mean, g_var, y, mean_y, x_shape, weight_shape, *args, **kwargs) -> int:
    need_input, need_weight = args[-2:]
    return (need_input + need_weight) * flops(x_shape, weight_shape, out_shape=(g_shape,))


c.register(
    NAME, fake, c.conv_backward_fake, c.conv_setup_context, c.conv_backward, flops, flops_backward
)
