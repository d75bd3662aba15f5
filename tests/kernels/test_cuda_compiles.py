"""Every CUDA file compiles for sm_90a, and no kernel of it keeps registers in memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
MOST_REGISTERS = 128

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]


def compiled(source: Path, target: Path) -> str:
    """What the compiler and ptxas say."""
    command = ["nvcc", "-O3", "-std=c++17", "-Icsrc/include", "-gencode=arch=compute_90a,code=sm_90a"]
    command += ["-Xptxas=-v", "-Xcompiler=-Wall,-Wextra", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source: Path, tmp_path: Path) -> None:
    report = compiled(source, tmp_path / "object.o")
    assert "warning" not in report, report
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    assert len(kernels) == 0 if source.stem == "abi" else kernels
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert set(frames) <= {("0", "0", "0")}, report
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == len(frames) == len(kernels)
    assert max(registers, default=0) <= MOST_REGISTERS
