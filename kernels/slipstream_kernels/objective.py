"""Floor 0. What is optimised: plain data, validated, without torch.

Dimensions: N packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from slipstream_kernels.errors import ObjectiveError

if TYPE_CHECKING:
    from torch import Tensor


class Aggregation(StrEnum):
    """How token losses L with weights w become one number.

    With S segments, of which S_live hold a token of positive weight:

    - ``token_mean``: sum(w L) / sum(w)   (DAPO)
    - ``sequence_mean_token_mean``: the mean over live segments of their token mean   (GRPO)
    - ``sequence_mean_token_sum``: sum(w L) / S_live   (REINFORCE, RLOO)
    - ``fixed``: sum(w L) / (S * fixed_length)   (Dr. GRPO)
    """

    TOKEN_MEAN = "token_mean"
    SEQUENCE_MEAN_TOKEN_MEAN = "sequence_mean_token_mean"
    SEQUENCE_MEAN_TOKEN_SUM = "sequence_mean_token_sum"
    FIXED = "fixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Decoupled PPO (Hilton et al. 2021, arXiv:2110.00641) with a trust region against the behavior policy.

    Example: ``Objective(clip_low=0.2, clip_high=0.28, importance_cap=2.0, trust_low=0.5,
    trust_high=2.0)``. The default has no importance cap, no trust region, no KL and no entropy
    term: plain decoupled PPO. Raises ObjectiveError when a member is out of its range.
    """

    clip_low: float = 0.2
    """The current / proximal ratio is clipped below 1 - clip_low; in (0, 1]."""
    clip_high: float = 0.2
    """The current / proximal ratio is clipped above 1 + clip_high; > 0."""
    importance_cap: float = math.inf
    """Truncates the proximal / behavior ratio from above; >= 1."""
    trust_low: float = 0.0
    """Least trusted current / behavior ratio; in [0, 1]."""
    trust_high: float = math.inf
    """Greatest trusted current / behavior ratio; >= 1.

    Tokens outside lose their gradient, not their place in the mean.
    """
    kl_coefficient: float = 0.0
    """Weight of the k2 penalty, half the squared log-ratio to the reference policy; >= 0."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus; >= 0."""
    aggregation: Aggregation = Aggregation.TOKEN_MEAN
    """One of Aggregation, or its value as a string."""
    fixed_length: int = 0
    """Tokens each segment counts for under ``fixed``; otherwise 0."""

    def __post_init__(self) -> None:
        """Check every member; a half-made objective does not exist."""
        _require("clip_low", self.clip_low, 0.0 < self.clip_low <= 1.0, "in (0, 1]")
        _require("clip_high", self.clip_high, 0.0 < self.clip_high < math.inf, "positive and finite")
        _require("importance_cap", self.importance_cap, self.importance_cap >= 1.0, "at least 1")
        _require("trust_low", self.trust_low, 0.0 <= self.trust_low <= 1.0, "in [0, 1]")
        _require("trust_high", self.trust_high, self.trust_high >= 1.0, "at least 1")
        for name in ("kl_coefficient", "entropy_coefficient"):
            value = getattr(self, name)
            _require(name, value, 0.0 <= value < math.inf, "zero or positive, and finite")
        if self.aggregation not in list(Aggregation):
            choices = ", ".join(Aggregation)
            raise ObjectiveError(f"Objective.aggregation must be one of {choices}, got {self.aggregation!r}")
        object.__setattr__(self, "aggregation", Aggregation(self.aggregation))
        fixed = self.aggregation is Aggregation.FIXED
        expected = "positive when aggregation is fixed" if fixed else "0 unless aggregation is fixed"
        _require("fixed_length", self.fixed_length, (self.fixed_length > 0) is fixed, expected)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyLoss:
    """What a policy loss returns."""

    loss: Tensor
    """[] float32; backpropagates into logprob_N and entropy_N."""
    grad_logprob_N: Tensor
    """[N] float32, detached: d loss / d logprob_N; 0 where the weight is 0."""
    metrics: Mapping[str, Tensor]
    """[] float32 each: sums and counts, to be merged by merge_metrics and read through finish_metrics."""


def _require(name: str, value: float, valid: bool, expected: str) -> None:
    if not valid:
        raise ObjectiveError(f"Objective.{name} must be {expected}, got {value}")
