"""separable_conv2d: a whole block for inference, the depthwise result never stored."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mnops import reference
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


CHAIN = "separable_chain"


class SeparableBlock(NamedTuple):
    """The arguments of one `separable_conv2d`, x apart; norm is what is pending on its input."""

    depthwise_weight: Tensor
    weight: Tensor
    norm: Sequence[Tensor]
    eps: float
    mid: Sequence[Tensor]
    mid_eps: float
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


def separable_chain(x: Tensor, blocks: Sequence[SeparableBlock], act: str) -> Tensor:
    """`separable_conv2d` block by block in one call: on a small image a call takes as long as its kernel.

    Args:
        x: (N, C, H, W), what the first block's norm is pending on.
        blocks: their norms with all four vectors; their paddings (top, bottom, left, right).
        act: every activation of the blocks, the pending ones too.

    Returns:
        What `separable_conv2d` gives of the last block.

    Raises:
        ValueError, TypeError: as `separable_conv2d` of the block that breaks its contract.
        RuntimeError: if a gradient is asked for.
    """
    tensors, eps, geometry = [], [], []
    for block in blocks:
        tensors += (block.depthwise_weight, block.weight, *block.norm, *block.mid)
        eps += (block.eps, block.mid_eps)
        geometry += (*block.stride, *block.padding, *block.dilation)
    if r.needs_grad((x, *tensors)):
        rule = "it is for inference, under torch.no_grad(), got a tensor that requires grad"
        raise RuntimeError(f"{CHAIN}: {rule}")
    return r.run(CHAIN, (x, tensors, eps, act, geometry), check_chain)


def check_chain(x, tensors, eps, act, geometry) -> tuple[int, ...]:
    shape = x.shape
    for args in reference.of_each_block(tensors, eps, act, geometry):
        shape = check(x.new_empty(shape) if shape != x.shape else x, *args)
    return shape


def fake_chain(x, *args):
    return r.like(x, check_chain(x, *args))


def flops_chain(x_shape, tensor_shapes, eps, act, geometry, **kwargs) -> int:
    n, _, *size = x_shape
    total = 0
    for taps, weight, *_, stride, padding, dilation in reference.of_each_block(tensor_shapes, eps, act, geometry):
        for i in range(2):
            room = size[i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (taps[2] - 1) - 1
            size[i] = room // stride[i] + 1
        total += flops(x_shape, taps, weight, out_shape=(n, weight[0], *size))
    return total


r.register_inference(CHAIN, fake_chain, flops_chain)


# What the CUDA kernel asks: the stable ABI knows nothing of torch's switches.
_library = torch.library.Library("mnops", "FRAGMENT")
_library.define("allows_tf32(Tensor x) -> bool")
_library.impl(
    "allows_tf32", lambda x: torch.backends.cudnn.conv.fp32_precision == "tf32", "CompositeExplicitAutograd"
)
