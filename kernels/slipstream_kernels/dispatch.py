"""Floor 2. Chooses the implementation of an op: an explicit choice never falls back, only None may choose."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from importlib.util import find_spec
from typing import assert_never

from slipstream_kernels import native, native_cuda
from slipstream_kernels.errors import BackendError, BackendUnavailableError

_NO_TRITON = "Triton is not installed; install it (pip install triton), or use backend 'reference'"


class Backend(StrEnum):
    """Where an op runs."""

    REFERENCE = "reference"
    """Plain PyTorch or NumPy: the definition."""
    NATIVE = "native"
    """C++ behind the plain C ABI, on the CPU."""
    TRITON = "triton"
    """Kernels in Triton, on CUDA tensors."""
    CUDA = "cuda"
    """CUDA C++ behind the plain C ABI, on CUDA tensors."""


def choose(
    op: str, backend: Backend | str | None, *, implemented: Sequence[Backend], device: str = "cpu"
) -> Backend:
    """Return the backend that `op` runs on.

    `implemented` lists the op's backends, the preferred one first and the reference last. None
    takes the first that is available for `device`. Raises BackendError when an explicit choice is
    unknown, not implemented or does not serve the device, and BackendUnavailableError when it is
    not installed here.
    """
    if backend is None:
        return _preferred(tuple(implemented), device, native.available())
    names = ", ".join(implemented)
    if backend not in implemented:
        raise BackendError(
            f"{op}: backend {str(backend)!r} does not exist for this op; choose one of {names}, or None"
        )
    chosen = Backend(backend)
    if obstacle := _obstacle(op, chosen, device):
        raise obstacle
    return chosen


@lru_cache
def _preferred(implemented: tuple[Backend, ...], device: str, native_here: bool) -> Backend:
    """Return the first that serves the device; looked for once, since that takes longer than a small op."""
    # Triton's interpreter is for tests, no choice for tensors on the CPU.
    unfit = set() if device == "cuda" else {Backend.CUDA, Backend.TRITON}
    if not native_here:
        unfit.add(Backend.NATIVE)
    return next(b for b in implemented if b not in unfit and not _obstacle("", b, device))


def backends() -> dict[str, str]:
    """Return for each backend "available", or one sentence that says why it does not work here.

    A backend that is available serves the ops that have it, for tensors on its device.
    """
    found = {str(backend): "available" for backend in Backend}
    if not native.available():
        found[Backend.NATIVE] = native.description()
    if find_spec("triton") is None:
        found[Backend.TRITON] = _NO_TRITON
    elif not interpreted() and not _has_gpu():
        found[Backend.TRITON] = (
            "Triton needs a CUDA device, and PyTorch finds none; TRITON_INTERPRET=1 runs its kernels on the"
            " CPU, slowly, in float32"
        )
    if not native_cuda.available():
        found[Backend.CUDA] = native_cuda.description()
    return found


def _obstacle(op: str, backend: Backend, device: str) -> BackendError | None:
    match backend:
        case Backend.REFERENCE:
            return None
        case Backend.NATIVE:
            if device != "cpu":
                return BackendError(f"{op}: backend 'native' takes CPU tensors, got tensors on {device}")
            return None if native.available() else BackendUnavailableError(f"{op}: {native.description()}")
        case Backend.TRITON:
            return _triton_obstacle(op, device)
        case Backend.CUDA:
            return _cuda_obstacle(op, device)
        case _:
            assert_never(backend)


def _cuda_obstacle(op: str, device: str) -> BackendError | None:
    if not native_cuda.available():
        return BackendUnavailableError(f"{op}: {native_cuda.description()}")
    if device != "cuda":
        return BackendError(f"{op}: backend 'cuda' takes CUDA tensors, got tensors on {device}")
    return None


def _triton_obstacle(op: str, device: str) -> BackendError | None:
    if find_spec("triton") is None:
        return BackendUnavailableError(f"{op}: {_NO_TRITON}")
    if device != "cuda" and not interpreted():
        return BackendError(
            f"{op}: backend 'triton' takes CUDA tensors, got tensors on {device}; TRITON_INTERPRET=1 runs "
            "its kernels on the CPU, slowly, in float32"
        )
    return None


def _has_gpu() -> bool:
    # Imported here: choosing a backend for arrays needs no torch.
    import torch

    return torch.cuda.is_available()


def interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
