"""Floor 3. The pass of the policy loss over tokens in C++: one sweep in place of a hundred small ops.

Dimensions: N packed tokens.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream_kernels import native
from slipstream_kernels.errors import NativeError
from slipstream_kernels.objective import Correction, Level, Objective, Penalty, PolicyLoss, Surrogate
from slipstream_kernels.reference.policy import PolicyInputs, token_shares
from slipstream_kernels.reference.policy_metrics import COUNTS, SUMS
from slipstream_kernels.reference.surrogate import level_log_ratio

_LOSSES: Final = ("loss_surrogate", "loss_kl", "loss_entropy")
_NAMES: Final = (*_LOSSES, *SUMS, *COUNTS, "ratio_max", "ratio_min")
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


def policy_loss(inputs: PolicyInputs, objective: Objective, divisor: Tensor) -> PolicyLoss:
    """Return what the reference returns, differentiable in logprob_N and entropy_N; raises NativeError."""
    share_N = token_shares(inputs.weight_N, inputs.cu_seqlens, objective, divisor)
    terms = policy_terms(inputs, share_N, objective)
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        inputs.logprob_N, inputs.entropy_N, terms.loss, terms.grad_logprob_N, terms.grad_entropy_N
    )
    return PolicyLoss(
        loss=loss,
        grad_logprob_N=terms.grad_logprob_N,
        grad_entropy_N=terms.grad_entropy_N,
        metrics=terms.metrics,
    )


def policy_terms(inputs: PolicyInputs, share_N: Tensor, objective: Objective) -> PolicyLoss:
    """Return what the reference's policy_terms returns, without a graph for autograd; raises NativeError."""
    moved_N, mismatch_N = _segment_values(inputs, objective)
    tensors = (
        inputs.logprob_N, inputs.behavior_N, inputs.proximal_N, inputs.reference_N, inputs.entropy_N,
        inputs.advantage_N, inputs.weight_N, share_N, moved_N, mismatch_N,
    )  # fmt: skip
    plain = [None if t is None else t.detach().float().contiguous() for t in tensors]
    grad_logprob_N = torch.empty(share_N.numel())
    grad_entropy_N = None if inputs.entropy_N is None else torch.empty_like(grad_logprob_N)
    sums = torch.empty(len(_NAMES), dtype=torch.float64)
    status = _function()(
        ctypes.byref(_Inputs(*(None if t is None else t.data_ptr() for t in plain))),
        ctypes.byref(_goal(objective)),
        grad_logprob_N.numel(),
        grad_logprob_N.data_ptr(),
        None if grad_entropy_N is None else grad_entropy_N.data_ptr(),
        sums.data_ptr(),
    )
    if status != 0:
        raise NativeError(f"slipstream_policy_terms_f32: {native.reason(status)}")
    return PolicyLoss(
        loss=sums[: len(_LOSSES)].sum().float(),
        grad_logprob_N=grad_logprob_N,
        grad_entropy_N=grad_entropy_N,
        metrics=dict(zip(_NAMES, sums.float().unbind(), strict=True)),
    )


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
def _function() -> Any:
    function = native.library().slipstream_policy_terms_f32
    function.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_void_p] * 3]
    return function
