"""Floor 1. The policy loss in plain PyTorch: loss, gradient and metrics of packed tokens.

Dimensions: N packed tokens, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream_kernels.objective import Aggregation, Objective, PolicyLoss

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this magnitude before exp, so that no ratio overflows float32."""


def segment_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return [N] int64: the segment each token lies in."""
    index = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(index, cu_seqlens.diff(), output_size=tokens)


def normalizer(weight_N: Tensor, cu_seqlens: Tensor, objective: Objective) -> Tensor:
    """Return [] float32: what the weighted sum of token losses is divided by; additive over micro-batches."""
    segments = cu_seqlens.numel() - 1
    match objective.aggregation:
        case Aggregation.TOKEN_MEAN:
            return weight_N.float().sum()
        case Aggregation.FIXED:
            return weight_N.new_tensor(segments * objective.fixed_length, dtype=torch.float32)
        case _:
            return (_segment_weight(weight_N, cu_seqlens) > 0).float().sum()


def _segment_weight(weight_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    ids = segment_ids(cu_seqlens, weight_N.numel())
    zero = weight_N.new_zeros(cu_seqlens.numel() - 1, dtype=torch.float32)
    return zero.index_add(0, ids, weight_N.float())


def _token_shares(weight_N: Tensor, cu_seqlens: Tensor, objective: Objective, divisor: Tensor) -> Tensor:
    """Return [N] shares s such that the loss is sum(s L), whatever the aggregation."""
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
    """Return loss, gradient to the log-probabilities and metrics; see the public op for the formula."""
    live = inputs.weight_N > 0

    def lived(values: Tensor) -> Tensor:
        # Selected before any arithmetic: 0 * inf would be NaN.
        return torch.where(live, values.float(), 0.0)

    logprob, behavior = lived(inputs.logprob_N), lived(inputs.behavior_N.detach())
    advantage = lived(inputs.advantage_N.detach())
    current = logprob.detach()
    proximal = current if inputs.proximal_N is None else lived(inputs.proximal_N.detach())
    reference = current if inputs.reference_N is None else lived(inputs.reference_N.detach())

    raw_log_ratio = _clamp(current - behavior)
    raw_ratio = raw_log_ratio.exp()
    trusted = live & (raw_ratio >= objective.trust_low) & (raw_ratio <= objective.trust_high)
    uncapped = _clamp(proximal - behavior).exp()
    importance = uncapped.clamp(max=objective.importance_cap)
    ratio = _clamp(logprob - proximal).exp()
    low, high = 1.0 - objective.clip_low, 1.0 + objective.clip_high
    unclipped = torch.where(advantage >= 0, ratio <= high, ratio >= low)
    surrogate = -importance * advantage * torch.where(unclipped, ratio, ratio.detach().clamp(low, high))
    drift = _clamp(logprob - reference)

    share = torch.where(trusted, _token_shares(inputs.weight_N, inputs.cu_seqlens, objective, divisor), 0.0)
    loss_surrogate = (share * surrogate).sum()
    loss_kl = objective.kl_coefficient * (share * 0.5 * drift.square()).sum()
    entropy = None if inputs.entropy_N is None else lived(inputs.entropy_N)
    loss_entropy = (
        loss_kl.new_zeros(()) if entropy is None else -objective.entropy_coefficient * (share * entropy).sum()
    )

    within = (current - proximal).abs() <= MAX_LOG_RATIO
    slope = -importance * advantage * ratio.detach() * (unclipped & within)
    slope = slope + objective.kl_coefficient * drift.detach() * ((current - reference).abs() <= MAX_LOG_RATIO)
    sums = {
        "loss_surrogate": loss_surrogate,
        "loss_kl": loss_kl,
        "loss_entropy": loss_entropy,
        "ratio_sum": lived(raw_ratio).sum(),
        "ratio_square_sum": lived(raw_ratio.square()).sum(),
        "ratio_max": lived(raw_ratio).amax() if raw_ratio.numel() else raw_ratio.new_zeros(()),
        "log_ratio_sum": raw_log_ratio.sum(),
        "k3_sum": (raw_ratio - 1.0 - raw_log_ratio).sum(),
        "importance_sum": lived(importance).sum(),
        "reference_k2_sum": 0.5 * drift.square().sum(),
        "entropy_sum": loss_kl.new_zeros(()) if entropy is None else entropy.sum(),
    }
    counts = {
        "token_count": live,
        "positive_count": live & (advantage > 0),
        "negative_count": live & (advantage < 0),
        "clipped_positive_count": live & (advantage > 0) & ~unclipped,
        "clipped_negative_count": live & (advantage < 0) & ~unclipped,
        "capped_count": live & (uncapped > objective.importance_cap),
        "masked_count": live & ~trusted,
        "reference_count": live & (inputs.reference_N is not None),
        "entropy_count": live & (entropy is not None),
    }
    metrics = {name: value.detach() for name, value in sums.items()}
    metrics |= {name: chosen.sum().float() for name, chosen in counts.items()}
    return PolicyLoss(
        loss=loss_surrogate + loss_kl + loss_entropy, grad_logprob_N=share * slope, metrics=metrics
    )


def _clamp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
