"""The Triton kernels of the policy loss compiled for sm_90: wide loads, no spill, no barrier, no float64."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slipstream_kernels import Correction, Penalty, Surrogate
from slipstream_kernels.triton import policy_kernels as kernels
from slipstream_kernels.triton import policy_loss as launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TOKEN = {"METRICS": len(kernels.NAMES), "BLOCK": launch.TOKEN_BLOCK}
WITHOUT_SEGMENTS: dict[str, Any] = {"share_in": None, "moved_in": None, "mismatch_in": None}


def compiled(kernel: Any, constants: dict[str, Any], warps: int) -> Any:
    kinds = {"tokens": "i32", "bounds": "*i64"}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # What a launch finds when rows are a multiple of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in constants
    }
    return triton.compile(
        ASTSource(kernel, signature, places, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )


def listing(result: Any, folder: Path, what: str) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(result.asm["cubin"])
    done = subprocess.run([TOOLS / "cuobjdump", what, path], capture_output=True, text=True, check=True)
    return done.stdout


def check(result: Any, folder: Path) -> None:
    usage = listing(result, folder, "--dump-resource-usage")
    assert " STACK:0 " in usage, usage
    assert " LOCAL:0 " in usage, usage
    sass = listing(result, folder, "--dump-sass")
    assert "EXIT" in sass
    assert "STL" not in sass
    assert ".f64" not in result.asm["ptx"]


def check_token_kernel(constants: dict[str, Any], folder: Path) -> None:
    result = compiled(kernels.token_kernel, TOKEN | constants, launch.TOKEN_WARPS)
    check(result, folder)
    sass = listing(result, folder, "--dump-sass")
    # One warp: its sums are shuffles.
    assert "BAR.SYNC" not in sass
    assert "LDG.E.128" in sass


def test_token_kernel(tmp_path: Path) -> None:
    members = {"SURROGATE": "clip", "CORRECTION": "mask", "PENALTY": "k3"}
    check_token_kernel(members | WITHOUT_SEGMENTS, tmp_path)


def test_segment_kernel(tmp_path: Path) -> None:
    constants = {"MOVED": "geometric", "MISMATCH": "sequence", "SHARE": True, "BLOCK": launch.SEGMENT_BLOCK}
    check(compiled(kernels.segment_kernel, constants, launch.SEGMENT_WARPS), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(Surrogate)))
@pytest.mark.parametrize("segments", [WITHOUT_SEGMENTS, {}])
def test_every_member_of_the_family(number: int, segments: dict[str, Any], tmp_path: Path) -> None:
    """Each surrogate with two corrections and two penalties, each kind in at least four kernels."""
    surrogate, penalties = list(Surrogate)[number], list(Penalty)
    for step in (0, 1):
        correction = list(Correction)[(number + step) % 3]
        penalty = penalties[(number + 2 * step + bool(segments)) % 4]
        members = {
            "SURROGATE": surrogate.value,
            "CORRECTION": correction.value,
            "PENALTY": penalty.value,
        }
        check_token_kernel(members | segments, tmp_path)


@pytest.mark.slow
def test_without_any_optional_input(tmp_path: Path) -> None:
    members = {"SURROGATE": "clip", "CORRECTION": "truncate", "PENALTY": "k2"}
    absent = {"proximal": None, "reference": None, "entropy": None, "entropy_gradient_out": None}
    check_token_kernel(members | WITHOUT_SEGMENTS | absent, tmp_path)
    segment = {"MOVED": "", "MISMATCH": "", "SHARE": True, "BLOCK": launch.SEGMENT_BLOCK, "proximal": None}
    unwritten = {"moved_out": None, "mismatch_out": None}
    check(compiled(kernels.segment_kernel, segment | unwritten, launch.SEGMENT_WARPS), tmp_path)
