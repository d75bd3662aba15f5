"""Floor 2. Every op in plain PyTorch: the definition that backends, tests and benchmarks compare with.

Arguments are already checked by the public ops. Computation is in float32, or float64 for float64
inputs. (The definition of checksum64 needs no torch and stands in checksum.py.)

Dimensions: N packed tokens, H hidden, V vocabulary, S segments, G trajectories, C rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream_kernels.objective import Aggregation, Objective, PolicyLoss

CHUNK_ELEMENTS = 1 << 18
"""Logits held at once by linear_logprob: 1 MiB in float32, which stays in a core's cache."""
MIN_CHUNK_ROWS = 128
"""Least rows of a chunk, so that a large vocabulary's weight is not read again for every row."""
MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this magnitude before exp, so that no ratio overflows float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitSettings:
    """How hidden states become logits: z = inverse_temperature * cap(hidden @ weight.T + bias)."""

    inverse_temperature: Tensor
    """[1] or [N]."""
    softcap: float | None
    """cap(x) = softcap * tanh(x / softcap), or None for the identity."""


class _LinearLogprob(torch.autograd.Function):
    """Keeps log-sum-exp and entropy of each row; the backward pass makes the logits of a chunk again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        settings: LogitSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        weight = weight_VH.to(dtype)
        rows = hidden_NH.shape[0]
        logprob_N, entropy_N, logsumexp_N = (hidden_NH.new_empty(rows, dtype=dtype) for _ in range(3))
        for chunk in _chunks(rows, weight_VH.shape[0]):
            logits_CV, _ = _logits(hidden_NH[chunk].to(dtype), weight, bias_V, settings, chunk)
            label = logits_CV.gather(1, labels_N[chunk, None])[:, 0]
            peak = logits_CV.amax(1)
            # Relative to the peak: entropy as logsumexp - mean logit would cancel for confident rows.
            centred = logits_CV.sub_(peak[:, None])
            exponential = centred.exp()
            total = exponential.sum(1)
            logsumexp_N[chunk] = peak + total.log()
            logprob_N[chunk] = (label - peak) - total.log()
            entropy_N[chunk] = total.log() - exponential.mul_(centred).sum(1) / total
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, labels_N, entropy_N, logsumexp_N)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return logprob_N, entropy_N, logsumexp_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
    ) -> Any:
        """With p = exp(z - lse): dz = g_logprob (1_label - p) - g_entropy p (ln p + entropy) + g_lse p."""
        hidden_NH, weight_VH, bias_V, labels_N, entropy_N, logsumexp_N = ctx.saved_tensors
        settings: LogitSettings = ctx.settings
        dtype = entropy_N.dtype
        weight = weight_VH.to(dtype)
        grad_hidden = torch.zeros_like(hidden_NH)
        grad_weight = torch.zeros_like(weight)
        grad_bias = torch.zeros_like(weight[:, 0])
        for chunk in _chunks(hidden_NH.shape[0], weight.shape[0]):
            hidden = hidden_NH[chunk].to(dtype)
            logits_CV, slope_CV = _logits(hidden, weight, bias_V, settings, chunk)
            log_p = logits_CV.sub_(logsumexp_N[chunk, None])
            grad_CV = log_p.exp()
            row = torch.zeros_like(entropy_N[chunk])
            row = row if grad_logprob is None else row - grad_logprob[chunk]
            row = row if grad_lse is None else row + grad_lse[chunk]
            if grad_entropy is None:
                grad_CV.mul_(row[:, None])
            else:
                inner = log_p.add_(entropy_N[chunk, None]).mul_(-grad_entropy[chunk, None])
                grad_CV.mul_(inner.add_(row[:, None]))
            if grad_logprob is not None:
                grad_CV.scatter_add_(1, labels_N[chunk, None], grad_logprob[chunk, None])
            temperature = settings.inverse_temperature
            grad_CV.mul_(temperature if temperature.numel() == 1 else temperature[chunk, None])
            grad_CV = grad_CV if slope_CV is None else grad_CV.mul_(slope_CV)
            grad_hidden[chunk] = (grad_CV @ weight).to(hidden_NH.dtype)
            grad_weight.addmm_(grad_CV.T, hidden)
            grad_bias += grad_CV.sum(0) if bias_V is not None else 0
        return (
            grad_hidden,
            grad_weight.to(weight_VH.dtype),
            None if bias_V is None else grad_bias.to(bias_V.dtype),
            None,
            None,
        )


def linear_logprob(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, *, bias_V: Tensor | None, settings: LogitSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [N] log-probability of each label, [N] entropy and [N] log-sum-exp of softmax(z), in nats."""
    result: tuple[Tensor, Tensor, Tensor] = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias_V, labels_N.to(torch.int64), settings
    )
    return result


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logits(
    hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, settings: LogitSettings, chunk: slice
) -> tuple[Tensor, Tensor | None]:
    """Return [C, V] logits and, under a softcap, [C, V] d cap(x) / dx = 1 - tanh(x / softcap)^2."""
    logits_CV = hidden_CH @ weight_VH.T
    if bias_V is not None:
        logits_CV.add_(bias_V)
    slope_CV = None
    if settings.softcap is not None:
        squashed = logits_CV.div_(settings.softcap).tanh_()
        slope_CV = 1.0 - squashed.square()
        logits_CV = squashed.mul_(settings.softcap)
    temperature = settings.inverse_temperature
    return logits_CV.mul_(temperature if temperature.numel() == 1 else temperature[chunk, None]), slope_CV


def segment_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return [N] int64: the segment each token lies in."""
    index = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(index, cu_seqlens.diff(), output_size=tokens)


def segment_scan(decay_N: Tensor, input_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return [N] float32: output_t = input_t + decay_t * output_{t+1}, 0 after the end of each segment.

    All segments advance together, aligned at their ends; float64 inside, rounded once per output.
    """
    output_N = torch.empty_like(input_N, dtype=torch.float32)
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    carry_S = torch.zeros(starts.numel(), dtype=torch.float64, device=input_N.device)
    for back in range(1, int((ends - starts).max()) + 1 if starts.numel() else 1):
        segments = (ends - starts >= back).nonzero()[:, 0]
        rows = ends[segments] - back
        carry = input_N[rows].double() + decay_N[rows].double() * carry_S[segments]
        carry_S[segments] = carry
        output_N[rows] = carry.float()
    return output_N


def group_advantage(
    rewards_G: Tensor, group_ids: Tensor, *, kind: str, std_floor: float, lengths_G: Tensor | None
) -> Tensor:
    """Return [G] float32 advantages; see the public op for the kinds."""
    _, group = torch.unique(group_ids, return_inverse=True)
    reward = rewards_G.double()
    zero = torch.zeros(
        int(group.max()) + 1 if group.numel() else 0, dtype=torch.float64, device=reward.device
    )

    def group_sum(values: Tensor) -> Tensor:
        return zero.index_add(0, group, values)[group]

    count = group_sum(torch.ones_like(reward))
    weight = torch.ones_like(reward) if lengths_G is None else lengths_G.double()
    centred = reward - group_sum(weight * reward) / group_sum(weight)
    others = (count - 1).clamp(min=1)
    if kind == "rloo":
        centred = centred * count / others
    if kind == "std":
        spread = (group_sum(centred.square()) / others).sqrt()
        centred = centred / spread.clamp(min=max(std_floor, torch.finfo(torch.float64).tiny))
    # Compared exactly: rounding of the mean must not turn equal rewards into an advantage.
    highest = zero.scatter_reduce(0, group, reward, "amax", include_self=False)[group]
    lowest = zero.scatter_reduce(0, group, reward, "amin", include_self=False)[group]
    return torch.where(highest > lowest, centred, 0.0).float()


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
