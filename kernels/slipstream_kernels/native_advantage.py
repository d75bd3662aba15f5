"""Floor 3. Advantages and returns of packed segments in one pass of C++ or CUDA.

Dimensions: N packed tokens, S segments.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from slipstream_kernels import native, native_cuda, reference
from slipstream_kernels.checks import plain
from slipstream_kernels.errors import NativeError

CUDA_TILE = 2048
"""Tokens of a tile of the CUDA kernel; a call of no more needs no workspace."""
_TILE_BYTES = 20


class Estimator(IntEnum):
    """What is estimated, by the numbers of slipstream.h."""

    GAE = 0
    TD_LAMBDA = 1
    VTRACE = 2
    RETURN = 3


class _Steps(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("value", "reward", "ratio", "bootstrap", "sampled", "cu_seqlens")
        ),
        *((name, ctypes.c_int64) for name in ("segments", "tokens")),
    )


class _Settings(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("discount", "decay", "trace", "rest", "rho_cap", "trace_cap")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The numbers of an estimator, in [0, 1] but for the caps."""

    discount: float
    trace_lambda: float = 1.0
    rho_cap: float = 1.0
    trace_cap: float = 1.0


def estimate(
    estimator: Estimator,
    factors: Factors,
    *,
    values_N: Tensor | None = None,
    rewards_N: Tensor,
    log_ratio_N: Tensor | None = None,
    bootstrap_S: Tensor | None,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    cuda: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """Return [N] advantages, None for estimators of returns alone, and [N] targets; 0 outside the mask.

    cu_seqlens: [S + 1] int64. With `cuda` all tensors lie on one device, and the call waits for nothing.
    Raises NativeError, on the CPU also for bounds that are none.
    """
    if log_ratio_N is not None and not cuda:
        log_ratio_N = log_ratio_N.detach().float().clamp(max=reference.MAX_LOG_RATIO).exp()
    given = [
        None if tensor is None else plain(tensor, torch.float32)
        for tensor in (values_N, rewards_N, log_ratio_N, bootstrap_S)
    ]
    sampled = plain(mask_N if mask_N.dtype is torch.bool else mask_N != 0, torch.bool)
    tokens, bounds = rewards_N.numel(), plain(cu_seqlens, torch.int64)
    steps = _Steps(
        *(None if tensor is None else tensor.data_ptr() for tensor in given),
        *(sampled.data_ptr(), bounds.data_ptr(), bounds.numel() - 1, tokens),
    )
    settings = _Settings(
        estimator,
        factors.discount,
        factors.discount * factors.trace_lambda,
        factors.trace_lambda,
        1.0 - factors.trace_lambda,
        factors.rho_cap,
        factors.trace_cap,
    )
    target_N = torch.empty(tokens, device=rewards_N.device)
    advantages = estimator in (Estimator.GAE, Estimator.VTRACE)
    advantage_N = torch.empty_like(target_N) if advantages else None
    if cuda:
        _queue(steps, settings, advantage_N, target_N)
        return advantage_N, target_N
    status = _library().slipstream_estimate_f32(
        *(ctypes.byref(steps), ctypes.byref(settings), torch.get_num_threads()),
        *(None if advantage_N is None else advantage_N.data_ptr(), target_N.data_ptr()),
    )
    if status != native.OK:
        raise NativeError(f"slipstream_estimate_f32: {native.reason(status)}")
    return advantage_N, target_N


def _queue(steps: _Steps, settings: _Settings, advantage_N: Tensor | None, target_N: Tensor) -> None:
    device = target_N.device
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return _queue(steps, settings, advantage_N, target_N)
    size_bytes = _TILE_BYTES * -(-steps.tokens // CUDA_TILE) if steps.tokens > CUDA_TILE else 0
    workspace = torch.empty(size_bytes, dtype=torch.uint8, device=device) if size_bytes else None
    native_cuda.call(
        "slipstream_cuda_estimate_f32",
        *(ctypes.byref(steps), ctypes.byref(settings)),
        *(None if workspace is None else workspace.data_ptr(), size_bytes),
        *(None if advantage_N is None else advantage_N.data_ptr(), target_N.data_ptr()),
        torch.cuda.current_stream().cuda_stream,
    )
    return None


@cache
def _library() -> ctypes.CDLL:
    library = native.library()
    pointer = ctypes.c_void_p
    library.slipstream_estimate_f32.argtypes = [pointer, pointer, ctypes.c_int32, pointer, pointer]
    return library
