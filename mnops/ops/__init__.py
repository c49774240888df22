"""The ops, one file each: public function, contract, fake kernel, FLOP formula, registration."""

from mnops.ops._contract import Pending
from mnops.ops.depthwise_conv2d import depthwise_conv2d
from mnops.ops.norm_act import norm_act
from mnops.ops.norm_act_pool import norm_act_pool
from mnops.ops.pointwise_conv2d import pointwise_conv2d
from mnops.ops.separable_conv2d import separable_conv2d
from mnops.ops.stem_conv2d import stem_conv2d

__all__ = [
    "Pending",
    "depthwise_conv2d",
    "norm_act",
    "norm_act_pool",
    "pointwise_conv2d",
    "separable_conv2d",
    "stem_conv2d",
]
