"""Runs the folder `interpreted` in a process of its own, in which Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "interpreted"


def run(markers: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", markers, str(FOLDER)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)


def test_kernels_in_the_interpreter() -> None:
    done = run("not slow and not gpu")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_kernels_in_the_interpreter_at_length() -> None:
    done = run("slow and not gpu")
    nothing_collected = 5
    assert done.returncode in {0, nothing_collected}, done.stdout + done.stderr
