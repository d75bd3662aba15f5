"""Builds csrc/ into plain C libraries inside slipstream_kernels; metadata is in pyproject.toml.

Needs neither torch nor Python headers. Without a C++ compiler (CXX, c++, g++ or clang++) the install is pure
Python; where nvcc is missing or fails there is no CUDA library. SLIPSTREAM_SANITIZE=1 builds with address and
undefined-behaviour checks.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CXX_FLAGS = ["-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc/include"]
# No fused multiply-add: the bits must equal the reference's.
OPTIMISED = ["-O3", "-ffp-contract=off"]
SANITIZED = ["-O1", "-g", "-ffp-contract=off", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
ARCHITECTURES = ["80", "90a", "100"]


def main() -> None:
    """Declare one extension per library that can be built here."""
    libraries = []
    if _compiler() is None:
        print(
            "slipstream: no C++ compiler found (CXX, c++, g++, clang++): installing without native kernels."
        )
    else:
        libraries.append(_library("cpu", "cpp"))
        if shutil.which("nvcc") and list(Path("csrc/cuda").glob("*.cu")):
            libraries.append(_library("cuda", "cu"))
    setup(ext_modules=libraries, cmdclass={"build_ext": _BuildLibraries, "bdist_wheel": _AnyPython})


def _compiler() -> str | None:
    candidates = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next((path for name in candidates if (path := shutil.which(name))), None)


def _library(device: str, suffix: str) -> Extension:
    sources = sorted(str(path) for path in Path(f"csrc/{device}").glob(f"*.{suffix}"))
    headers = sorted(str(path) for path in Path("csrc").rglob("*.*h"))
    # An optional extension may be missing in the end, without failing the install.
    optional = device == "cuda"
    return Extension(
        f"slipstream_kernels.libslipstream_{device}", sources=sources, depends=headers, optional=optional
    )


class _BuildLibraries(build_ext):
    """One compiler call per library; its file name carries no Python version, since it needs none."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name.endswith("cuda"):
            _build_cuda(ext.sources, target, Path(self.build_temp))
            return
        flags = SANITIZED if os.environ.get("SLIPSTREAM_SANITIZE") == "1" else OPTIMISED
        command = [_compiler(), *CXX_FLAGS, *flags, *ext.sources, "-o", str(target)]
        if _run([*command, "-fopenmp"], check=False) != 0:
            print("slipstream: this compiler has no OpenMP: building native kernels that use one thread.")
            _run(command)


def _build_cuda(sources: list[str], target: Path, objects: Path) -> None:
    """Compile each file for all architectures, two at a time, and link them; on failure go on without."""
    objects.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc/include", *_targets()]
    made = [str(objects / f"{Path(source).stem}.o") for source in sources]
    compile_one = [
        [shutil.which("nvcc"), *flags, "--threads=2", "-c", source, "-o", path]
        for source, path in zip(sources, made, strict=True)
    ]
    link = [shutil.which("nvcc"), "-shared", "-cudart=static", *made, "-o", str(target)]
    if any(_run(command, check=False) != 0 for command in (*compile_one, link)):
        target.unlink(missing_ok=True)
        print("slipstream: nvcc failed (see above): installing without CUDA kernels.")


def _targets() -> list[str]:
    """Machine code for each architecture, and PTX for those that come after."""
    real = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    return [*real, "-gencode=arch=compute_80,code=compute_80"]


def _run(command: list[str], check: bool = True) -> int:
    code = subprocess.run(command, check=False).returncode
    if check and code != 0:
        sys.exit(f"slipstream: compiling failed: {' '.join(command)}")
    return code


class _AnyPython(bdist_wheel):
    """A wheel with native libraries fits every Python version on its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


main()
