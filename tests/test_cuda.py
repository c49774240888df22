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


TUNED = (
    ("depthwise_conv2d_forward", "sm_80"),
    ("depthwise_conv2d_forward", "sm_90"),
    ("depthwise_conv2d_backward", "sm_90"),
)


def usage(file: Path, arch: str) -> str:
    """What cuobjdump, which Triton brings, says of the kernels in it that are for that architecture."""
    knobs = pytest.importorskip("triton.knobs", reason="cuobjdump comes with the package triton")
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--gpu-architecture", arch, file]
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.parametrize(("source", "arch"), TUNED)
def test_tuned_kernels_stay_in_registers(source, arch, tmp_path):
    """No spill and no array in local memory, for any of them: in the built library, else compiled for this."""
    if shutil.which("nvcc") is None or not (ROOT / "csrc" / "cuda").is_dir():
        pytest.skip("needs nvcc and the sources")
    kernel = rf"Function (\w*_{source}_cu_\w+):\n\s*REG:\d+ STACK:(\d+) .*LOCAL:(\d+)"
    kernels = re.findall(kernel, usage(Path(mnops.__file__).parent / "libmnops_cuda.so", arch))
    if not kernels:
        cubin, include = tmp_path / "cubin", Path(torch.__file__).parent / "include"
        command = [
            "nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020a000000000000", "-I", ROOT / "csrc", "-isystem", include,
            "-isystem", include / "torch" / "csrc" / "api" / "include", ROOT / "csrc" / "cuda" / f"{source}.cu",
            "-o", cubin,
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-10000:]
        kernels = re.findall(kernel, usage(cubin, arch))
    assert len(kernels) > 10, kernels
    assert not [kernel for kernel in kernels if kernel[1:] != ("0", "0")]
