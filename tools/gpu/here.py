"""Says what `make test-gpu` and `make bench-gpu` would run on, or in a sentence what they lack."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path


def lacking() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "PyTorch for " + sys.executable
    import torch

    if not torch.cuda.is_available():
        return f"a GPU that PyTorch sees: {torch.__version__} sees none"
    packages = "triton", "numpy", "pybind11", "setuptools", "pytest", "tqdm"
    if missing := [p for p in packages if importlib.util.find_spec(p) is None]:
        return f"the Python packages {', '.join(missing)}"
    if missing := [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]:
        return f"{', '.join(missing)} on the PATH"
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    if shutil.which("nvcc") is None and not (home / "bin" / "nvcc").exists():
        return f"nvcc, on the PATH or in {home}/bin"
    return None


def main() -> int:
    if lacks := lacking():
        print(f"The GPU's tests and benchmark need {lacks}.", file=sys.stderr)
        return 1
    import torch
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    print(
        f"{torch.cuda.get_device_name()}, driver {driver}, torch {torch.__version__}, "
        f"triton {triton.__version__}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
