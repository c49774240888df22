"""torchvision for tests, also where its compiled operators do not load (a wheel for CUDA beside a CPU torch).

    torchvision = torchvision_support.load()    # skips the test where torchvision is not installed

There its Python parts are all one needs, but `import torchvision` itself fails: it describes operators that
nobody declared. So they are declared here, and the two that detection needs get a form in PyTorch.
"""

import importlib
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    sys.modules["torchvision.ops.roi_align"]._roi_align = _roi_align
    return torchvision


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression of (N, 4) boxes x1, y1, x2, y2: the kept indices, best score first."""
    from torchvision.ops import box_iou

    order = scores.argsort(descending=True, stable=True)
    overlaps = (box_iou(boxes[order], boxes[order]) > iou_threshold).numpy()
    dropped = np.zeros(len(order), bool)
    for i in range(len(order)):
        if not dropped[i]:
            dropped[i + 1 :] |= overlaps[i, i + 1 :]
    return order[torch.from_numpy(~dropped)]


def _roi_align(
    x: Tensor, rois: Tensor, scale: float, height: int, width: int, sampling: int, aligned: bool
) -> Tensor:
    """torchvision's roi_align, for boxes inside the image: (N, C, H, W) and (K, 5) -> (K, C, height, width).

    Its own Python form is one that torch.compile is asked to make fast, which takes long.
    """
    assert sampling > 0 and not aligned
    low, high = (rois[:, 1:] * scale).split(2, 1)
    size = (high - low).clamp(min=1)
    ends = torch.tensor([x.shape[3] - 1, x.shape[2] - 1]).clamp(min=1)
    columns, rows = (
        (low[:, None, i] + size[:, None, i] * (torch.arange(n) + 0.5) / n) * 2 / ends[i] - 1
        for i, n in enumerate((width * sampling, height * sampling))
    )
    grid = torch.stack([columns[:, None].expand(-1, rows.shape[1], -1),
                        rows[:, :, None].expand(-1, -1, columns.shape[1])], 3)  # fmt: skip
    samples = F.grid_sample(x[rois[:, 0].long()], grid, padding_mode="border", align_corners=True)
    return F.avg_pool2d(samples, sampling)
