"""Floor 1. What a policy loss returns: the loss, its gradients, and its metrics as one vector.

Dimensions: N packed tokens, K metrics, P parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

LOSSES: Final = ("loss_surrogate", "loss_kl", "loss_entropy")
SUMS: Final = (
    "ratio_sum",
    "ratio_square_sum",
    "log_ratio_sum",
    "k2_sum",
    "k3_sum",
    "importance_sum",
    "proximal_log_ratio_sum",
    "proximal_k2_sum",
    "proximal_k3_sum",
    "reference_log_ratio_sum",
    "reference_k2_sum",
    "reference_k3_sum",
    "entropy_sum",
    "advantage_positive_sum",
    "advantage_negative_sum",
)
COUNTS: Final = (
    "token_count",
    "positive_count",
    "negative_count",
    "clipped_positive_count",
    "clipped_negative_count",
    "dual_clipped_count",
    "capped_count",
    "rejected_count",
    "masked_count",
    "proximal_count",
    "reference_count",
    "entropy_count",
)
METRICS: Final = (*LOSSES, *SUMS, *COUNTS, "ratio_max", "ratio_min")
"""The K names in order, those that do not add up last."""
NO_MINIMUM: Final = torch.finfo(torch.float32).max
"""The minimum over no token: finite, so that merged metrics stay finite."""
_PLACE: Final = {name: place for place, name in enumerate(METRICS)}


@dataclass(frozen=True, slots=True, eq=False)
class PolicyMetrics(Mapping[str, Tensor]):
    """Sums, counts and extremes over tokens by name, [] each; finish_metrics makes them readable."""

    values_K: Tensor
    """[K], in the order of METRICS."""

    def __getitem__(self, name: str) -> Tensor:
        """Return the [] metric; raises KeyError."""
        return self.values_K[_PLACE[name]]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(METRICS)

    def __len__(self) -> int:
        """Return K."""
        return len(METRICS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyLoss:
    """What a policy loss returns."""

    loss: Tensor
    """[] float32; backpropagates into logprob_N and entropy_N."""
    grad_logprob_N: Tensor
    """[N] float32, detached: d loss / d logprob_N; 0 where the weight is 0."""
    grad_entropy_N: Tensor | None = None
    """[N] float32, detached: d loss / d entropy_N; 0 where the weight is 0; None without entropies."""
    metrics: PolicyMetrics
    """Sums and counts, to be merged by merge_metrics and read through finish_metrics."""


def merge_metrics(parts: Iterable[PolicyMetrics]) -> PolicyMetrics:
    """Return the metrics of a whole from those of its micro-batches or ranks: sums and extremes.

    Raises ValueError without a part.
    """
    every = [part.values_K for part in parts]
    if len(every) < 2:
        (alone,) = every
        return PolicyMetrics(alone)
    values_PK = torch.stack(every)
    total, most, least = values_PK[:, :-2].sum(0), values_PK[:, -2].amax(0), values_PK[:, -1].amin(0)
    return PolicyMetrics(torch.cat((total, most[None], least[None])))


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
    - ``masked``: share that the trust region holds back; ``entropy``: mean, nats
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
