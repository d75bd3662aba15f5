"""Advantages: literal numbers; what cannot be judged leaves the baseline."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest

from slipstream import synthetic
from slipstream.config import CurriculumConfig, ObjectiveConfig, RewardConfig
from slipstream.config_curriculum import DynamicConfig
from slipstream.objective import Advantages, advantages, group_weights, kernel_objective
from slipstream.types import Score, ScoreKind, TaskAttempt, Trajectory
from slipstream_kernels import Aggregation


def made(group: int, value: float | None) -> Trajectory:
    return dataclasses.replace(
        synthetic.trajectory(4),
        attempt=TaskAttempt(task=group, seed=1, group=group, attempt=0),
        scores=(Score(name="outcome", kind=ScoreKind.OUTCOME, weight=1.0, value=value),),
    )


def worth(values: Sequence[tuple[int, float | None]], kind: str = "mean", floor: float = 0.3) -> Advantages:
    objective = ObjectiveConfig.model_validate({"advantage": kind, "std_floor": floor})
    return advantages([made(group, value) for group, value in values], objective, RewardConfig())


def test_mean_baseline_by_group() -> None:
    found = worth([(7, 1.0), (2, -1.0), (7, -1.0), (7, -1.0), (2, 1.0), (7, -1.0)])
    assert found.rewards.tolist() == [1, -1, -1, -1, 1, -1]
    assert found.advantages.tolist() == [1.5, -1.0, -0.5, -0.5, 1.0, -0.5]
    assert found.zero_variance_share == 0.0


def test_leave_one_out_baseline() -> None:
    found = worth([(0, 1.0), (0, -1.0), (0, -1.0)], "rloo")
    assert found.advantages.tolist() == pytest.approx([2.0, -1.0, -1.0])


def test_standard_deviation_with_a_floor() -> None:
    found = worth([(0, 1.0), (0, -1.0)], "std")
    assert found.advantages.tolist() == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)])
    found = worth([(0, 1.0), (0, 0.9)], "std")
    assert found.advantages.tolist() == pytest.approx([0.05 / 0.3, -0.05 / 0.3])


@pytest.mark.parametrize("lost", [None, math.nan, math.inf])
def test_what_cannot_be_judged_leaves_the_baseline(lost: float | None) -> None:
    found = worth([(0, 1.0), (0, lost), (0, -1.0), (1, lost)])
    assert [math.isnan(value) for value in found.rewards] == [False, True, False, True]
    assert found.advantages.tolist() == [1.0, 0.0, -1.0, 0.0]
    assert found.zero_variance_share == 0.0


def test_share_of_groups_without_variance() -> None:
    found = worth([(0, 1.0), (0, 1.0), (1, 1.0), (1, -1.0), (2, -1.0), (2, None)])
    assert found.zero_variance_share == pytest.approx(2 / 3)
    assert found.advantages.tolist() == [0, 0, 1, -1, 0, 0]
    assert worth([(0, None), (0, None)]).zero_variance_share == 1.0


def test_equal_rewards_give_exactly_no_advantage() -> None:
    assert worth([(0, 0.1)] * 7).advantages.tolist() == [0.0] * 7


def test_penalties_count() -> None:
    penalty = Score(name="step", kind=ScoreKind.PENALTY, weight=-0.05, value=4.0)
    right = made(0, 1.0)
    slow = dataclasses.replace(right, scores=(*right.scores, penalty))
    found = advantages([right, slow], ObjectiveConfig(), RewardConfig())
    assert found.advantages.tolist() == pytest.approx([0.1, -0.1])


def test_kernel_objective_carries_every_key() -> None:
    objective = kernel_objective(
        ObjectiveConfig(
            clip_low=0.1,
            clip_high=0.3,
            importance_cap=3.0,
            trust_low=0.25,
            trust_high=4.0,
            kl_coefficient=0.02,
            entropy_coefficient=0.003,
        )
    )
    assert (objective.clip_low, objective.clip_high, objective.importance_cap) == (0.1, 0.3, 3.0)
    assert (objective.trust_low, objective.trust_high) == (0.25, 4.0)
    assert (objective.kl_coefficient, objective.entropy_coefficient) == (0.02, 0.003)
    assert objective.aggregation is Aggregation.TOKEN_MEAN


@pytest.mark.parametrize(
    ("alike", "expected"),
    [("reward", [1, 1, 0.25, 0.25, 1, 1, 0.25]), ("success", [0.25] * 4 + [1, 1, 0.25])],
)
def test_groups_that_tell_nothing_weigh_less(alike: str, expected: list[float]) -> None:
    # Rewards 0.9 and 0.8; equal; a success and a failure; one alone that could be judged.
    batch = [
        made(0, 1.0),
        made(0, 1.0),
        made(1, 1.0),
        made(1, 1.0),
        made(2, 1.0),
        made(2, -1.0),
        made(3, 1.0),
    ]
    rewards = np.array([0.9, 0.8, 1.0, 1.0, 1.0, -1.0, 1.0], np.float32)
    dynamic = DynamicConfig.model_validate({"alike": alike, "weight": 0.25})
    on = CurriculumConfig(enabled=True, dynamic=dynamic)
    assert group_weights(batch, rewards, on).tolist() == expected
    assert group_weights(batch, rewards, CurriculumConfig(dynamic=dynamic)).tolist() == [1.0] * 7
    unjudged = np.where(np.arange(7) == 5, np.nan, rewards).astype(np.float32)
    assert group_weights(batch, unjudged, on).tolist()[4:6] == [0.25, 0.25]
