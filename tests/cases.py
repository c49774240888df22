"""The labelled shapes on which every op is tested, and inputs of them."""

import dataclasses

import torch
from torch import Tensor

from mnops import Pending, ops
from mnops.ops._contract import same_padding

ACTS = ("none", "relu", "relu6", "hardswish", "silu")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Case:
    label: str
    op: str  # depthwise, pointwise, stem
    shape: tuple[int, int, int, int]
    out: int = 0  # output channels, depthwise: those of the input
    kernel: int = 3
    stride: int = 1
    padding: int | tuple[int, ...] | str = 1
    dilation: int = 1
    layout: str = "channels_last"  # nchw, sliced
    act: str = "relu"

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"

    def conv(
        self, x: Tensor | Pending, weight: Tensor, measure: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.op == "depthwise":
            return ops.depthwise_conv2d(x, weight, self.stride, self.padding, self.dilation, measure)
        if self.op == "pointwise":
            return ops.pointwise_conv2d(x, weight, measure)
        return ops.stem_conv2d(x, weight, self.stride, self.padding, measure)

    def stock_conv(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same convolution in stock PyTorch."""
        if self.op == "pointwise":
            return torch.nn.functional.conv2d(x, weight)
        padding = self.padding
        if padding == "same":
            vertical, horizontal = (
                same_padding(s, self.kernel, self.stride, self.dilation) for s in x.shape[2:]
            )
            padding = (*vertical, *horizontal)
        if isinstance(padding, int):
            padding = (padding,) * 4
        top, bottom, left, right = padding
        if top == bottom and left == right:
            padding = (top, left)
        else:
            x, padding = torch.nn.functional.pad(x, (left, right, top, bottom)), 0
        groups = x.shape[1] if self.op == "depthwise" else 1
        return torch.nn.functional.conv2d(x, weight, None, self.stride, padding, self.dilation, groups)

    def x(self, dtype: torch.dtype, device: str) -> Tensor:
        """A stored tensor: every channel with a mean and a deviation of its own."""
        n, c, h, w = self.shape
        shape = (n, 2 * c, h + 1, w + 1) if self.layout == "sliced" else self.shape
        x = torch.randn(shape) * torch.empty(shape[1], 1, 1).uniform_(0.5, 2) + torch.randn(shape[1], 1, 1)
        x = x.to(device, dtype)
        if self.layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        return x[:, ::2, 1:, :-1] if self.layout == "sliced" else x

    def weight(self, dtype: torch.dtype, device: str) -> Tensor:
        c, k = self.shape[1], self.kernel
        shape = {"depthwise": (c, 1, k, k), "pointwise": (self.out, c, 1, 1), "stem": (self.out, c, k, k)}[
            self.op
        ]
        return (torch.randn(shape) / (shape[1] * k * k) ** 0.5).to(device, dtype)


def vectors(channels: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, var, gamma, beta."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = (
        torch.randn(channels),
        torch.rand(channels) + 0.5,
        torch.randn(channels),
        torch.randn(channels) * 0.5,
    )
    return tuple(v.to(device, wide) for v in drawn)


CASES = (
    Case("plain", "depthwise", (2, 16, 14, 14)),
    Case("nchw", "depthwise", (2, 16, 9, 10), layout="nchw"),
    Case("sliced", "depthwise", (2, 12, 8, 8), layout="sliced"),
    Case("one pixel", "depthwise", (16, 32, 1, 1)),
    Case("one value a channel", "depthwise", (1, 8, 1, 1)),
    Case("odd width", "depthwise", (2, 24, 6, 7)),
    Case("wide and flat", "depthwise", (1, 16, 2, 65)),
    Case("channels 1", "depthwise", (2, 1, 9, 9)),
    Case("channels 13", "depthwise", (2, 13, 8, 8)),
    Case("channels 13 nchw", "depthwise", (2, 13, 8, 8), layout="nchw"),
    Case("width 0.25", "depthwise", (2, 8, 16, 16), act="relu6"),
    Case("channels 200", "depthwise", (1, 200, 5, 5)),
    Case("stride 2 even", "depthwise", (2, 16, 14, 14), stride=2),
    Case("stride 2 odd", "depthwise", (2, 16, 15, 13), stride=2),
    Case("stride 2 nchw", "depthwise", (2, 16, 12, 13), stride=2, layout="nchw"),
    Case("stride 2 same even", "depthwise", (2, 16, 14, 14), stride=2, padding="same", act="relu6"),
    Case("stride 2 same odd", "depthwise", (2, 16, 15, 14), stride=2, padding="same"),
    Case("stride 3", "depthwise", (1, 8, 11, 10), stride=3),
    Case("one-sided", "depthwise", (2, 16, 8, 9), padding=(0, 2, 1, 0)),
    Case("no padding", "depthwise", (2, 16, 8, 9), padding=0),
    Case("padding wider than the kernel", "depthwise", (1, 8, 4, 4), padding=4),
    Case("dilation 2", "depthwise", (2, 16, 11, 12), padding=2, dilation=2, act="hardswish"),
    Case("dilation 3 stride 2", "depthwise", (1, 8, 11, 12), stride=2, padding=3, dilation=3),
    Case("5x5", "depthwise", (2, 16, 9, 9), kernel=5, padding=2, act="hardswish"),
    Case("5x5 stride 2", "depthwise", (2, 16, 10, 9), kernel=5, stride=2, padding=2),
    Case("7x7", "depthwise", (2, 16, 9, 8), kernel=7, padding=3, act="silu"),
    Case("7x7 on 3x3", "depthwise", (1, 16, 3, 3), kernel=7, padding=3),
    Case("linear", "depthwise", (2, 16, 7, 7), act="none"),
    Case("plain", "pointwise", (2, 16, 7, 7), 32),
    Case("nchw", "pointwise", (2, 16, 7, 6), 32, layout="nchw"),
    Case("sliced", "pointwise", (2, 16, 7, 6), 24, layout="sliced"),
    Case("one pixel", "pointwise", (16, 32, 1, 1), 16),
    Case("one value a channel", "pointwise", (1, 32, 1, 1), 16),
    Case("odd sizes", "pointwise", (3, 13, 5, 3), 7),
    Case("odd sizes nchw", "pointwise", (3, 13, 5, 3), 7, layout="nchw"),
    Case("to 1", "pointwise", (2, 16, 4, 4), 1),
    Case("from 1", "pointwise", (2, 1, 4, 4), 16),
    Case("width 0.25", "pointwise", (2, 8, 16, 16), 16, act="relu6"),
    Case("deep", "pointwise", (1, 520, 4, 5), 136),
    Case("long", "pointwise", (2, 40, 33, 31), 24),
    Case("hardswish", "pointwise", (2, 16, 7, 7), 32, act="hardswish"),
    Case("silu", "pointwise", (2, 16, 7, 7), 32, act="silu"),
    Case("linear", "pointwise", (2, 16, 7, 7), 32, act="none"),
    Case("plain", "stem", (2, 3, 16, 16), 32, stride=2),
    Case("nchw", "stem", (2, 3, 16, 17), 32, stride=2, layout="nchw"),
    Case("sliced", "stem", (2, 3, 9, 9), 16, stride=2, layout="sliced"),
    Case("one pixel", "stem", (16, 3, 1, 1), 8, stride=2),
    Case("odd", "stem", (2, 3, 15, 13), 24, stride=2),
    Case("same even", "stem", (2, 3, 16, 16), 8, stride=2, padding="same", act="relu6"),
    Case("stride 1", "stem", (1, 3, 8, 8), 16),
    Case("1 channel in", "stem", (2, 1, 12, 12), 8, stride=2),
    Case("13 in, 11 out", "stem", (2, 13, 6, 6), 11, stride=2),
    Case("5x5", "stem", (1, 3, 12, 11), 16, kernel=5, stride=2, padding=2),
    Case("7x7", "stem", (1, 3, 12, 11), 16, kernel=7, stride=2, padding=3),
    Case("no padding", "stem", (2, 3, 9, 9), 16, stride=2, padding=0),
)
