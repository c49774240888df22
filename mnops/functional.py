"""Convolution + BatchNorm + activation as one differentiable function, with the arguments of F.batch_norm."""

import functools
import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mnops import backends, ops
from mnops.ops import Pending

_update_running = torch.ops.mnops.update_running.default
torch.library.register_fake("mnops::update_running", lambda *args: None)


@functools.cache
def _triton() -> Callable | None:
    """Triton's kernel, where there is Triton."""
    if backends.why_absent("triton", "cuda"):
        return None
    return importlib.import_module("mnops.triton").update_running


def _natively(running_mean, running_var, mean, count, momentum) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(running_mean) is type(running_var) is type(mean) is Tensor
        and (mean.device.type == "cpu" or _on_gpu(mean))
        and running_mean.dtype is running_var.dtype is mean.dtype
        and running_mean.is_contiguous()
        and running_var.is_contiguous()
        and type(count) is int
        and type(momentum) is float
        and not backends.transformed()
        and not (running_mean.is_inference() or running_var.is_inference())
    )


def _on_gpu(mean: Tensor) -> bool:
    reference = backends.BACKENDS["reference"].namespace
    return (
        mean.device.type == "cuda"
        and mean.dtype is torch.float32
        and backends.choose("norm_act", "cuda") != reference
        and _triton() is not None
    )


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    momentum: float | Tensor,
) -> None:
    """running += momentum * (batch - running), in place; the batch's variance unbiased: var * n / (n - 1)."""
    if _natively(running_mean, running_var, mean, count, momentum):  # one call for five
        with torch._C._AutoDispatchBelowAutograd():
            update = _update_running if mean.device.type == "cpu" else _triton()
            update(running_mean, running_var, mean, var, momentum, count / (count - 1))
        increment_version((running_mean, running_var))
        return
    mean, var = mean.detach(), var.detach() * (count / (count - 1))
    if mean.dtype != running_mean.dtype:  # a half module's
        mean, var = mean.to(running_mean.dtype), var.to(running_mean.dtype)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var, momentum)


def running_statistics(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """What a norm in eval mode normalises with: copies for a backward, for which a forward in training may come."""
    return (mean.clone(), var.clone()) if torch.is_grad_enabled() else (mean, var)


def refuse_single_value(count: int, y: Tensor) -> None:
    if count == 1:  # torch's words
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")


def _batch_norm_act(measured, weight, bias, running, training, momentum, eps, act) -> Tensor:
    y, mean, var = measured
    count = y.numel() // y.shape[1]
    if training:
        refuse_single_value(count, y)
    z = ops.norm_act(Pending(y, *((mean, var) if training else running), weight, bias, eps, act))
    if training and running[0] is not None:  # after the checks of norm_act: an error changes nothing
        update_running(*running, mean, var, count, momentum)
    return z


def _check_running(op: str, running: tuple[Tensor | None, Tensor | None], training: bool) -> None:
    given = [v is not None for v in running]
    if given[0] != given[1] or not (training or all(given)):
        raise ValueError(
            f"{op}: running_mean and running_var must be given both, or neither with training=True, "
            f"got {given} with training={training}"
        )


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
        training: normalise with the batch's statistics, over more than one value per channel; else with the
            running ones.
        padding: int, (height, width), (top, bottom, left, right), "valid" or "same" (TensorFlow's).
        act: none, relu, relu6, hardswish or silu.

    Returns:
        (N, C, Ho, Wo) in x's dtype and memory format.

    Raises:
        ValueError, TypeError: with the rule and the value received; nothing is changed before.
    """
    running = running_mean, running_var
    _check_running("depthwise_conv_bn_act", running, training)
    measured = ops.depthwise_conv2d(x, weight, stride, padding, dilation, measure=training)
    return _batch_norm_act(measured, bn_weight, bn_bias, running, training, momentum, eps, act)


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
    """act(F.batch_norm(F.conv2d(x, weight), ...)), weight (O, C, 1, 1): else as `depthwise_conv_bn_act`."""
    running = running_mean, running_var
    _check_running("pointwise_conv_bn_act", running, training)
    measured = ops.pointwise_conv2d(x, weight, measure=training)
    return _batch_norm_act(measured, bn_weight, bn_bias, running, training, momentum, eps, act)
