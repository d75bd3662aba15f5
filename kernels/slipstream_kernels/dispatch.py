"""Floor 2. Chooses the implementation of an op: an explicit choice never falls back, only None may choose."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from importlib.util import find_spec
from typing import assert_never

from slipstream_kernels import native
from slipstream_kernels.errors import BackendError, BackendUnavailableError


class Backend(StrEnum):
    """Where an op runs."""

    REFERENCE = "reference"
    """Plain PyTorch or NumPy: the definition."""
    NATIVE = "native"
    """C++ behind the plain C ABI, on the CPU."""
    TRITON = "triton"
    CUDA = "cuda"


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
        return next(b for b in implemented if not _obstacle(op, b, device))
    names = ", ".join(implemented)
    if backend not in implemented:
        raise BackendError(
            f"{op}: backend {str(backend)!r} does not exist for this op; choose one of {names}, or None"
        )
    chosen = Backend(backend)
    if obstacle := _obstacle(op, chosen, device):
        raise obstacle
    return chosen


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
            return BackendUnavailableError(f"{op}: backend {backend.value!r} is not installed here")
        case _:
            assert_never(backend)


def _triton_obstacle(op: str, device: str) -> BackendError | None:
    if find_spec("triton") is None:
        return BackendUnavailableError(
            f"{op}: Triton is not installed; install it (pip install triton), or use backend 'reference'"
        )
    if device != "cuda" and not interpreted():
        return BackendError(
            f"{op}: backend 'triton' takes CUDA tensors, got tensors on {device}; TRITON_INTERPRET=1 runs "
            "its kernels on the CPU, slowly, in float32"
        )
    return None


def interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
