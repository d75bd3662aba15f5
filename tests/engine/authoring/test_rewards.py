"""Rewards, metrics and monitors: what a function returns or raises, and what becomes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from authored_worlds import Judging, answered, opened, right, scores, world

from slipstream.authoring.episode import Episode
from slipstream.authoring.rewards import Invalid, PolicyFault, metric, monitor, reward
from slipstream.config import RewardConfig
from slipstream.errors import ConfigurationError, InfrastructureError
from slipstream.rewards import reward as total
from slipstream.rewards import shown
from slipstream.types import Score, ScoreKind


def refusal(*judges: Any, **weights: float) -> str:
    with pytest.raises(ConfigurationError) as caught:
        answered(world(rewards=judges), **weights)
    return str(caught.value)


def worth(found: dict[str, Score], **weights: float) -> float | None:
    return total(list(found.values()), RewardConfig(**weights))


def raising(error: Exception) -> Judging:
    def judged(episode: Episode) -> bool:
        raise error

    return judged


def test_an_outcome_is_worth_one_and_a_turn_costs_what_the_configuration_says() -> None:
    assert worth(answered(world())) == pytest.approx(0.95)
    assert worth(answered(world(), "elsewhere")) == pytest.approx(-1.05)


def test_kinds_and_gates_add_up() -> None:
    @reward(0.2, kind="shaping", gate=right)
    async def short(episode: Episode) -> float:
        return 0.5

    @reward(0.1, kind="penalty", gate=lambda episode: episode.turns == 1)
    def shouted(episode: Episode) -> int:
        return 3

    authored = world(rewards=[short, right, shouted])
    good, bad = answered(authored, shaping=0.2), answered(authored, "elsewhere", shaping=0.2)
    assert (good["short"].value, bad["short"].value) == (0.5, 0.0)
    assert (good["shouted"].weight, good["shouted"].value) == (-0.1, 3.0)
    assert worth(good, shaping=0.2) == pytest.approx(1.0 + 0.1 - 0.3 - 0.05)
    assert worth(bad, shaping=0.2) == pytest.approx(-1.0 - 0.3 - 0.05)


@pytest.mark.parametrize(
    ("function", "value", "invalid"),
    [
        (lambda episode: True, 1.0, ""),
        (lambda episode: np.bool_(False), -1.0, ""),
        (lambda episode: 0, -1.0, ""),
        (lambda episode: Invalid("no reference"), None, "no reference"),
        (raising(Invalid("no reference")), None, "no reference"),
        (raising(PolicyFault("not a number")), -1.0, ""),
        (raising(KeyError("gold")), None, "KeyError: 'gold'"),
        (
            lambda episode: 0.7,
            None,
            'expected True or False of an outcome (partial credit is kind="shaping"), got 0.7',
        ),
        (lambda episode: "yes", None, "expected a number, got 'yes'"),
        (lambda episode: float("nan"), None, "expected a number, got nan"),
    ],
)
def test_what_an_outcome_may_return_or_raise(function: Judging, value: float | None, invalid: str) -> None:
    function.__name__ = "solved"
    found = answered(world(rewards=[reward(1.0)(function)]))
    assert (found["solved"].value, found["solved"].invalid) == (value, invalid)
    assert (worth(found) is None) == (value is None)


@pytest.mark.parametrize(("kind", "value"), [("shaping", 1.5), ("penalty", -0.1)])
def test_values_outside_their_range_count_nothing_and_are_said(kind: Any, value: float) -> None:
    found = answered(world(rewards=[right, reward(0.1, kind=kind)(lambda episode: value)]), shaping=0.1)
    (other,) = [score for name, score in found.items() if name == "<lambda>"]
    assert other.value is None and f"got {value}" in other.invalid
    assert worth(found, shaping=0.1) == pytest.approx(0.95)


def test_an_invalid_gate_makes_its_component_invalid() -> None:
    unknown = reward(0.5)(raising(Invalid("no reference")))
    extra = reward(0.5, gate=unknown)(lambda episode: True)
    with pytest.raises(ConfigurationError, match="could outweigh"):
        answered(world(rewards=[unknown, extra]), penalty_cap=0.95)
    found = answered(world(rewards=[unknown, extra]), penalty_cap=0.5)
    assert found["<lambda>"].invalid == "gate: no reference"


def test_infrastructure_fails_through() -> None:
    with pytest.raises(InfrastructureError):
        answered(world(rewards=[reward(1.0)(raising(InfrastructureError("judge is down")))]))
    with pytest.raises(ConnectionError):
        answered(world(rewards=[right, metric(raising(ConnectionError("judge is down")))]))


def half(episode: Episode) -> float:
    return 0.5


def test_weights_that_outcomes_do_not_dominate_are_refused_when_the_configuration_loads() -> None:
    assert refusal(reward(0.7)(half)) == (
        "rewards: the weights of outcomes must add up to 1, so that a success is worth +1 and a failure -1, "
        "got 0.7 of 1"
    )
    assert "got 0 of 0" in refusal(reward(0.5, kind="penalty")(half))
    assert refusal(right, reward(0.3, kind="shaping")(half)) == (
        "rewards: the weights of kind shaping must add up to at most rewards.shaping = 0, got 0.3; lower "
        "them, or set rewards.shaping=0.3"
    )
    assert "rewards.penalty_cap = 0.8, got 0.9" in refusal(right, reward(0.9, kind="penalty")(half))
    assert refusal(reward(0.5)(half), reward(0.5)(raising(KeyError())), penalty_cap=0.95) == (
        "rewards: an outcome of weight 0.5 turns the reward by 1, which rewards.penalty_cap + "
        "rewards.shaping = 0.95 could outweigh; let them be at most 0.9, or join outcomes into one"
    )
    assert "expected what @reward, @metric or @monitor made, got <function half" in refusal(right, half)
    assert refusal(right, right) == "rewards: the name right is taken; rename that function"
    assert "gated by half, which is not among the rewards" in refusal(
        right, reward(0.1, kind="penalty", gate=reward(1.0)(half))(raising(KeyError()))
    )
    with pytest.raises(ConfigurationError, match="weight must be a positive number, also of a penalty"):
        reward(-0.2, kind="penalty")
    with pytest.raises(ConfigurationError, match="kind must be one of outcome, shaping, penalty"):
        reward(1.0, kind="bonus")  # type: ignore[arg-type]


def test_a_metric_is_shown_and_changes_nothing() -> None:
    @metric
    def turns(episode: Episode) -> int:
        return episode.turns

    found = answered(world(rewards=[right, turns]))
    assert worth(found) == worth(answered(world()))
    other = {**found, "turns": Score(name="turns", kind=ScoreKind.METRIC, weight=0.0, value=4.0)}
    assert shown([list(found.values()), list(other.values())]) == {"metric/turns": 2.5}


def watch(action: Any, said: Any = "tests were edited") -> Any:
    def cheats(episode: Episode) -> Any:
        """Edits the tests.

        Which it must not.
        """
        return said

    return monitor(action)(cheats)


def test_a_monitor_that_logs_is_counted_and_changes_nothing() -> None:
    found = answered(world(rewards=[right, watch("log")]))
    assert (found["fired/cheats"].value, found["fired/cheats"].invalid) == (1.0, "tests were edited")
    assert worth(found) == worth(answered(world()))
    quiet = answered(world(rewards=[right, watch("log", False)]))
    assert shown([list(found.values()), list(quiet.values())]) == {"fired/cheats": 0.5}


def test_a_monitor_that_screens_takes_the_episode_out_of_training() -> None:
    found = answered(world(rewards=[right, watch("screen", True)]))
    assert worth(found) is None
    assert found["right"].invalid == "screened by cheats: Edits the tests."
    assert shown([list(found.values())]) == {"fired/cheats": 1.0, "invalid/right": 1.0, "screened": 1.0}


def test_a_monitor_that_zeroes_makes_a_failure_of_a_success() -> None:
    bonus = reward(0.2, kind="shaping")(half)
    found = answered(world(rewards=[right, bonus, watch("zero")]), shaping=0.2)
    assert (found["right"].value, found["half"].value) == (-1.0, 0.0)
    assert worth(found, shaping=0.2) == pytest.approx(-1.05)


def test_a_monitor_that_fails_does_not_fire(caplog: pytest.LogCaptureFixture) -> None:
    found = answered(world(rewards=[right, monitor("zero")(raising(KeyError("x")))]))
    assert (found["fired/judged"].value, found["right"].value) == (0.0, 1.0)
    assert "judged: failed with KeyError" in caplog.text


def test_each_function_is_called_once_and_reads_the_whole_task() -> None:
    called = []

    @reward(1.0)
    def solved(episode: Episode) -> bool:
        called.append(episode.task.data["answer"])
        return True

    judges = [reward(0.1, kind="penalty", gate=solved)(half), solved]
    scores(opened(world(rewards=judges)))
    assert called == ["City 0"]
