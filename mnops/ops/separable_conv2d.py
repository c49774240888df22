"""separable_conv2d: a whole block for inference, the depthwise result never stored."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mnops.ops import _contract as c
from mnops.ops import _register as r
from mnops.ops.depthwise_conv2d import check as check_depthwise

NAME = "separable_conv2d"


def separable_conv2d(
    x: Tensor | c.Pending,
    depthwise_weight: Tensor,
    norm: tuple,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """`depthwise_conv2d`, its norm and activation, `pointwise_conv2d`: in one pass, without gradients.

        y = conv(act((conv(z, depthwise_weight) - mean) * rstd * gamma + beta), weight)

    where z is x with its pending norm applied. The depthwise result stays in the caches, in float32 (float64
    with float64), whatever x's dtype is.

    Args:
        x: (N, C, H, W), float32, float64, float16 or bfloat16, channels_last or contiguous, or `Pending`.
        depthwise_weight: (C, 1, K, K) in x's dtype, or float32 with half x.
        norm: (mean, var, gamma, beta, eps, act) of the depthwise result, as in `Pending`; vectors (C,) or None.
        weight: (O, C, 1, 1) in x's dtype, or float32 with half x.
        stride, padding, dilation: of the depthwise convolution, as in `depthwise_conv2d`.

    Returns:
        y (N, O, Ho, Wo) in x's dtype and memory format.

    Raises:
        ValueError, TypeError: with the rule and the value received.
        RuntimeError: if a gradient is asked for.
    """
    x, *pending = c.pending_args(x)
    mid = c.norm_args(x, *norm)
    stride, dilation = c.pair(NAME, "stride", stride), c.pair(NAME, "dilation", dilation)
    padding = c.four_sides(NAME, padding, x, depthwise_weight, stride, dilation)
    args = (x, depthwise_weight, weight, *pending, *mid, stride, padding, dilation)
    if r.needs_grad(args):
        raise RuntimeError(f"{NAME}: it is for inference, under torch.no_grad(), got a tensor that requires grad")
    return r.run(NAME, args, check)


def check(x, depthwise_weight, weight, *rest) -> tuple[int, ...]:
    """The contract; returns the shape of y."""
    pending, mid, geometry = rest[:6], rest[6:12], rest[12:]
    n, channels, height, width = check_depthwise(x, depthwise_weight, *pending, *geometry, False, name=NAME)
    c.check_pending(NAME, x, *mid)
    shape = weight.shape
    if len(shape) != 4 or shape[1] != channels or shape[2] != 1 or shape[3] != 1:
        rule = f"weight must be (O, C, 1, 1) with C = {channels} as in x"
        raise ValueError(f"{NAME}: {rule}, got {tuple(shape)}")
    c.check_weight(NAME, x, weight)
    return n, shape[0], height, width


def fake(*args):
    return r.like(args[0], check(*args))


def flops(x_shape, depthwise_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    n, out_channels, height, width = out_shape
    taps = depthwise_shape[2] * depthwise_shape[3]
    return 2 * n * height * width * depthwise_shape[0] * (taps + out_channels)


r.register_inference(NAME, fake, flops)


# What the CUDA kernel asks: the stable ABI knows nothing of torch's switches.
_library = torch.library.Library("mnops", "FRAGMENT")
_library.define("allows_tf32(Tensor x) -> bool")
_library.impl(
    "allows_tf32", lambda x: torch.backends.cudnn.conv.fp32_precision == "tf32", "CompositeExplicitAutograd"
)
