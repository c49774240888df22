"""Loads the native libraries that setup.py put beside this file."""

from __future__ import annotations

import functools
import os
import pathlib

import torch

HERE = pathlib.Path(__file__).parent
OLDEST_TORCH = (2, 10)


def _torch_release() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def load() -> None:
    """Registers the ops (torch.ops.mnops). Raises ImportError where the package was not built, or was built for
    something else than what runs it."""
    library = HERE / "libmnops_cpu.so"
    if not library.exists():
        raise ImportError(
            f"mnops was not built: {library.name} is not in {HERE}. "
            "From a checkout: pip install --no-build-isolation -e ."
        )
    if _torch_release() < OLDEST_TORCH:
        raise ImportError(
            f"mnops was built for torch >= {'.'.join(map(str, OLDEST_TORCH))}, you have torch {torch.__version__}"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        built = build_info()
        raise ImportError(
            f"mnops was built for {built['platform']} against torch {built['torch']}, you have torch "
            f"{torch.__version__}, and {library.name} does not load: {error}"
        ) from error
    if cuda_emulation():
        torch.ops.load_library(cuda_emulation())
    else:
        cuda_missing()


def cuda_emulation() -> str | None:
    """For tests: the library of CUDA kernels compiled for the CPU (csrc/cuda/emulation), if one is named."""
    return os.environ.get("MNOPS_CUDA_EMULATION") or None


@functools.cache
def build_info() -> dict[str, str]:
    """What the build wrote down: version, commit, compiler, instruction sets, CUDA, the torch it saw."""
    from mnops import _C

    return _C.build_info()


@functools.cache
def cuda_missing() -> str | None:
    """Why the CUDA library does not serve here, or None where it does: then it is loaded."""
    library = HERE / "libmnops_cuda.so"
    if not library.exists():
        return "the CUDA library was not built (no nvcc was found at build time)"
    if torch.version.cuda is None:
        return f"the CUDA library was built, but torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    built = build_info()["cuda_architectures"]
    have = "{}{}".format(*torch.cuda.get_device_capability())
    names = [name.split("-")[0] for name in built.split()]
    ptx = [name for name in built.split() if not name.endswith("-real")]
    same_major = any(name[:-1] == have[:-1] and int(name) <= int(have) for name in names)
    if not same_major and not any(int(name.split("-")[0]) <= int(have) for name in ptx):
        return f"the CUDA library was built for sm_{', sm_'.join(names)}, you have sm_{have}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the CUDA library does not load: {error.__cause__ or error}"
    return None
