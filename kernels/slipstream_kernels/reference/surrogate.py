"""Floor 1. The parts of a token's loss in plain PyTorch: ratios, their correction, surrogate and penalty.

Each part comes with its slope, the derivative with respect to the token's log-probability.

Dimensions: N packed tokens, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from slipstream_kernels.objective import Correction, Level, Objective, Penalty, Surrogate

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this magnitude before exp, so that no ratio overflows float32."""


def segment_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return [N] int64: the segment each token lies in."""
    index = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(index, cu_seqlens.diff(), output_size=tokens)


def clamped(log_ratio_N: Tensor) -> Tensor:
    """Return [N] log-ratios within +-MAX_LOG_RATIO."""
    return log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def inside(log_ratio_N: Tensor) -> Tensor:
    """Return [N] bool: where the clamp lets a gradient through."""
    return log_ratio_N.abs() <= MAX_LOG_RATIO


def level_log_ratio(log_ratio_N: Tensor, level: Level, live_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return [N] log-ratios at `level`, not clamped; those of tokens that are not live must be 0.

    Above tokens the value is the segment's, the gradient to the token's log-probability stays 1.
    """
    if level is Level.TOKEN:
        return log_ratio_N
    ids = segment_ids(cu_seqlens, live_N.numel())
    constant = log_ratio_N.detach()
    zero = constant.new_zeros(cu_seqlens.numel() - 1)
    whole = zero.index_add(0, ids, constant)
    if level is Level.GEOMETRIC:
        whole = whole / zero.index_add(0, ids, live_N.to(zero.dtype)).clamp(min=1.0)
    return whole[ids] + (log_ratio_N - constant)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corrected:
    """[N] what multiplies the surrogate, and why."""

    importance: Tensor
    capped: Tensor | None
    """bool: truncated."""
    rejected: Tensor | None
    """bool: masked."""


def corrected(log_ratio_N: Tensor, objective: Objective) -> Corrected:
    """Return the correction of [N] proximal / behavior log-ratios, which are already at their level.

    Formulas and sources: objective.Correction.
    """
    if objective.correction is Correction.NONE:
        return Corrected(importance=torch.ones_like(log_ratio_N), capped=None, rejected=None)
    ratio = clamped(log_ratio_N).exp()
    above = ratio > objective.importance_cap
    if objective.correction is Correction.TRUNCATE:
        importance = ratio.clamp(max=objective.importance_cap)
        return Corrected(importance=importance, capped=above, rejected=None)
    rejected = above | (ratio < objective.importance_floor)
    return Corrected(importance=torch.where(rejected, 0.0, ratio), capped=None, rejected=rejected)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Term:
    """[N] the surrogate's loss and what there is to say about it."""

    loss: Tensor
    slope: Tensor
    bounded: Tensor | None
    """bool: the clip, or the cap of cispo and topr, took effect."""
    dual: Tensor | None
    """bool: the dual clip took effect."""


def surrogate(
    log_ratio_N: Tensor, logprob_N: Tensor, advantage_N: Tensor, importance_N: Tensor, objective: Objective
) -> Term:
    """Return importance * L of each token; `log_ratio_N` is current / proximal at its level.

    All arguments: [N]. Formulas and sources: objective.Surrogate.
    """
    ratio = clamped(log_ratio_N).exp()
    fixed = ratio.detach()
    moves = inside(log_ratio_N.detach())
    factor = -importance_N * advantage_N
    low, high = 1.0 - objective.clip_low, 1.0 + objective.clip_high
    match objective.surrogate:
        case Surrogate.CLIP:
            bounded = torch.where(advantage_N >= 0, fixed > high, fixed < low)
            dual = (advantage_N < 0) & (fixed > objective.dual_clip)
            still = torch.where(dual, objective.dual_clip, fixed.clamp(low, high))
            loss = factor * torch.where(bounded | dual, still, ratio)
            return Term(
                loss=loss, slope=factor * fixed * (moves & ~(bounded | dual)), bounded=bounded, dual=dual
            )
        case Surrogate.CISPO:
            slope = factor * fixed.clamp(low, high)
            bounded = (fixed < low) | (fixed > high)
            return Term(loss=slope * logprob_N, slope=slope, bounded=bounded, dual=None)
        case Surrogate.TOPR:
            bounded = (advantage_N < 0) & (fixed > 1.0)
            slope = factor * torch.where(advantage_N < 0, fixed.clamp(max=1.0), 1.0)
            return Term(loss=slope * logprob_N, slope=slope, bounded=bounded, dual=None)
        case Surrogate.SAPO:
            heat = torch.where(
                advantage_N > 0, objective.gate_positive, torch.full_like(ratio, objective.gate_negative)
            )
            gate = (heat * (ratio - 1.0)).sigmoid()
            slope = factor * 4.0 * (gate * (1.0 - gate)).detach() * fixed * moves
            return Term(loss=factor * 4.0 / heat * gate, slope=slope, bounded=None, dual=None)
        case _:
            assert_never(objective.surrogate)


def penalised(drift_N: Tensor | None, penalty: Penalty) -> tuple[Tensor, Tensor] | None:
    """Return the penalty of current / reference log-ratios and its slope, or None where the loss has none.

    drift_N: [N], not clamped; both results: [N], in nats. Formulas and source: objective.Penalty.
    """
    if drift_N is None or penalty is Penalty.K1_IN_REWARD:
        return None
    drift = clamped(drift_N)
    constant, moves = drift.detach(), inside(drift_N.detach())
    k2 = 0.5 * drift.square()
    match penalty:
        case Penalty.K2:
            return k2, constant * moves
        case Penalty.K3:
            return (-drift).exp() - 1.0 + drift, (1.0 - (-constant).exp()) * moves
        case Penalty.K3_WITH_K2_GRADIENT:
            k3 = (-constant).exp() - 1.0 + constant
            return k3 + (k2 - k2.detach()), constant * moves
        case _:
            assert_never(penalty)
