"""Floor 4. The policy-gradient loss over packed tokens, its normaliser and its metrics.

Dimensions: N packed tokens, S segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from slipstream_kernels import native_policy, reference
from slipstream_kernels.checks import check_cu_seqlens, check_shape
from slipstream_kernels.dispatch import Backend, choose
from slipstream_kernels.errors import ObjectiveError
from slipstream_kernels.objective import Objective, PolicyLoss
from slipstream_kernels.policy_inputs import checked_inputs, divisor_of

IMPLEMENTED = (Backend.TRITON, Backend.NATIVE, Backend.REFERENCE)


def policy_loss(
    logprob_N: Tensor,
    *,
    behavior_N: Tensor,
    proximal_N: Tensor | None = None,
    reference_N: Tensor | None = None,
    advantage_N: Tensor,
    weight_N: Tensor,
    cu_seqlens: Tensor,
    objective: Objective,
    entropy_N: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    backend: Backend | str | None = None,
) -> PolicyLoss:
    """Return the policy-gradient loss of packed tokens under an objective.

    With log-probabilities of the current, proximal, behavior and reference policy, and sg =
    stop-gradient:

        rho = sg exp(proximal - behavior)    at Objective.correction_level, then corrected
        r = exp(logprob - proximal)          at Objective.ratio_level
        L = rho surrogate(r, A) + kl_coefficient penalty(logprob - reference)
            - entropy_coefficient entropy

    Surrogate, Correction, Penalty and Level define their members; by default L is decoupled PPO's

        min(rho, importance_cap) max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    Tokens whose exp(logprob - behavior) leaves [trust_low, trust_high] contribute 0, tokens that the
    correction masks have no surrogate, and Objective.aggregation combines the others; its
    denominators count them all the same. Log-ratios are clamped to +-20, outside of which r and the
    penalty have no gradient.

    logprob_N and all arguments ending in _N: [N]; cu_seqlens: [S + 1] segment bounds. weight_N: 0
    takes a token out whatever its other values, NaN and infinity included. proximal_N None stands
    for sg logprob_N (one update per batch); proximal_N = behavior_N gives PPO against the behavior
    policy. normalizer: the sum of batch_normalizer over all micro-batches of a batch, so that their
    losses and gradients sum to those of the whole batch; None: that of these tokens. `loss` is
    differentiable in logprob_N and entropy_N; everything else is constant. Raises ShapeError,
    ObjectiveError and BackendError. Sources: Hilton et al. 2021, arXiv:2110.00641, eq. 2, and the
    papers that Surrogate, Level, Correction and Penalty name.
    """
    op = "policy_loss"
    # The others compute in float32.
    implemented = (Backend.REFERENCE,) if logprob_N.dtype is torch.float64 else IMPLEMENTED
    chosen = choose(op, backend, implemented=implemented, device=logprob_N.device.type)
    inputs = checked_inputs(
        op, objective, tokens=logprob_N.numel(), logprob_N=logprob_N, behavior_N=behavior_N,
        proximal_N=proximal_N, reference_N=reference_N, entropy_N=entropy_N, advantage_N=advantage_N,
        weight_N=weight_N, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if objective.entropy_coefficient > 0 and entropy_N is None:
        raise ObjectiveError(f"{op}: entropy_N must be given when Objective.entropy_coefficient is positive")
    divisor = divisor_of(op, inputs, objective, normalizer)
    if chosen is Backend.TRITON:
        # Loaded only here: Triton need not be installed.
        from slipstream_kernels.triton import policy_loss as triton

        return triton.policy_loss(inputs, objective, divisor)
    if chosen is Backend.NATIVE:
        return native_policy.policy_loss(inputs, objective, divisor)
    return reference.policy_loss(inputs, objective, divisor)


def batch_normalizer(weight_N: Tensor, cu_seqlens: Tensor, objective: Objective) -> Tensor:
    """Return [] float32: the denominator of these tokens under Objective.aggregation.

    token_mean: the sum of weights; sequence means: segments with a token of positive weight; fixed:
    S * fixed_length. It is additive over micro-batches that are cut between segments. weight_N:
    [N]; cu_seqlens: [S + 1]. Raises ShapeError.
    """
    check_shape("batch_normalizer", "weight_N", weight_N, (weight_N.numel(),))
    bounds = check_cu_seqlens("batch_normalizer", cu_seqlens, weight_N.numel())
    return reference.normalizer(weight_N, bounds, objective)


def merge_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the [] metrics of a whole from those of its micro-batches or ranks: sums and extremes."""
    merged: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            elif name.endswith("_max"):
                merged[name] = torch.maximum(merged[name], value)
            elif name.endswith("_min"):
                merged[name] = torch.minimum(merged[name], value)
            else:
                merged[name] = merged[name] + value
    return merged


def finish_metrics(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn merged sums and counts into the quantities one reads; [] each, 0 where nothing was counted.

    Raw ratios are r = exp(logprob - behavior) over the n tokens of positive weight, drawn from the
    behavior policy:

    - ``loss/surrogate``, ``loss/kl``, ``loss/entropy``: the parts of the loss
    - ``ratio/ess`` = (sum r)^2 / (n sum r^2); ``ratio/mean``, ``ratio/min``, ``ratio/max``
    - ``mismatch/k1`` = mean(-log r), ``mismatch/k2`` = mean((log r)^2 / 2), ``mismatch/k3`` =
      mean(r - 1 - log r): estimates of KL(behavior || current)
    - ``proximal/k1``, ``proximal/k2``, ``proximal/k3``: the same with exp(logprob - proximal)
    - ``reference/k1`` = mean(d), ``reference/k2`` = mean(d^2 / 2), ``reference/k3`` =
      mean(exp(-d) - 1 + d) with d = logprob - reference: estimates of KL(current || reference)
    - ``importance/mean``: corrected proximal / behavior ratio; ``importance/capped``,
      ``importance/rejected``: share that was truncated, that was masked
    - ``clip/positive``, ``clip/negative``: share of tokens with advantage of that sign whose ratio
      the surrogate's clip bounded; ``clip/dual``: share of those with negative advantage that the
      dual clip bounded
    - ``advantage/positive``, ``advantage/negative``: mean advantage of that sign, k1 in reward
      taken off
    - ``masked``: share outside the trust region; ``entropy``: mean, nats
    - ``token_count``: n
    """
    m = metrics
    tokens, ratio_sum = m["token_count"], m["ratio_sum"]
    return {
        "loss/surrogate": m["loss_surrogate"],
        "loss/kl": m["loss_kl"],
        "loss/entropy": m["loss_entropy"],
        "ratio/ess": _share(ratio_sum.square(), tokens * m["ratio_square_sum"]),
        "ratio/mean": _share(ratio_sum, tokens),
        "ratio/min": torch.where(tokens > 0, m["ratio_min"], 0.0),
        "ratio/max": m["ratio_max"],
        "mismatch/k1": _share(-m["log_ratio_sum"], tokens),
        "mismatch/k2": _share(m["k2_sum"], tokens),
        "mismatch/k3": _share(m["k3_sum"], tokens),
        "proximal/k1": _share(-m["proximal_log_ratio_sum"], m["proximal_count"]),
        "proximal/k2": _share(m["proximal_k2_sum"], m["proximal_count"]),
        "proximal/k3": _share(m["proximal_k3_sum"], m["proximal_count"]),
        "reference/k1": _share(m["reference_log_ratio_sum"], m["reference_count"]),
        "reference/k2": _share(m["reference_k2_sum"], m["reference_count"]),
        "reference/k3": _share(m["reference_k3_sum"], m["reference_count"]),
        "importance/mean": _share(m["importance_sum"], tokens),
        "importance/capped": _share(m["capped_count"], tokens),
        "importance/rejected": _share(m["rejected_count"], tokens),
        "clip/positive": _share(m["clipped_positive_count"], m["positive_count"]),
        "clip/negative": _share(m["clipped_negative_count"], m["negative_count"]),
        "clip/dual": _share(m["dual_clipped_count"], m["negative_count"]),
        "advantage/positive": _share(m["advantage_positive_sum"], m["positive_count"]),
        "advantage/negative": _share(m["advantage_negative_sum"], m["negative_count"]),
        "masked": _share(m["masked_count"], tokens),
        "entropy": _share(m["entropy_sum"], m["entropy_count"]),
        "token_count": tokens,
    }


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
