"""An objective that cannot be computed does not exist."""

from __future__ import annotations

import math
from typing import Any

import pytest

from slipstream_kernels import Aggregation, Correction, Level, Objective, ObjectiveError, Penalty, Surrogate


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"clip_low": 0.0}, "clip_low"),
        ({"clip_low": 1.1}, "clip_low"),
        ({"clip_high": math.inf}, "clip_high"),
        ({"importance_cap": 0.5}, "importance_cap"),
        ({"trust_low": 1.5}, "trust_low"),
        ({"trust_high": 0.9}, "trust_high"),
        ({"kl_coefficient": -0.1}, "kl_coefficient"),
        ({"entropy_coefficient": math.nan}, "entropy_coefficient"),
        ({"aggregation": "median"}, "aggregation"),
        ({"aggregation": "fixed"}, "fixed_length"),
        ({"fixed_length": 5}, "fixed_length"),
        ({"surrogate": "ppo"}, "surrogate"),
        ({"ratio_level": "turn"}, "ratio_level"),
        ({"correction": "drop"}, "correction"),
        ({"correction_level": "turn"}, "correction_level"),
        ({"penalty": "k4"}, "penalty"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"dual_clip": 3.0, "surrogate": "cispo"}, "dual_clip"),
        ({"gate_positive": 0.0}, "gate_positive"),
        ({"gate_negative": math.inf}, "gate_negative"),
        ({"importance_floor": 1.5}, "importance_floor"),
        ({"importance_floor": 0.5}, "importance_floor"),
        ({"correction": "none", "importance_cap": 2.0}, "importance_cap"),
        ({"correction": "none", "correction_level": "sequence"}, "correction_level"),
    ],
)
def test_refuses_each_member_out_of_range(members: dict[str, Any], named: str) -> None:
    with pytest.raises(ObjectiveError, match=f"Objective.{named} must be"):
        Objective(**members)


def test_aggregation_may_be_a_string() -> None:
    objective = Objective(aggregation="fixed", fixed_length=5)  # type: ignore[arg-type]
    assert objective.aggregation is Aggregation.FIXED


def test_a_message_names_member_choices_and_value() -> None:
    with pytest.raises(ObjectiveError, match=r"penalty must be one of k1_in_reward, k2, k3, .* got 'k4'"):
        Objective(penalty="k4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, False),
        ({"aggregation": "sequence_mean_token_mean"}, False),
        ({"ratio_level": "geometric"}, True),
        ({"correction_level": "sequence"}, True),
        ({"ratio_level": "sequence", "correction_level": "sequence"}, True),
    ],
)
def test_sequence_level(members: dict[str, Any], expected: bool) -> None:
    assert Objective(**members).sequence_level is expected


@pytest.mark.parametrize(
    ("objective", "members"),
    [
        (Objective.ppo(), {}),
        (Objective.dual_clip_ppo(), {"dual_clip": 3.0}),
        (Objective.decoupled_ppo(), {"importance_cap": 2.0}),
        (
            Objective.grpo(),
            {"penalty": Penalty.K3, "kl_coefficient": 0.04, "aggregation": "sequence_mean_token_mean"},
        ),
        (Objective.dr_grpo(fixed_length=9), {"aggregation": "fixed", "fixed_length": 9}),
        (Objective.dapo(), {"clip_high": 0.28}),
        (
            Objective.gspo(),
            {
                "ratio_level": Level.GEOMETRIC,
                "clip_low": 3e-4,
                "clip_high": 4e-4,
                "aggregation": "sequence_mean_token_mean",
            },
        ),
        (Objective.cispo(), {"surrogate": Surrogate.CISPO, "clip_low": 1.0, "clip_high": 4.0}),
        (
            Objective.topr(),
            {
                "surrogate": Surrogate.TOPR,
                "ratio_level": Level.SEQUENCE,
                "aggregation": "sequence_mean_token_sum",
            },
        ),
        (Objective.sapo(), {"surrogate": Surrogate.SAPO, "aggregation": "sequence_mean_token_mean"}),
        (
            Objective.icepop(),
            {"correction": Correction.MASK, "importance_floor": 0.5, "importance_cap": 5.0},
        ),
    ],
)
def test_named_objectives(objective: Objective, members: dict[str, Any]) -> None:
    assert objective == Objective(**members)


def test_its_text_gives_the_same_objective() -> None:
    objective = Objective(clip_high=0.28, trust_low=0.1, aggregation=Aggregation.FIXED, fixed_length=7)
    assert Objective.of(objective.text) == objective
    assert Objective.of(objective.text).importance_cap == float("inf")
