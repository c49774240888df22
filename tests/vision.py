"""torchvision for tests, also where its wheel was built for another torch."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

_library = None


def torchvision():
    """The module, or the test is skipped.

    Beside another torch than its own it has no compiled operators, and fails while it registers what belongs to
    them. Declaring their names first is enough for everything in it that is plain PyTorch.
    """
    global _library
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        pytest.skip("torchvision is not installed")
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        source = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in sorted(set(re.findall(r'register_fake\("torchvision::(\w+)"', source))):
            _library.define(f"{name}(Tensor x) -> Tensor")
        import torchvision
    return torchvision
