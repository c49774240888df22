"""Drives CMake and ninja; everything about the native build is in CMakeLists.txt."""

import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()


def torch_package() -> tuple[pathlib.Path, str]:
    """Its folder and version, without importing it: that takes seconds, and half a minute under emulation."""
    found = importlib.util.find_spec("torch")
    if found is None:
        raise SystemExit(
            "mnops is built against the torch you already have, and none was found. "
            "Install torch >= 2.10, then: pip install --no-build-isolation ."
        )
    version = importlib.metadata.version("torch")
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < (2, 10):
        raise SystemExit(f"mnops needs torch >= 2.10 (the stable ABI), got {version}")
    return pathlib.Path(found.origin).parent, version


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # not installed
        said = ""
    return said or "unknown"


class CMakeBuild(build_ext):
    """One Extension stands for all native targets: CMake installs them beside mnops._C."""

    def run(self) -> None:
        self.asked_in_place = bool(self.inplace)  # setuptools clears it while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        torch_dir, torch_version = torch_package()
        # An editable install copies back only what it knows of (the Extension): it gets the package folder itself.
        in_place = self.asked_in_place or getattr(self, "editable_mode", False)
        built = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        built.parent.mkdir(parents=True, exist_ok=True)
        target = ROOT / "mnops" if in_place else built.parent
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # For whom is the CUDA library? In place for this machine's GPU; what is installed, for all of them.
        architectures = os.environ.get("MNOPS_CUDA_ARCHITECTURES") or ("developer" if in_place else "release")
        configure = [
            "cmake", str(ROOT), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMNOPS_TORCH_DIR={torch_dir}",
            f"-DMNOPS_TORCH_VERSION={torch_version}",
            f"-DMNOPS_VERSION={self.distribution.get_version()}",
            f"-DMNOPS_COMMIT={commit()}",
            f"-DMNOPS_CUDA={os.environ.get('MNOPS_CUDA', 'AUTO')}",
            f"-DMNOPS_CUDA_ARCHITECTURES={architectures}",
            *os.environ.get("MNOPS_CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.run(configure, cwd=build, check=True)
        subprocess.run(["cmake", "--build", ".", "--target", "install"], cwd=build, check=True)
        if built.parent != target:
            shutil.copy(target / built.name, built)


setup(
    ext_modules=[Extension("mnops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
