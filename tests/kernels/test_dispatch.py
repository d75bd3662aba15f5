"""An explicit backend never falls back; only None may choose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slipstream_kernels import (
    Backend,
    BackendError,
    BackendUnavailableError,
    NativeError,
    backends,
    checksum64,
    delta_encode,
    fp8_quantize,
    native,
    native_cuda,
    segment_scan,
)
from slipstream_kernels.dispatch import choose

BOTH = (Backend.NATIVE, Backend.REFERENCE)
needs_native = pytest.mark.skipif(not native.available(), reason=native.description())


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the native library, as on a machine that had no compiler."""
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libslipstream_cpu.so")
    monkeypatch.setattr(native, "library", native.library.__wrapped__)


@needs_native
def test_none_takes_the_first_that_serves() -> None:
    assert choose("op", None, implemented=BOTH) is Backend.NATIVE
    assert choose("op", None, implemented=BOTH, device="cuda") is Backend.REFERENCE


@pytest.mark.usefixtures("no_library")
def test_missing_library_is_named_and_never_replaced() -> None:
    assert choose("op", None, implemented=BOTH) is Backend.REFERENCE
    with pytest.raises(
        BackendUnavailableError, match=r"op: the native library .* is missing, because no C\+\+ compiler"
    ):
        choose("op", "native", implemented=BOTH)


def test_explicit_choice_that_cannot_be_is_an_error() -> None:
    with pytest.raises(
        BackendError, match="op: backend 'cuda' does not exist for this op; choose one of native"
    ):
        choose("op", "cuda", implemented=BOTH)
    with pytest.raises(BackendError, match="op: backend 'native' takes CPU tensors, got tensors on cuda"):
        choose("op", Backend.NATIVE, implemented=BOTH, device="cuda")
    with pytest.raises(BackendError, match="'triton' takes CUDA tensors, got tensors on cpu"):
        choose("op", "triton", implemented=(Backend.TRITON, Backend.REFERENCE))


@pytest.mark.skipif(native_cuda.available(), reason="a GPU is here")
def test_cuda_without_a_gpu_is_named() -> None:
    with pytest.raises(BackendUnavailableError, match=r"op: the CUDA library libslipstream_cuda\.so"):
        choose("op", "cuda", implemented=(Backend.CUDA, Backend.REFERENCE), device="cuda")
    with pytest.raises(BackendUnavailableError, match="segment_scan: the CUDA library"):
        segment_scan(torch.ones(1), torch.ones(1), torch.tensor([0, 1]), backend="cuda")
    with pytest.raises(BackendUnavailableError, match="checksum64: the CUDA library"):
        checksum64(b"", backend="cuda")
    with pytest.raises(BackendUnavailableError, match="fp8_quantize: the CUDA library"):
        fp8_quantize(torch.ones(1, 1), backend="cuda")
    half = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailableError, match="delta_encode: the CUDA library"):
        delta_encode(half, half, backend="cuda")


@pytest.mark.usefixtures("no_library")
def test_backends_are_listed_with_what_they_lack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_cuda, "LIBRARY", tmp_path / "libslipstream_cuda.so")
    monkeypatch.setattr(native_cuda, "library", native_cuda.library.__wrapped__)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = backends()
    assert list(found) == list(Backend)
    assert found["reference"] == "available"
    assert found["native"].startswith("the native library libslipstream_cpu.so is missing")
    assert found["cuda"].startswith("the CUDA library libslipstream_cuda.so is missing, because nvcc")
    assert torch.cuda.is_available() or "Triton" in found["triton"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends()["triton"] in ("available", found["triton"])


def test_damaged_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = tmp_path / "libslipstream_cpu.so"
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", damaged)
    with pytest.raises(
        BackendUnavailableError, match=r"the native library cannot be loaded: .*libslipstream_cpu\.so"
    ):
        native.library.__wrapped__()


@needs_native
def test_native_status_codes_are_named() -> None:
    with pytest.raises(NativeError, match="slipstream_checksum64: a size is negative"):
        native.checksum64(0, size_bytes=-1, threads=1)
    with pytest.raises(NativeError, match="slipstream_checksum64: a pointer is null"):
        native.checksum64(0, size_bytes=8, threads=1)
    with pytest.raises(NativeError, match="slipstream_segment_scan_f32: a pointer is null"):
        native.segment_scan(0, 0, 0, segments=0, tokens=0, threads=1, output=0)


@needs_native
def test_native_refuses_bad_segments() -> None:
    import numpy as np

    data = np.zeros(4, dtype=np.float32)
    for bounds in ([0, 3], [1, 4], [0, 5, 4], [0, 3, 2, 4]):
        cu_seqlens = np.array(bounds, dtype=np.int64)
        with pytest.raises(NativeError, match="cu_seqlens must begin with 0"):
            native.segment_scan(
                data.ctypes.data,
                data.ctypes.data,
                cu_seqlens.ctypes.data,
                segments=len(bounds) - 1,
                tokens=4,
                threads=1,
                output=data.ctypes.data,
            )


def test_ops_win_over_the_modules_of_their_name() -> None:
    code = (
        "import slipstream_kernels.linear_policy_loss, slipstream_kernels as k;"
        "print(callable(k.linear_policy_loss), callable(k.policy_loss), callable(k.linear_logprob))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["True"] * 3


def test_every_public_name_exists() -> None:
    import slipstream_kernels

    assert slipstream_kernels.__all__ == sorted(slipstream_kernels.__all__)
    assert all(getattr(slipstream_kernels, name) is not None for name in slipstream_kernels.__all__)
    assert set(slipstream_kernels._MODULE_OF_NAME) == set(slipstream_kernels.__all__)
    with pytest.raises(AttributeError, match="no attribute 'adam'"):
        slipstream_kernels.adam  # noqa: B018
