"""stem_conv2d: the dense convolution of a first layer, few channels in, that measures on store."""

from collections.abc import Sequence

from torch import Tensor

from mnops.ops import _contract as c
from mnops.ops import _register as r

NAME = "stem_conv2d"


def stem_conv2d(
    x: Tensor | c.Pending,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    measure: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense convolution that applies x's pending norm as it loads, and measures its output as it stores.

    The equations are those of `depthwise_conv2d`, with a filter from every input to every output channel.

    Args:
        x: (N, C, H, W), float32, float64, float16 or bfloat16, channels_last or contiguous, or `Pending`.
        weight: (O, C, K, K) in x's dtype, or float32 with half x.
        stride: int or (height, width).
        padding: int, (height, width), (top, bottom, left, right), "valid" or "same" (TensorFlow's SAME).
        measure: return the statistics of y, over at least one value per channel.

    Returns:
        y (N, O, Ho, Wo) in x's dtype and memory format; mean and biased variance of the stored y, (O,)
        float32 (float64 with float64), or (0,) without `measure`.

    Raises:
        ValueError, TypeError: with the rule and the value received.
    """
    x, *pending = c.pending_args(x)
    stride = c.pair(NAME, "stride", stride)
    padding = c.four_sides(NAME, padding, x, weight, stride, [1, 1])
    args = (x, weight, *pending, stride, padding, measure)
    return r.run(NAME, args, check)


def check(x, weight, mean, var, gamma, beta, eps, act, stride, padding, measure) -> tuple[int, ...]:
    """The contract; returns the shape of y."""
    c.check_pending(NAME, x, mean, var, gamma, beta, eps, act)
    n, channels, _, _ = x.shape
    shape = weight.shape
    if len(shape) != 4 or shape[1] != channels or shape[2] != shape[3]:
        rule = f"weight must be (O, C, K, K) with C = {channels} as in x"
        raise ValueError(f"{NAME}: {rule}, got {tuple(shape)}")
    c.check_weight(NAME, x, weight)
    c.check_measure(NAME, x, measure)
    return n, shape[0], *c.out_size(NAME, x, weight, stride, padding, (1, 1))


def fake(*args):
    return r.conv_outputs(args[0], check(*args), measure=args[-1])


def flops(x_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    n, out, height, width = out_shape[0]
    _, channels, kernel, _ = weight_shape
    return 2 * n * out * channels * height * width * kernel * kernel


def flops_backward(g_shape, g_mean, g_var, y, mean_y, x_shape, weight_shape, *args, **kwargs) -> int:
    need_input, need_weight = args[-2:]
    return (need_input + need_weight) * flops(x_shape, weight_shape, out_shape=(g_shape,))


r.register(NAME, fake, r.conv_backward_fake, r.conv_setup_context, r.conv_backward, flops, flops_backward)
