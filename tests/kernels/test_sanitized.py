"""The C++ library under AddressSanitizer and UndefinedBehaviorSanitizer, by its own tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
COMPILER = shutil.which("g++")
LIMIT_S = 600
"""Far above what building or testing takes: it only ends what hangs."""
TESTS = ["fused_head", "policy_loss_family", "delivery", "checksum", "advantage", "weight_delta", "fp8"]
CHOSEN = "(native or delivery or forged or threads) and not (one_native_pass and False)"
"""Those among them that hand the library something of their own: under sanitizers each is slow."""


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.skipif(COMPILER is None, reason="needs g++ and its sanitizers")
def test_native_library_is_clean(tmp_path: Path) -> None:
    for part in ("csrc/cpu", "csrc/include", "kernels", "engine", "tests/kernels"):
        shutil.copytree(
            ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    run(build, tmp_path, {"SLIPSTREAM_SANITIZE": "1"})
    runtimes = " ".join(runtime(name) for name in ("libasan.so", "libubsan.so"))
    # Python itself frees nothing at its end; PyTorch's own start is not ours to judge.
    settings = {"LD_PRELOAD": runtimes, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    # On a busy machine threads that spin while they wait for one another take most of the time.
    settings["OMP_WAIT_POLICY"] = "passive"
    tests = [f"tests/kernels/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", "-k", CHOSEN]
    said = run([*command, *tests], tmp_path, settings)
    assert " passed" in said
    assert "runtime error" not in said


def runtime(name: str) -> str:
    """Return where the compiler keeps a sanitizer's runtime."""
    assert COMPILER is not None
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def run(command: list[str], folder: Path, variables: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr
