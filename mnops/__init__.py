"""mnops: MobileNets whose convolutions, BatchNorms and activations are fused, forward and backward."""

from mnops import _native

_native.load()  # the schemas of torch.ops.mnops: everything below stands on them

from mnops import nn, ops, reference  # noqa: E402
from mnops.backends import backend  # noqa: E402
from mnops.cuda_graph import graph  # noqa: E402
from mnops.deploy import deploy  # noqa: E402
from mnops.functional import depthwise_conv_bn_act, pointwise_conv_bn_act  # noqa: E402
from mnops.fuse import fuse, fusion_report, unfuse  # noqa: E402
from mnops.lazy import FallbackWarning, fallback_warnings  # noqa: E402
from mnops.memory import empty_cache  # noqa: E402
from mnops.models import MobileNet  # noqa: E402
from mnops.ops import Pending  # noqa: E402

__all__ = [
    "FallbackWarning",
    "MobileNet",
    "Pending",
    "backend",
    "deploy",
    "depthwise_conv_bn_act",
    "empty_cache",
    "fallback_warnings",
    "fuse",
    "fusion_report",
    "graph",
    "nn",
    "ops",
    "pointwise_conv_bn_act",
    "reference",
    "unfuse",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        return _native.build_info()["version"]
    raise AttributeError(f"module 'mnops' has no attribute {name!r}")
