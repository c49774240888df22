"""BatchNorm's running statistics, both in one launch: as stock operations they are three, for every layer."""

import triton
import triton.language as tl
from torch import Tensor

from mnops.triton.launch import cdiv, launch

BLOCK = 1024


@triton.jit
def update_running_kernel(
    running_mean, running_var, mean, var,  # (C,)
    momentum, unbias, C, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = c < C
    old_mean, old_var = tl.load(running_mean + c, mask=there), tl.load(running_var + c, mask=there)
    new_mean, new_var = tl.load(mean + c, mask=there), tl.load(var + c, mask=there) * unbias
    tl.store(running_mean + c, old_mean + momentum * (new_mean - old_mean), mask=there)
    tl.store(running_var + c, old_var + momentum * (new_var - old_var), mask=there)


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, unbias: float
) -> None:
    """running += momentum * (batch - running), in place; the batch's variance times `unbias`. Of dense fp32."""
    channels = mean.numel()
    launch(
        update_running_kernel, (cdiv(channels, BLOCK),), running_mean=running_mean, running_var=running_var,
        mean=mean, var=var, momentum=momentum, unbias=unbias, C=channels, BLOCK=BLOCK,
    )  # fmt: skip
