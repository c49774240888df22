"""torchvision for tests, also where its compiled operators do not load (a wheel for CUDA beside a CPU torch).

    torchvision = torchvision_support.load()    # skips the test where torchvision is not installed

There its Python parts are all one needs, but `import torchvision` itself fails: it describes operators that
nobody declared. So they are declared here, and non-maximum suppression gets an implementation.
"""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

_declared: list[torch.library.Library] = []  # a Library undoes its registrations when it is collected


def load() -> ModuleType:
    """torchvision, whole; the calling test is skipped if there is none."""
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed", allow_module_level=True)
    except RuntimeError as e:
        if "operator torchvision::nms does not exist" not in str(e):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _nms, "CPU")
    _declared.append(library)
    torchvision = importlib.import_module("torchvision")
    importlib.import_module("torchvision.ops")
    sys.modules["torchvision.ops.boxes"]._assert_has_ops = lambda: None
    # Without compiled operators roi_align is Python that torch.compile is asked to make fast: not for a test.
    roi_align = sys.modules["torchvision.ops.roi_align"]
    roi_align._roi_align = roi_align._roi_align.__wrapped__
    return torchvision


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression of (N, 4) boxes x1, y1, x2, y2: the kept indices, best score first."""
    order = scores.argsort(descending=True, stable=True)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[order, :2])
        high = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        order = order[shared <= iou_threshold * (area[best] + area[order] - shared)]
    return torch.stack(kept) if kept else order
