"""Floor 3. The policy loss in C++: a sweep over tokens for their shares, one for loss, gradients and metrics.

Dimensions: N packed tokens, M of them trained, A of them with a gradient, S segments.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream_kernels import native
from slipstream_kernels.checks import plain
from slipstream_kernels.errors import NativeError
from slipstream_kernels.objective import Aggregation, Correction, Level, Objective, Penalty, Surrogate
from slipstream_kernels.policy_result import METRICS, PolicyLoss, PolicyMetrics
from slipstream_kernels.reference.policy import PolicyInputs
from slipstream_kernels.reference.surrogate import level_log_ratio

_AGGREGATIONS: Final = tuple(Aggregation)
_SURROGATES: Final = (Surrogate.CLIP, Surrogate.CISPO, Surrogate.TOPR, Surrogate.SAPO)
_CORRECTIONS: Final = (Correction.NONE, Correction.TRUNCATE, Correction.MASK)
_PENALTIES: Final = (Penalty.K1_IN_REWARD, Penalty.K2, Penalty.K3, Penalty.K3_WITH_K2_GRADIENT)
_TENSORS: Final = (
    "logprob", "behavior", "proximal", "reference", "entropy", "advantage", "weight", "share", "moved",
    "mismatch",
)  # fmt: skip
_FACTORS: Final = (
    "dual_clip", "gate_positive", "gate_negative", "importance_cap", "importance_floor", "trust_low",
    "trust_high", "kl_coefficient", "entropy_coefficient",
)  # fmt: skip


class _Inputs(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in _TENSORS)


class _Goal(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("surrogate", "correction", "penalty")),
        *((name, ctypes.c_float) for name in ("ratio_low", "ratio_high", *_FACTORS)),
    )


def policy_loss(inputs: PolicyInputs, objective: Objective, normalizer: Tensor | None) -> PolicyLoss:
    """Return what the reference returns, differentiable in logprob_N and entropy_N; raises NativeError."""
    share_N, _, _ = token_shares(inputs.weight_N, inputs.cu_seqlens, objective, normalizer)
    terms, _ = policy_terms(inputs, share_N, objective)
    needed = inputs.logprob_N.requires_grad or (
        inputs.entropy_N is not None and inputs.entropy_N.requires_grad
    )
    if not needed:
        return terms
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        inputs.logprob_N, inputs.entropy_N, terms.loss, terms.grad_logprob_N, terms.grad_entropy_N
    )
    return replace(terms, loss=loss)


def token_shares(
    weight_N: Tensor, cu_seqlens: Tensor, objective: Objective, normalizer: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [N] shares as the reference's token_shares, [M] trained tokens and [S + 1] bounds over them.

    normalizer: [] the denominator, or None for that of these tokens. cu_seqlens: int64. Raises NativeError
    for bounds of segments that are none.
    """
    weight_N, bounds = plain(weight_N, torch.float32), plain(cu_seqlens, torch.int64)
    divisor = None if normalizer is None else plain(normalizer, torch.float32)
    tokens = weight_N.numel()
    share_N, trained_N = torch.empty(tokens), torch.empty(tokens, dtype=torch.int64)
    trained_bounds, count = torch.empty_like(bounds), ctypes.c_int64()
    status = _library().slipstream_token_shares_f32(
        weight_N.data_ptr(),
        bounds.data_ptr(),
        bounds.numel() - 1,
        tokens,
        _AGGREGATIONS.index(objective.aggregation),
        objective.fixed_length,
        None if divisor is None else divisor.data_ptr(),
        share_N.data_ptr(),
        trained_N.data_ptr(),
        trained_bounds.data_ptr(),
        ctypes.byref(count),
    )
    if status != native.OK:
        raise NativeError(f"slipstream_token_shares_f32: {native.reason(status)}")
    return share_N, trained_N if count.value == tokens else trained_N[: count.value], trained_bounds


def policy_terms(inputs: PolicyInputs, share_N: Tensor, objective: Objective) -> tuple[PolicyLoss, Tensor]:
    """Return what the reference's policy_terms returns, without a graph, and [A] tokens with a gradient.

    Raises NativeError.
    """
    moved_N, mismatch_N = _segment_values(inputs, objective)
    tensors = (
        inputs.logprob_N, inputs.behavior_N, inputs.proximal_N, inputs.reference_N, inputs.entropy_N,
        inputs.advantage_N, inputs.weight_N, share_N, moved_N, mismatch_N,
    )  # fmt: skip
    ready = [None if tensor is None else plain(tensor, torch.float32) for tensor in tensors]
    tokens, count = share_N.numel(), ctypes.c_int64()
    grad_logprob_N = torch.empty(tokens)
    grad_entropy_N = None if inputs.entropy_N is None else torch.empty(tokens)
    active_N, loss, metrics_K = (
        torch.empty(tokens, dtype=torch.int64),
        torch.empty(()),
        torch.empty(len(METRICS)),
    )
    status = _library().slipstream_policy_terms_f32(
        ctypes.byref(_Inputs(*(None if tensor is None else tensor.data_ptr() for tensor in ready))),
        ctypes.byref(_goal(objective)),
        tokens,
        torch.get_num_threads(),
        grad_logprob_N.data_ptr(),
        None if grad_entropy_N is None else grad_entropy_N.data_ptr(),
        active_N.data_ptr(),
        ctypes.byref(count),
        loss.data_ptr(),
        metrics_K.data_ptr(),
    )
    if status != native.OK:
        raise NativeError(f"slipstream_policy_terms_f32: {native.reason(status)}")
    terms = PolicyLoss(
        loss=loss,
        grad_logprob_N=grad_logprob_N,
        grad_entropy_N=grad_entropy_N,
        metrics=PolicyMetrics(metrics_K),
    )
    return terms, active_N if count.value == tokens else active_N[: count.value]


class _Loss(torch.autograd.Function):
    """Passes the loss on; the backward pass scales the gradients that came with it."""

    @staticmethod
    def forward(ctx: Any, logprob: Tensor, entropy: Tensor | None, loss: Tensor, *gradients: Any) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.types = logprob.dtype, None if entropy is None else entropy.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        needed = ctx.needs_input_grad[:2]
        scaled = (
            (upstream * gradient).to(kind) if gradient is not None and asked else None
            for gradient, kind, asked in zip(ctx.saved_tensors, ctx.types, needed, strict=True)
        )
        return *scaled, None, None, None


def _segment_values(inputs: PolicyInputs, objective: Objective) -> tuple[Tensor | None, Tensor | None]:
    """Return [N] current / proximal and proximal / behavior log-ratios, None where a token has its own."""
    if not objective.sequence_level:
        return None, None
    live = inputs.weight_N > 0
    current = torch.where(live, inputs.logprob_N.detach().float(), 0.0)
    behavior = torch.where(live, inputs.behavior_N.float(), 0.0)
    proximal = current if inputs.proximal_N is None else torch.where(live, inputs.proximal_N.float(), 0.0)
    values = (current - proximal, objective.ratio_level), (proximal - behavior, objective.correction_level)
    moved_N, mismatch_N = (
        None if level is Level.TOKEN else level_log_ratio(value, level, live, inputs.cu_seqlens)
        for value, level in values
    )
    return moved_N, mismatch_N


@lru_cache(maxsize=64)
def _goal(objective: Objective) -> _Goal:
    return _Goal(
        _SURROGATES.index(objective.surrogate),
        _CORRECTIONS.index(objective.correction),
        _PENALTIES.index(objective.penalty),
        1.0 - objective.clip_low,
        1.0 + objective.clip_high,
        *(getattr(objective, name) for name in _FACTORS),
    )


@cache
def _library() -> ctypes.CDLL:
    library = native.library()
    pointer, size, choice = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.slipstream_token_shares_f32.argtypes = [
        pointer, pointer, size, size, choice, ctypes.c_float, *[pointer] * 5,
    ]  # fmt: skip
    library.slipstream_policy_terms_f32.argtypes = [pointer, pointer, size, choice, *[pointer] * 6]
    return library
