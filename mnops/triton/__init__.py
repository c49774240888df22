"""The Triton backend: every op on any GPU that Triton supports, in kernels to learn from.

A function of an op's name takes the arguments of its schema, `torch.ops.mnops.<name>`. float64 and empty
tensors go to the reference.
"""

import os

# Multiply-adds are one instruction: Triton's default until 3.9, and from 3.10 on only where this says so.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError("the package triton is not installed (pip install triton)") from error

from mnops.triton.depthwise_conv2d import depthwise_conv2d
from mnops.triton.depthwise_conv2d_backward import depthwise_conv2d_backward
from mnops.triton.launch import inlined
from mnops.triton.norm_act import norm_act, norm_act_backward
from mnops.triton.norm_act_pool import norm_act_pool, norm_act_pool_backward
from mnops.triton.pointwise_conv2d import pointwise_conv2d
from mnops.triton.pointwise_conv2d_backward import pointwise_conv2d_backward
from mnops.triton.separable_conv2d import separable_conv2d
from mnops.triton.stem_conv2d import stem_conv2d, stem_conv2d_backward
from mnops.triton.update_running import update_running

__all__ = [
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "inlined",
    "norm_act",
    "norm_act_backward",
    "norm_act_pool",
    "norm_act_pool_backward",
    "pointwise_conv2d",
    "pointwise_conv2d_backward",
    "separable_conv2d",
    "stem_conv2d",
    "stem_conv2d_backward",
    "update_running",
]
