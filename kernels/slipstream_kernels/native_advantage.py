"""Floor 3. Advantages and returns of packed segments in one pass of C++.

Dimensions: N packed tokens, S segments.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from slipstream_kernels import native
from slipstream_kernels.checks import plain
from slipstream_kernels.errors import NativeError


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
    ratio_N: Tensor | None = None,
    bootstrap_S: Tensor | None,
    mask_N: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """Return [N] advantages, None for estimators of returns alone, and [N] targets; 0 outside the mask.

    cu_seqlens: [S + 1] int64. Raises NativeError for bounds that are none.
    """
    tokens, bounds = rewards_N.numel(), plain(cu_seqlens, torch.int64)
    sampled = plain(mask_N if mask_N.dtype is torch.bool else mask_N != 0, torch.bool)
    given = [
        None if tensor is None else plain(tensor, torch.float32)
        for tensor in (values_N, rewards_N, ratio_N, bootstrap_S)
    ]
    advantages = estimator in (Estimator.GAE, Estimator.VTRACE)
    advantage_N, target_N = torch.empty(tokens) if advantages else None, torch.empty(tokens)
    status = _library().slipstream_estimate_f32(
        ctypes.byref(
            _Steps(
                *(None if tensor is None else tensor.data_ptr() for tensor in given),
                sampled.data_ptr(),
                bounds.data_ptr(),
                bounds.numel() - 1,
                tokens,
            )
        ),
        ctypes.byref(
            _Settings(
                estimator,
                factors.discount,
                factors.discount * factors.trace_lambda,
                factors.trace_lambda,
                1.0 - factors.trace_lambda,
                factors.rho_cap,
                factors.trace_cap,
            )
        ),
        torch.get_num_threads(),
        None if advantage_N is None else advantage_N.data_ptr(),
        target_N.data_ptr(),
    )
    if status != native.OK:
        raise NativeError(f"slipstream_estimate_f32: {native.reason(status)}")
    return advantage_N, target_N


@cache
def _library() -> ctypes.CDLL:
    library = native.library()
    pointer = ctypes.c_void_p
    library.slipstream_estimate_f32.argtypes = [pointer, pointer, ctypes.c_int32, pointer, pointer]
    return library
