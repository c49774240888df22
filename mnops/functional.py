"""Convolution + BatchNorm + activation as one differentiable function, with the arguments of F.batch_norm."""

from collections.abc import Sequence

from torch import Tensor

from mnops import ops
from mnops.ops import Pending


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int | Tensor, momentum: float | Tensor
) -> None:
    """running = (1 - momentum) * running + momentum * batch, in place; the variance unbiased: var * n / (n - 1)."""
    unbiased = var.detach() * (count / (count - 1))
    running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def refuse_single_value(count: int, y: Tensor) -> None:
    if count == 1:  # torch's words
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")


def _norm_act(y, mean, var, weight, bias, running_mean, running_var, training, momentum, eps, act) -> Tensor:
    count = y.numel() // y.shape[1]
    if training:
        refuse_single_value(count, y)
    used = (mean, var) if training else (running_mean, running_var)
    z = ops.norm_act(Pending(y, *used, weight, bias, eps, act))
    if training and running_mean is not None:  # after the checks of norm_act: an error changes nothing
        update_running(running_mean, running_var, mean, var, count, momentum)
    return z


def _check_running(op: str, running_mean: Tensor | None, running_var: Tensor | None, training: bool) -> None:
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var must be given together")
    if running_mean is None and not training:
        raise ValueError(f"{op}: running_mean and running_var must be given with training=False, got None")


def depthwise_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 1,
    dilation: int | Sequence[int] = 1,
    act: str = "relu",
) -> Tensor:
    """act(F.batch_norm(F.conv2d(x, weight, None, stride, padding, dilation, groups=C), ...)).

    Args:
        x: (N, C, H, W), float32, float64, float16 or bfloat16, channels_last or contiguous.
        weight: (C, 1, K, K).
        bn_weight, bn_bias: (C,) or None: 1 and 0.
        running_mean, running_var: (C,), updated in place in training as F.batch_norm does; None: not kept.
        training: normalise with the batch's statistics (which needs more than one value per channel), else with the
            running ones.
        padding: int, (height, width), (top, bottom, left, right), "valid" or "same" (TensorFlow's).
        act: none, relu, relu6, hardswish or silu.

    Returns:
        (N, C, Ho, Wo) in x's dtype and memory format.

    Raises:
        ValueError, TypeError: with the rule and the value received; nothing is changed before.
    """
    _check_running("depthwise_conv_bn_act", running_mean, running_var, training)
    y, mean, var = ops.depthwise_conv2d(x, weight, stride, padding, dilation, measure=training)
    return _norm_act(y, mean, var, bn_weight, bn_bias, running_mean, running_var, training, momentum, eps, act)


def pointwise_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
) -> Tensor:
    """act(F.batch_norm(F.conv2d(x, weight), ...)): as `depthwise_conv_bn_act` with weight (O, C, 1, 1), vectors (O,)."""
    _check_running("pointwise_conv_bn_act", running_mean, running_var, training)
    y, mean, var = ops.pointwise_conv2d(x, weight, measure=training)
    return _norm_act(y, mean, var, bn_weight, bn_bias, running_mean, running_var, training, momentum, eps, act)
