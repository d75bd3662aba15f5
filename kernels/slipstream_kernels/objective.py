"""Floor 0. What is optimised: plain data, validated, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType

from slipstream_kernels.errors import ObjectiveError


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


class Surrogate(StrEnum):
    """A token's loss by its ratio r = current / proximal and its advantage A; sg = stop-gradient.

    - ``clip``: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), at most -dual_clip A where A < 0
      (PPO, Schulman et al. 2017, arXiv:1707.06347, eq. 7; dual clip: Ye et al. 2019, arXiv:1912.09729)
    - ``cispo``: -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logprob: no token loses its gradient
      (MiniMax-M1 2025, arXiv:2506.13585, eq. 4)
    - ``topr``: -A logprob where A >= 0, else -sg(min(r, 1)) A logprob
      (tapered off-policy REINFORCE, Le Roux et al. 2025, arXiv:2503.14286)
    - ``sapo``: -A (4 / T) sigmoid(T (r - 1)), T = gate_positive where A > 0, else gate_negative
      (soft adaptive policy optimisation, Gao et al. 2025, arXiv:2511.20347)
    """

    CLIP = "clip"
    CISPO = "cispo"
    TOPR = "topr"
    SAPO = "sapo"


class Level(StrEnum):
    """Over what a ratio is taken; log-ratios d are those of the segment's tokens of positive weight.

    - ``token``: exp(d) of each token
    - ``sequence``: exp(sum d), the same for all tokens of a segment
    - ``geometric``: exp(mean d), the same for all tokens of a segment (GSPO, arXiv:2507.18071, eq. 7)
    """

    TOKEN = "token"
    SEQUENCE = "sequence"
    GEOMETRIC = "geometric"


class Correction(StrEnum):
    """What becomes of the proximal / behavior ratio rho before it multiplies the surrogate.

    - ``none``: 1 takes its place
    - ``truncate``: min(rho, importance_cap)   (truncated importance sampling, TIS)
    - ``mask``: rho inside [importance_floor, importance_cap], else 0   (IcePop, arXiv:2510.18855)
    """

    NONE = "none"
    TRUNCATE = "truncate"
    MASK = "mask"


class Penalty(StrEnum):
    """How the KL divergence to the reference policy enters; d = logprob - reference, sg = stop-gradient.

    - ``k1_in_reward``: sg(d) kl_coefficient is taken off the advantage; in expectation the gradient of ``k2``
    - ``k2``: d^2 / 2, gradient d: in expectation that of KL(current || reference)
    - ``k3``: exp(-d) - 1 + d, gradient 1 - exp(-d): in expectation that of KL(reference || current)
    - ``k3_with_k2_gradient``: the value of ``k3`` with the gradient d of ``k2``

    Source: Schulman 2020, "Approximating KL Divergence".
    """

    K1_IN_REWARD = "k1_in_reward"
    K2 = "k2"
    K3 = "k3"
    K3_WITH_K2_GRADIENT = "k3_with_k2_gradient"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A policy-gradient objective with a trust region against the behavior policy.

    Example: ``Objective(clip_low=0.2, clip_high=0.28, importance_cap=2.0, trust_low=0.5,
    trust_high=2.0)``. The default has no importance cap, no trust region, no KL and no entropy
    term: plain decoupled PPO (Hilton et al. 2021, arXiv:2110.00641). Named objectives are class
    methods; ``dataclasses.replace`` changes single members. Raises ObjectiveError when a member is
    out of its range, or set where it would have no effect.
    """

    surrogate: Surrogate = Surrogate.CLIP
    """One of Surrogate, or its value as a string."""
    ratio_level: Level = Level.TOKEN
    """Level of the current / proximal ratio r.

    Above tokens, r is sg(ratio of the sequence) exp(logprob - sg logprob): a token's gradient is the
    sequence's ratio times its own share of the loss (GSPO-token, arXiv:2507.18071, eq. 13). Where
    advantage and share are the same for all tokens of a sequence, that is GSPO's own gradient.
    """
    clip_low: float = 0.2
    """The current / proximal ratio is clipped below 1 - clip_low; in (0, 1]; read by clip and cispo."""
    clip_high: float = 0.2
    """The current / proximal ratio is clipped above 1 + clip_high; > 0; read by clip and cispo."""
    dual_clip: float = math.inf
    """Greatest current / proximal ratio where the advantage is negative; > 1; only with clip."""
    gate_positive: float = 1.0
    """Temperature of SAPO's gate where the advantage is positive; > 0."""
    gate_negative: float = 1.05
    """Temperature of SAPO's gate elsewhere; > 0."""
    correction: Correction = Correction.TRUNCATE
    """One of Correction, or its value as a string."""
    correction_level: Level = Level.TOKEN
    """Level of the proximal / behavior ratio."""
    importance_floor: float = 0.0
    """Least proximal / behavior ratio that ``mask`` keeps; in [0, 1]."""
    importance_cap: float = math.inf
    """Truncates the proximal / behavior ratio from above, or is the greatest that ``mask`` keeps; >= 1."""
    trust_low: float = 0.0
    """A current / behavior ratio below this is not lowered further; in [0, 1]."""
    trust_high: float = math.inf
    """A current / behavior ratio above this is not raised further; >= 1.

    Where the advantage would carry a token's ratio further out, its surrogate is left out, not its place in
    the mean. What leads back stays: a token that has become likelier since it was sampled, and turned out
    badly, must lose that again, and the penalty pulls it to the reference wherever it is. Masking both sides
    lets what grows faster than the data's delay grow unopposed. The side is chosen as PPO's bound chooses it
    (Schulman et al. 2017, arXiv:1707.06347, eq. 7), here against the behavior policy.
    """
    penalty: Penalty = Penalty.K2
    """One of Penalty, or its value as a string."""
    kl_coefficient: float = 0.0
    """Weight of the penalty towards the reference policy; >= 0; 0: none."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus; >= 0."""
    aggregation: Aggregation = Aggregation.TOKEN_MEAN
    """One of Aggregation, or its value as a string."""
    fixed_length: int = 0
    """Tokens each segment counts for under ``fixed``; otherwise 0."""

    text: str = field(init=False, repr=False, compare=False)
    """Its members as JSON: the form in which a registered op takes an objective."""

    @property
    def sequence_level(self) -> bool:
        """Whether a token's terms depend on other tokens of its segment; its share aside."""
        return not self.ratio_level is self.correction_level is Level.TOKEN

    def __post_init__(self) -> None:
        """Check every member; a half-made objective does not exist."""
        self._check_choices()
        _require("clip_low", self.clip_low, 0.0 < self.clip_low <= 1.0, "in (0, 1]")
        for name in ("clip_high", "gate_positive", "gate_negative"):
            value = getattr(self, name)
            _require(name, value, 0.0 < value < math.inf, "positive and finite")
        _require("dual_clip", self.dual_clip, self.dual_clip > 1.0, "above 1")
        _require("importance_floor", self.importance_floor, 0.0 <= self.importance_floor <= 1.0, "in [0, 1]")
        _require("importance_cap", self.importance_cap, self.importance_cap >= 1.0, "at least 1")
        _require("trust_low", self.trust_low, 0.0 <= self.trust_low <= 1.0, "in [0, 1]")
        _require("trust_high", self.trust_high, self.trust_high >= 1.0, "at least 1")
        for name in ("kl_coefficient", "entropy_coefficient"):
            value = getattr(self, name)
            _require(name, value, 0.0 <= value < math.inf, "zero or positive, and finite")
        self._check_pairs()
        members = {member.name: getattr(self, member.name) for member in fields(self) if member.init}
        object.__setattr__(self, "text", json.dumps(members))

    @staticmethod
    def of(text: str) -> Objective:
        """Return the objective whose `text` this is; raises ObjectiveError."""
        return Objective(**json.loads(text))

    def _check_choices(self) -> None:
        for name, kind in _CHOICES.items():
            value = getattr(self, name)
            if value not in list(kind):
                raise ObjectiveError(f"Objective.{name} must be one of {', '.join(kind)}, got {value!r}")
            object.__setattr__(self, name, kind(value))

    def _check_pairs(self) -> None:
        fixed = self.aggregation is Aggregation.FIXED
        expected = "positive when aggregation is fixed" if fixed else "0 unless aggregation is fixed"
        _require("fixed_length", self.fixed_length, (self.fixed_length > 0) is fixed, expected)
        clips = self.surrogate is Surrogate.CLIP or self.dual_clip == math.inf
        _require("dual_clip", self.dual_clip, clips, "infinite unless surrogate is clip")
        masks = self.correction is Correction.MASK or self.importance_floor == 0.0
        _require("importance_floor", self.importance_floor, masks, "0 unless correction is mask")
        if self.correction is Correction.NONE:
            cap, level = self.importance_cap, self.correction_level
            _require("importance_cap", cap, cap == math.inf, "infinite when correction is none")
            _require("correction_level", level, level is Level.TOKEN, "token when correction is none")

    @classmethod
    def ppo(cls, *, clip: float = 0.2) -> Objective:
        """Return PPO, meant for proximal_N = behavior_N (Schulman et al. 2017, arXiv:1707.06347)."""
        return cls(clip_low=clip, clip_high=clip)

    @classmethod
    def dual_clip_ppo(cls, *, clip: float = 0.2, dual_clip: float = 3.0) -> Objective:
        """Return PPO whose ratio is bounded on both sides (Ye et al. 2019, arXiv:1912.09729)."""
        return cls(clip_low=clip, clip_high=clip, dual_clip=dual_clip)

    @classmethod
    def decoupled_ppo(cls, *, clip: float = 0.2, importance_cap: float = 2.0) -> Objective:
        """Return decoupled PPO, its behavior ratio truncated (Hilton et al. 2021, arXiv:2110.00641)."""
        return cls(clip_low=clip, clip_high=clip, importance_cap=importance_cap)

    @classmethod
    def grpo(cls, *, clip: float = 0.2, kl_coefficient: float = 0.04) -> Objective:
        """Return GRPO: means of sequences, k3 in the loss (Shao et al. 2024, arXiv:2402.03300)."""
        return cls(
            clip_low=clip,
            clip_high=clip,
            penalty=Penalty.K3,
            kl_coefficient=kl_coefficient,
            aggregation=Aggregation.SEQUENCE_MEAN_TOKEN_MEAN,
        )

    @classmethod
    def dr_grpo(cls, *, fixed_length: int, clip: float = 0.2) -> Objective:
        """Return Dr. GRPO: no length in any denominator (Liu et al. 2025, arXiv:2503.20783)."""
        return cls(clip_low=clip, clip_high=clip, aggregation=Aggregation.FIXED, fixed_length=fixed_length)

    @classmethod
    def dapo(cls, *, clip_low: float = 0.2, clip_high: float = 0.28) -> Objective:
        """Return DAPO: a higher upper clip, mean over tokens (Yu et al. 2025, arXiv:2503.14476)."""
        return cls(clip_low=clip_low, clip_high=clip_high)

    @classmethod
    def gspo(cls, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
        """Return GSPO: a sequence's geometric mean ratio is clipped (Zheng et al. 2025, arXiv:2507.18071)."""
        return cls(
            ratio_level=Level.GEOMETRIC,
            clip_low=clip_low,
            clip_high=clip_high,
            aggregation=Aggregation.SEQUENCE_MEAN_TOKEN_MEAN,
        )

    @classmethod
    def cispo(cls, *, clip_low: float = 1.0, clip_high: float = 4.0) -> Objective:
        """Return CISPO; its greatest ratio is 1 + clip_high (MiniMax-M1 2025, arXiv:2506.13585)."""
        return cls(surrogate=Surrogate.CISPO, clip_low=clip_low, clip_high=clip_high)

    @classmethod
    def topr(cls, *, ratio_level: Level = Level.SEQUENCE) -> Objective:
        """Return TOPR; the paper's ratio is a sequence's (Le Roux et al. 2025, arXiv:2503.14286)."""
        total = Aggregation.SEQUENCE_MEAN_TOKEN_SUM
        return cls(surrogate=Surrogate.TOPR, ratio_level=ratio_level, aggregation=total)

    @classmethod
    def sapo(cls, *, gate_positive: float = 1.0, gate_negative: float = 1.05) -> Objective:
        """Return SAPO: a sigmoid in place of the clip (Gao et al. 2025, arXiv:2511.20347)."""
        return cls(
            surrogate=Surrogate.SAPO,
            gate_positive=gate_positive,
            gate_negative=gate_negative,
            aggregation=Aggregation.SEQUENCE_MEAN_TOKEN_MEAN,
        )

    @classmethod
    def icepop(cls, *, floor: float = 0.5, cap: float = 5.0) -> Objective:
        """Return PPO without the tokens of a large mismatch (Ling Team 2025, arXiv:2510.18855)."""
        return cls(correction=Correction.MASK, importance_floor=floor, importance_cap=cap)


_CHOICES: Mapping[str, type[StrEnum]] = MappingProxyType(
    {
        "surrogate": Surrogate,
        "ratio_level": Level,
        "correction": Correction,
        "correction_level": Level,
        "penalty": Penalty,
        "aggregation": Aggregation,
    }
)


def _require(name: str, value: float | str, valid: bool, expected: str) -> None:
    if not valid:
        raise ObjectiveError(f"Objective.{name} must be {expected}, got {value}")
