"""Pending tensors and the contract: from what the user gives to what the schemas take, checked."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mnops.reference import ACTIVATIONS, wide

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Pending(NamedTuple):
    """A stored tensor x (N, C, H, W) whose BatchNorm and activation the next op applies as it loads:

    z = act((x - mean) * (var + eps)^(-1/2) * weight + bias), with vectors (C,)

    mean and var None: z = act(x). weight None: 1. bias None: 0.
    """

    x: Tensor
    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    act: str = "none"


# ---- arguments ----


def pending_args(x: Tensor | Pending, cast: bool = True) -> tuple:
    """x, mean, var, gamma, beta, eps, act of the schemas.

    Under autocast a convolution's x takes the autocast dtype, as with F.conv2d; its weight need not, because
    the kernels accumulate in fp32 anyway; what is pending on x is done before, in its own precision. Norm vectors
    of half modules are widened.
    """
    if not isinstance(x, Pending):
        x = Pending(x)
    t, mean, var, gamma, beta, eps, act = x
    if not isinstance(t, Tensor):
        raise TypeError(f"x must be a Tensor or a Pending one, got {type(t).__name__}")
    device = t.device.type
    if cast and device != "meta" and torch.is_autocast_enabled(device):  # meta tensors have no autocast
        dtype = torch.get_autocast_dtype(device)
        if t.dtype != dtype and t.dtype in DTYPES and t.dtype != torch.float64:
            if mean is not None:
                from mnops.ops.norm_act import norm_act  # which stands on this module

                t, mean, var, gamma, beta, act = norm_act(x), None, None, None, None, "none"
            t = t.to(dtype)
    return t, *norm_args(t, mean, var, gamma, beta, eps, act)


def norm_args(x: Tensor, mean, var, gamma, beta, eps: float, act: str) -> tuple:
    """The same six, vectors of half modules widened."""
    if mean is not None or var is not None or gamma is not None or beta is not None:
        dtype = wide(x)
        mean, var, gamma, beta = [
            v if v is None or v.dtype is dtype else v.to(dtype) for v in (mean, var, gamma, beta)
        ]
    return mean, var, gamma, beta, eps, act


def pair(op: str, what: str, value: int | Sequence[int]) -> list[int]:
    """[height, width] from one int or two."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{op}: {what} must be one int or two, got {value}")
        return list(value)
    return [value, value]


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Padding before and after one dimension for ceil(size / stride) outputs: TensorFlow's SAME.

    An odd pixel goes after, so stride 2 pads one side only on an even size, and the sides depend on the size.
    """
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def four_sides(
    op: str,
    padding: int | Sequence[int] | str,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    dilation: list[int],
) -> list[int]:
    """[top, bottom, left, right] from one int, (height, width), the four themselves, "same" or "valid"."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'{op}: padding must be ints, "same" or "valid", got {padding!r}')
        if padding == "valid" or x.dim() != 4 or weight.dim() != 4:  # another rank: check_* refuses it
            return [0, 0, 0, 0]
        top, bottom = same_padding(x.shape[2], weight.shape[2], stride[0], dilation[0])
        left, right = same_padding(x.shape[3], weight.shape[3], stride[1], dilation[1])
        return [top, bottom, left, right]
    if isinstance(padding, (tuple, list)):
        if len(padding) == 4:
            return list(padding)
        if len(padding) != 2:
            raise ValueError(f"{op}: padding must be one int, two or four, got {padding}")
        height, width = padding
        return [height, height, width, width]
    return [padding] * 4


# ---- the contract: plain ifs, for they run at every call and are traced with symbolic sizes ----


def check_pending(op: str, x: Tensor, mean, var, gamma, beta, eps: float, act: str) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be (N, C, H, W), got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    _, channels, height, width = x.shape
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"{op}: C, H and W of x must be positive, got {tuple(x.shape)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if mean is None and var is None and gamma is None and beta is None:
        return
    if mean is None or var is None:
        raise ValueError(f"{op}: mean and var must be given together, and with weight or bias of the norm")
    dtype = wide(x)
    for what, v in (("mean", mean), ("var", var), ("weight of the norm", gamma), ("bias of the norm", beta)):
        if v is None:
            continue
        if v.dim() != 1 or v.shape[0] != channels:
            raise ValueError(f"{op}: {what} must be (C,) with C = {channels} as in x, got {tuple(v.shape)}")
        if v.dtype != dtype:
            raise TypeError(f"{op}: {what} must be {dtype} for x of {x.dtype}, got {v.dtype}")
        if v.device != x.device:
            raise ValueError(f"{op}: {what} must be on {x.device} as x, got {v.device}")


def check_weight(op: str, x: Tensor, weight: Tensor) -> None:
    if weight.dtype != x.dtype and (weight.dtype != torch.float32 or x.dtype == torch.float64):
        rule = f"{x.dtype} as x" if wide(x) == x.dtype else f"{x.dtype} as x or torch.float32"
        raise TypeError(f"{op}: weight must be {rule}, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"{op}: weight must be on {x.device} as x, got {weight.device}")


def check_measure(op: str, x: Tensor, measure: bool) -> None:
    if measure and x.shape[0] == 0:
        raise ValueError(f"{op}: measuring needs at least one value per channel, got {tuple(x.shape)}")


def out_size(
    op: str, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of y: floor((size + padding - dilation * (K - 1) - 1) / stride) + 1."""
    if stride[0] < 1 or stride[1] < 1:
        raise ValueError(f"{op}: stride must be positive, got {list(stride)}")
    if dilation[0] < 1 or dilation[1] < 1:
        raise ValueError(f"{op}: dilation must be positive, got {list(dilation)}")
    top, bottom, left, right = padding
    if top < 0 or bottom < 0 or left < 0 or right < 0:
        raise ValueError(f"{op}: padding must not be negative, got {list(padding)}")
    kernel, (_, _, height, width) = weight.shape[2], x.shape
    spare_h = height + top + bottom - dilation[0] * (kernel - 1) - 1
    spare_w = width + left + right - dilation[1] * (kernel - 1) - 1
    if spare_h < 0 or spare_w < 0:
        raise ValueError(
            f"{op}: the kernel must fit the padded input, got K = {kernel}, dilation {list(dilation)}, "
            f"padding {list(padding)} on {height} x {width}"
        )
    return spare_h // stride[0] + 1, spare_w // stride[1] + 1
