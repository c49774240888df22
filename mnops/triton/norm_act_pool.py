"""norm_act_pool: the mean over an image of what norm_act would store.

A program takes one image and BLOCK_C channels, and reads x once, the floor; the result is a 1/(H*W) of it.
The backward is norm_act's, with g the same at every pixel of an image. It loses where one image is large and
few: then there are few programs (batch 1 at 7 x 7 x 1024 has 16).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnops import reference
from mnops.triton.common import ACTS, channel_norm, normalise, share
from mnops.triton.launch import cdiv, launch, nhwc, norm_arguments
from mnops.triton.norm_act import backward

BLOCK_C = 64  # 128 bytes of bf16, and enough programs at batch 1
BLOCK_P = 32


@triton.jit(do_not_specialize=["IMAGE"])
def norm_act_pool_kernel(
    x,  # (N, IMAGE, C)
    mean, var, gamma, beta,  # (C,)
    pooled,  # (N, C)
    IMAGE, eps,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr,
    BETA: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    image, _, c, c_ok = share(C, BLOCK_C)
    n = image.to(tl.int64)
    m, scale, shift = channel_norm(
        mean, var, gamma, beta, eps, c, c_ok, NORM, GAMMA, BETA, x.dtype.element_ty
    )
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, IMAGE, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)[:, None]
        ok = (p < IMAGE) & c_ok
        stored = tl.load(x + (n * IMAGE + p) * C + c, mask=ok, other=0.0)
        total += normalise(stored, p < IMAGE, m, scale, shift, NORM, ACT)
    mean_z = tl.sum(total, 0)[None, :] / IMAGE
    tl.store(pooled + n * C + c, mean_z.to(pooled.dtype.element_ty), mask=c_ok)


# ---- host ----


def norm_act_pool(
    x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    act: str,
) -> Tensor:  # fmt: skip
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.norm_act_pool(x, mean, var, gamma, beta, eps, act)
    n, channels, height, width = x.shape
    pooled = x.new_empty((n, channels))
    launch(
        norm_act_pool_kernel, (n * cdiv(channels, BLOCK_C),), x=nhwc(x), pooled=pooled, IMAGE=height * width,
        eps=eps, C=channels, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, ACT=ACTS[act],
        **norm_arguments(mean, var, gamma, beta),
    )  # fmt: skip
    return pooled


def norm_act_pool_backward(
    g: Tensor, x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.norm_act_pool_backward(g, x, mean, var, gamma, beta, eps, act)
    return backward(g.contiguous(), x, mean, var, gamma, beta, eps, act, 1 / (x.shape[2] * x.shape[3]))
