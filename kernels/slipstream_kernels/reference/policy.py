"""Floor 1. The policy loss in plain PyTorch: loss, gradients and metrics of packed tokens.

Dimensions: N packed tokens, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream_kernels.objective import Aggregation, Objective, Penalty
from slipstream_kernels.policy_result import PolicyLoss, PolicyMetrics
from slipstream_kernels.reference.policy_metrics import Pass, metrics_of
from slipstream_kernels.reference.surrogate import (
    clamped,
    corrected,
    level_log_ratio,
    penalised,
    segment_ids,
    surrogate,
)


def normalizer(weight_N: Tensor, cu_seqlens: Tensor, objective: Objective) -> Tensor:
    """Return [] float32: what the weighted sum of token losses is divided by; additive over micro-batches."""
    segments = cu_seqlens.numel() - 1
    match objective.aggregation:
        case Aggregation.TOKEN_MEAN:
            return weight_N.float().sum()
        case Aggregation.FIXED:
            return weight_N.new_full((), segments * objective.fixed_length, dtype=torch.float32)
        case _:
            return (_segment_weight(weight_N, cu_seqlens) > 0).float().sum()


def _segment_weight(weight_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    ids = segment_ids(cu_seqlens, weight_N.numel())
    zero = weight_N.new_zeros(cu_seqlens.numel() - 1, dtype=torch.float32)
    return zero.index_add(0, ids, weight_N.float())


def token_shares(weight_N: Tensor, cu_seqlens: Tensor, objective: Objective, divisor: Tensor) -> Tensor:
    """Return [N] float32 shares s such that the loss is sum(s L), whatever the aggregation.

    `divisor`: [] the batch's normalizer. Weights alone decide, so whatever is rejected later keeps
    its place in the denominators.
    """
    share_N = weight_N.float() / divisor.clamp(min=torch.finfo(torch.float32).tiny)
    if objective.aggregation is Aggregation.SEQUENCE_MEAN_TOKEN_MEAN:
        weight = _segment_weight(weight_N, cu_seqlens)[segment_ids(cu_seqlens, weight_N.numel())]
        share_N = torch.where(weight_N > 0, share_N / weight, 0.0)
    return share_N


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyInputs:
    """What a policy loss reads: [N] each, or None."""

    logprob_N: Tensor
    behavior_N: Tensor
    proximal_N: Tensor | None
    reference_N: Tensor | None
    entropy_N: Tensor | None
    advantage_N: Tensor
    weight_N: Tensor
    cu_seqlens: Tensor
    """[S + 1] int64."""


def policy_loss(inputs: PolicyInputs, objective: Objective, divisor: Tensor) -> PolicyLoss:
    """Return loss, [N] gradients and metrics; divisor: [] the batch's normalizer. Formula: the public op."""
    share_N = token_shares(inputs.weight_N, inputs.cu_seqlens, objective, divisor)
    return policy_terms(inputs, share_N, objective)


def policy_terms(inputs: PolicyInputs, share_N: Tensor, objective: Objective) -> PolicyLoss:
    """Return loss, gradients and metrics of tokens whose shares of the loss are known.

    `share_N`: [N], of token_shares over all tokens. Unless `objective.sequence_level`, tokens are
    independent of one another: all [N] inputs and shares may be any subset of rows, `cu_seqlens` is
    not read, and losses and metrics of disjoint subsets merge into those of the whole.
    """
    tokens = _live_tokens(inputs, objective)
    live, current, drift = tokens.live, tokens.logprob.detach(), tokens.drift
    raw_log_ratio = clamped(current - tokens.behavior)
    raw_ratio = raw_log_ratio.exp()
    share = torch.where(live, share_N.to(current.dtype), 0.0)
    rising, falling = tokens.advantage > 0, tokens.advantage < 0
    held = (rising & (raw_ratio > objective.trust_high)) | (falling & (raw_ratio < objective.trust_low))
    free_share = torch.where(held, 0.0, share)

    proximal = current if tokens.proximal is None else tokens.proximal
    mismatch, moved = proximal - tokens.behavior, tokens.logprob - proximal
    weight = corrected(
        level_log_ratio(mismatch, objective.correction_level, live, inputs.cu_seqlens), objective
    )
    term = surrogate(
        level_log_ratio(moved, objective.ratio_level, live, inputs.cu_seqlens),
        tokens.logprob,
        tokens.advantage,
        weight.importance,
        objective,
    )
    penalty = penalised(drift, objective.penalty)
    coefficient = objective.kl_coefficient
    loss_surrogate = (free_share * term.loss).sum()
    zero = loss_surrogate.new_zeros(())
    loss_kl = zero if penalty is None else coefficient * (share * penalty[0]).sum()
    gradient = free_share * term.slope
    if penalty is not None:
        gradient = gradient + share * (coefficient * penalty[1])
    bonus = -objective.entropy_coefficient
    loss_entropy = zero if tokens.entropy is None else bonus * (share * tokens.entropy).sum()
    seen = Pass(
        live=live,
        held=held,
        advantage=tokens.advantage,
        raw_ratio=raw_ratio,
        raw_log_ratio=raw_log_ratio,
        moved=None if tokens.proximal is None else clamped(moved.detach()),
        drift=None if drift is None else clamped(drift.detach()),
        entropy=None if tokens.entropy is None else tokens.entropy.detach(),
        weight=weight,
        surrogate=term,
    )
    losses = torch.stack((loss_surrogate, loss_kl, loss_entropy)).detach()
    return PolicyLoss(
        loss=loss_surrogate + loss_kl + loss_entropy,
        grad_logprob_N=gradient,
        grad_entropy_N=None if tokens.entropy is None else bonus * share,
        metrics=PolicyMetrics(torch.cat((losses, metrics_of(seen)))),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _LiveTokens:
    """[N] the inputs, 0 where the weight is not positive."""

    live: Tensor
    logprob: Tensor
    behavior: Tensor
    proximal: Tensor | None
    drift: Tensor | None
    """Current / reference log-ratio; differentiable, as logprob and entropy are."""
    entropy: Tensor | None
    advantage: Tensor
    """Without the penalty that is taken off the reward."""


def _live_tokens(inputs: PolicyInputs, objective: Objective) -> _LiveTokens:
    live = inputs.weight_N > 0
    dtype = torch.promote_types(inputs.logprob_N.dtype, torch.float32)

    def lived(values: Tensor) -> Tensor:
        # Selected before any arithmetic: 0 * inf would be NaN.
        return torch.where(live, values.to(dtype), 0.0)

    logprob, advantage = lived(inputs.logprob_N), lived(inputs.advantage_N.detach())
    drift = None if inputs.reference_N is None else logprob - lived(inputs.reference_N.detach())
    if drift is not None and objective.penalty is Penalty.K1_IN_REWARD:
        advantage = advantage - objective.kl_coefficient * clamped(drift.detach())
    return _LiveTokens(
        live=live,
        logprob=logprob,
        behavior=lived(inputs.behavior_N.detach()),
        proximal=None if inputs.proximal_N is None else lived(inputs.proximal_N.detach()),
        drift=drift,
        entropy=None if inputs.entropy_N is None else lived(inputs.entropy_N),
        advantage=advantage,
    )
