"""Floor 3. The linear head on the CPU: PyTorch's matrix product, and sweeps of C++ over its rows of logits.

The seam between a head's ops and what computes them, as triton/linear_logprob.py is: `head_scores`, in steps
`head_parts`, `merge_parts` and `finish`, and `logit_gradient_`.

Dimensions: C rows of a chunk, A active rows among them, H hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from slipstream_kernels import native
from slipstream_kernels.errors import NativeError
from slipstream_kernels.statistics import PART_COLUMNS

_POINTER, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def head_scores(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    labels_C: Tensor,
    inverse_temperature: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    logits_CV: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [C] log-probability, entropy and log-sum-exp over a whole vocabulary, in nats.

    Of z = inverse_temperature * cap(hidden @ weight.T + bias), which logits_CV is left with. Everything is
    float32 and contiguous but labels_C, int64. Raises NativeError.
    """
    torch.mm(hidden_CH, weight_VH.t(), out=logits_CV)
    rows, columns = logits_CV.shape
    logprob_C, entropy_C, logsumexp_C = torch.empty(rows), torch.empty(rows), torch.empty(rows)
    status = _library().slipstream_logit_scores_f32(
        logits_CV.data_ptr(),
        labels_C.data_ptr(),
        None if bias_V is None else bias_V.data_ptr(),
        inverse_temperature.data_ptr(),
        inverse_temperature.numel() > 1,
        softcap or 0.0,
        rows,
        columns,
        torch.get_num_threads(),
        logprob_C.data_ptr(),
        entropy_C.data_ptr(),
        logsumexp_C.data_ptr(),
    )
    if status != native.OK:
        raise NativeError(f"slipstream_logit_scores_f32: {native.reason(status)}")
    return logprob_C, entropy_C, logsumexp_C


def head_parts(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    labels_C: Tensor,
    inverse_temperature: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    logits_CV: Tensor,
) -> Tensor:
    """Return [K, 4, C]: what merge_parts needs of each part of the vocabulary; otherwise as head_scores.

    A part has PART_COLUMNS columns, the last what is left; its four numbers: see statistics.py.
    """
    torch.mm(hidden_CH, weight_VH.t(), out=logits_CV)
    rows, columns = logits_CV.shape
    parts_K4C = torch.empty(-(-columns // PART_COLUMNS), 4, rows)
    _run(
        _library().slipstream_logit_parts_f32,
        logits_CV.data_ptr(),
        labels_C.data_ptr(),
        _address(bias_V),
        inverse_temperature.data_ptr(),
        inverse_temperature.numel() > 1,
        softcap or 0.0,
        rows,
        columns,
        torch.get_num_threads(),
        parts_K4C.data_ptr(),
    )
    return parts_K4C


def merge_parts(parts_K4C: Tensor) -> Tensor:
    """Return [4, C] of a vocabulary from its [K, 4, C] parts, merged in index order; raises NativeError."""
    parts, _, rows = parts_K4C.shape
    whole_4C = torch.empty(4, rows)
    _run(_library().slipstream_merge_parts_f32, parts_K4C.data_ptr(), parts, rows, whole_4C.data_ptr())
    return whole_4C


def finish(whole_4C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what head_scores does, with the same bits, from the merged parts of a whole vocabulary.

    whole_4C: [4, C] float32 of merge_parts. Returns [C] each, in nats. Raises NativeError.
    """
    rows = whole_4C.shape[1]
    scores = torch.empty(rows), torch.empty(rows), torch.empty(rows)
    _run(
        _library().slipstream_finish_parts_f32,
        whole_4C.data_ptr(),
        rows,
        *(score.data_ptr() for score in scores),
    )
    return scores


def logit_gradient_(
    logits_CV: Tensor,
    labels_C: Tensor,
    *,
    logsumexp_C: Tensor,
    entropy_C: Tensor,
    grad_logprob_C: Tensor | None,
    grad_entropy_C: Tensor | None,
    grad_logsumexp_C: Tensor | None,
    inverse_temperature: Tensor,
    softcap: float | None,
    active_A: Tensor,
) -> Tensor:
    """Return [A, V] gradients to hidden @ weight.T of the active rows, in the place of the first logits.

        dz = g (1_label - p) - g_entropy p (ln p + entropy) + g_logsumexp p,   p = exp(z - logsumexp)

    active_A: int64, ascending. Raises NativeError.
    """
    _run(
        _library().slipstream_logit_gradient_f32,
        logits_CV.data_ptr(),
        labels_C.data_ptr(),
        logsumexp_C.data_ptr(),
        entropy_C.data_ptr(),
        _address(grad_logprob_C),
        _address(grad_entropy_C),
        _address(grad_logsumexp_C),
        inverse_temperature.data_ptr(),
        inverse_temperature.numel() > 1,
        softcap or 0.0,
        active_A.data_ptr(),
        active_A.numel(),
        logits_CV.shape[1],
        torch.get_num_threads(),
    )
    return logits_CV[: active_A.numel()]


@cache
def _library() -> ctypes.CDLL:
    library = native.library()
    rows: list[type] = [*[_POINTER] * 4, _I32, _F32, _I64, _I64, _I32]
    library.slipstream_logit_scores_f32.argtypes = [*rows, *[_POINTER] * 3]
    library.slipstream_logit_parts_f32.argtypes = [*rows, _POINTER]
    library.slipstream_merge_parts_f32.argtypes = [_POINTER, _I64, _I64, _POINTER]
    library.slipstream_finish_parts_f32.argtypes = [_POINTER, _I64, *[_POINTER] * 3]
    library.slipstream_logit_gradient_f32.argtypes = [
        *[_POINTER] * 8, _I32, _F32, _POINTER, _I64, _I64, _I32,
    ]  # fmt: skip
    return library


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(function: ctypes._NamedFuncPointer, *arguments: object) -> None:
    if (status := function(*arguments)) != native.OK:
        raise NativeError(f"{function.__name__}: {native.reason(status)}")
