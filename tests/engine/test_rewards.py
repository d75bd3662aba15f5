"""Rewards: literal numbers, and the outcome always decides."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.config import RewardConfig
from slipstream.rewards import capped, components, leniently, reward, turn_rewards
from slipstream.types import Score, ScoreKind

CONFIG = RewardConfig(shaping=0.1)


def outcome(value: float | None) -> Score:
    return Score(name="correct", kind=ScoreKind.OUTCOME, weight=1.0, value=value)


def penalty(value: float, weight: float = -0.05) -> Score:
    return Score(name="steps", kind=ScoreKind.PENALTY, weight=weight, value=value)


def shaping(value: float) -> Score:
    return Score(name="progress", kind=ScoreKind.SHAPING, weight=0.1, value=value)


def test_reward_adds_weighted_components() -> None:
    assert reward([outcome(1.0), penalty(4), shaping(0.5)], CONFIG) == pytest.approx(1 - 0.2 + 0.05)
    assert components([outcome(1.0), penalty(4), penalty(2), shaping(0.5)]) == pytest.approx(
        {"correct": 1.0, "steps": -0.3, "progress": 0.05}
    )


def test_penalties_and_shaping_are_capped_together() -> None:
    scores = [outcome(1.0), penalty(10), penalty(8, weight=-0.2), shaping(5.0)]
    assert capped(scores, CONFIG) == -0.8
    assert reward(scores, CONFIG) == pytest.approx(1 - 0.8 + 0.1)


def test_a_penalty_never_pays_and_shaping_never_costs() -> None:
    assert reward([outcome(-1.0), penalty(-3), shaping(-2.0)], CONFIG) == -1.0


def test_an_unjudged_outcome_has_no_reward() -> None:
    assert reward([outcome(None), penalty(4)], CONFIG) is None
    assert reward([penalty(4)], CONFIG) is None
    unjudged = Score(name="progress", kind=ScoreKind.SHAPING, weight=0.1, value=None, invalid="no reference")
    assert reward([outcome(1.0), unjudged], CONFIG) == 1.0
    assert turn_rewards([-0.05, -0.05], [outcome(None)], CONFIG).tolist() == [0.0, 0.0]


def test_turn_rewards_put_the_outcome_last() -> None:
    turns = turn_rewards([-0.05, -0.25, -0.05], [outcome(1.0), penalty(7)], CONFIG)
    assert turns.dtype == np.float32
    np.testing.assert_allclose(turns, [-0.05, -0.25, 0.95], rtol=1e-6)


def test_turn_rewards_share_the_cap() -> None:
    turns = turn_rewards([-0.8, -0.8], [outcome(-1.0), penalty(32)], CONFIG)
    np.testing.assert_allclose(turns, [-0.4, -1.4], rtol=1e-6)


numbers = st.floats(min_value=-50, max_value=50)


@given(st.lists(numbers, min_size=1, max_size=6), numbers, numbers)
def test_every_success_beats_every_failure_and_turns_sum_to_the_reward(
    earned: list[float], cost: float, progress: float
) -> None:
    success = [outcome(1.0), penalty(cost), shaping(progress)]
    failure = [outcome(-1.0), penalty(-cost), shaping(-progress)]
    won, lost = reward(success, CONFIG), reward(failure, CONFIG)
    assert won is not None and lost is not None and won > lost
    assert turn_rewards(earned, success, CONFIG).sum() == pytest.approx(won, abs=1e-5)


def test_enough_progress_is_a_success_where_that_is_lenient() -> None:
    half = [outcome(-1.0), penalty(2.0), shaping(0.5)]
    assert leniently(half, 0.0) is half
    assert leniently(half, 0.6) is half
    assert list(leniently(half, 0.5)) == [outcome(1.0), *half[1:]]
    for scores in ([outcome(-1.0)], [outcome(None), shaping(1.0)], [outcome(-1.0), shaping_without_value()]):
        assert leniently(scores, 0.5) is scores


def shaping_without_value() -> Score:
    return replace(shaping(1.0), value=None, invalid="the judge is away")
