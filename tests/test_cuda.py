"""The CUDA kernels without a GPU: compiled as plain C++, run by an emulation of what they need of CUDA.

On a GPU test_ops.py puts the compiled kernels to everything.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "cuda-emulation"


@pytest.fixture(scope="session")
def emulation() -> Path:
    """The library of emulated kernels, up to date."""
    pybind11 = importlib.util.find_spec("pybind11")
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if pybind11 is None or not (ROOT / "csrc" / "cuda").is_dir():
        pytest.skip("needs the sources and the package pybind11")
    configure = [
        "cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DMNOPS_EMULATE_CUDA=ON", "-DMNOPS_CUDA=OFF",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DMNOPS_TORCH_DIR={Path(torch.__file__).parent}",
        f"-Dpybind11_DIR={Path(pybind11.origin).parent / 'share' / 'cmake' / 'pybind11'}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", BUILD, "--target", "mnops_cuda_emulated"]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-10000:]
    return BUILD / "libmnops_cuda_emulated.so"


def test_kernels_under_the_emulation(emulation):
    """In a process of its own, where the backend "cuda" is the emulated one."""
    file = str(HERE / "cuda_emulated.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "MNOPS_CUDA_EMULATION": str(emulation)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-20000:]}{result.stderr[-2000:]}"
    print(result.stdout.splitlines()[-1])
