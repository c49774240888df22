"""The CUDA kernels without a GPU: compiled as plain C++, run by an emulation of what they need of CUDA.

On a GPU test_ops.py puts the compiled kernels to everything.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mnops

HERE = Path(__file__).parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "cuda-emulation"


@pytest.fixture(scope="session")
def emulation() -> Path:
    """The library of emulated kernels, up to date."""
    pybind11 = importlib.util.find_spec("pybind11")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # pip puts ninja beside python
    tools = {tool: shutil.which(tool, path=path) for tool in ("cmake", "ninja", "c++")}
    if None in tools.values():
        pytest.skip(f"needs {', '.join(tool for tool, found in tools.items() if found is None)}")
    if pybind11 is None or not (ROOT / "csrc" / "cuda").is_dir():
        pytest.skip("needs the sources and the package pybind11")
    configure = [
        tools["cmake"], "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
        "-DCMAKE_BUILD_TYPE=Release", "-DMNOPS_EMULATE_CUDA=ON", "-DMNOPS_CUDA=OFF",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DMNOPS_TORCH_DIR={Path(torch.__file__).parent}",
        f"-Dpybind11_DIR={Path(pybind11.origin).parent / 'share' / 'cmake' / 'pybind11'}",
    ]  # fmt: skip
    for command in (configure, [tools["cmake"], "--build", BUILD, "--target", "mnops_cuda_emulated"]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-10000:]
    return BUILD / "libmnops_cuda_emulated.so"


def test_kernels_under_the_emulation(emulation):
    """In a process of its own, where the backend "cuda" is the emulated one."""
    file = str(HERE / "cuda_emulated.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "MNOPS_CUDA_EMULATION": str(emulation)}
    if importlib.util.find_spec("triton"):  # of the ops that CUDA lacks
        environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-20000:]}{result.stderr[-2000:]}"
    print(result.stdout.splitlines()[-1])


PLAIN = r"plain_|_any|I[^E]*d[dE]"  # kernels for what no other serves, and those of fp64


def cuobjdump(option: str, file: Path) -> str:
    knobs = pytest.importorskip("triton.knobs", reason="cuobjdump comes with the package triton")
    return subprocess.run([knobs.nvidia.cuobjdump.path, option, file], capture_output=True, text=True).stdout


def library() -> Path:
    path = Path(mnops.__file__).parent / "libmnops_cuda.so"
    if not path.exists():
        pytest.skip("needs the CUDA library, which a build makes where nvcc is")
    return path


def stacks(file: Path) -> list[tuple[str, str, str]]:
    """Of the tuned kernels in it: name, bytes of stack, where spills and local arrays lie, and of local memory."""
    listed = cuobjdump("--dump-resource-usage", file)
    kernels = re.findall(r"Function (\w+):\n\s*REG:\d+ STACK:(\d+) .*LOCAL:(\d+)", listed)
    return [kernel for kernel in kernels if not re.search(PLAIN, kernel[0])]


def test_library_finds_torchs_cuda():
    """Its symbols come with libtorch, which the library has to name: Python loads it without those of others."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    listed = subprocess.run(["readelf", "-d", library()], capture_output=True, text=True).stdout
    assert "[libtorch.so]" in listed, listed


def test_tuned_kernels_stay_in_registers():
    """For any of the GPUs that the library is built for."""
    kernels = stacks(library())
    assert len(kernels) > 100, kernels
    assert not [kernel for kernel in kernels if kernel[1:] != ("0", "0")]


def test_kernels_for_another_gpu(tmp_path):
    """Of sm_80, which has most to hold in registers; they store whole vectors, not a half at a time."""
    if shutil.which("nvcc") is None or not (ROOT / "csrc" / "cuda").is_dir():
        pytest.skip("needs nvcc and the sources")
    cubin, include = tmp_path / "cubin", Path(torch.__file__).parent / "include"
    command = [
        "nvcc", "-std=c++17", "-O3", "-arch=sm_80", "-cubin", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", "-I", ROOT / "csrc", "-isystem", include,
        "-isystem", include / "torch" / "csrc" / "api" / "include",
        ROOT / "csrc" / "cuda" / "depthwise_conv2d_forward.cu", "-o", cubin,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-10000:]
    kernels = stacks(cubin)
    assert len(kernels) > 10, kernels
    assert not [kernel for kernel in kernels if kernel[1:] != ("0", "0")]
    stores = re.findall(r"\bSTG\.E\S*", cuobjdump("--dump-sass", cubin))
    assert "STG.E.64" in stores and "STG.E.U16" not in stores, set(stores)
