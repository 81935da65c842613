"""Builds the native side with CMake and puts it into the package. Settings come from the environment:

BMF_CUDA=auto|on|off   build the CUDA C++ kernels (auto: where nvcc is found and BMF_CUDA_ARCHS is set)
BMF_CUDA_ARCHS="80;90a"   GPUs to compile them for (these two if BMF_CUDA=on)
MAX_JOBS=N             compiler processes at once
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def stop(line: str) -> None:
    """End the build with one line that says what to do."""
    raise SystemExit(f"bigmodel_fast: {line}")


def torch_root() -> tuple[Path, str]:
    """Folder and version of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        stop("torch is not installed here: `pip install 'torch>=2.11'`, then `pip install --no-build-isolation .`")
    root = Path(next(iter(spec.submodule_search_locations)))
    from importlib.metadata import version

    return root, version("torch")


def which(name: str) -> str | None:
    """A program of this Python environment or of PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def find_tool(name: str, advice: str) -> str:
    path = which(name)
    if path is None:
        stop(f"{name} was not found: {advice}")
    return path


class CMakeBuild(build_ext):
    """One CMake project builds every native library of the package."""

    def run(self) -> None:
        cmake = find_tool("cmake", "`pip install cmake` (3.24 or later)")
        compiler = os.environ.get("CXX") or "c++"
        find_tool(
            compiler, "install a C++20 compiler (Debian and Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`)"
        )
        cuda = os.environ.get("BMF_CUDA", "auto")
        if cuda not in ("auto", "on", "off"):
            stop(f"BMF_CUDA must be auto, on or off, not {cuda!r}")
        torch_dir, torch_version = torch_root()
        package = ROOT / "bigmodel_fast" if self.inplace else Path(self.build_lib).resolve() / "bigmodel_fast"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), *(["-G", "Ninja"] if which("ninja") else []),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DBMF_OUTPUT_DIR={package}",
            f"-DBMF_TORCH_ROOT={torch_dir}",
            f"-DBMF_TORCH_VERSION={torch_version}",
            f"-DBMF_CUDA={cuda}",
            f"-DBMF_CUDA_ARCHS={os.environ.get('BMF_CUDA_ARCHS', '')}",
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (configure, [cmake, "--build", str(build), "--parallel", jobs]):
            if subprocess.run(command).returncode != 0:
                stop(f"`{' '.join(command[:3])} ...` failed; its messages are above")


setup(
    ext_modules=[Extension("bigmodel_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    packages=[*find_packages(include=["bigmodel_fast*"]), "bigmodel_fast.kernels", "bigmodel_fast.benchmarks"],
    package_dir={"bigmodel_fast.kernels": "kernels", "bigmodel_fast.benchmarks": "benchmarks"},
)
