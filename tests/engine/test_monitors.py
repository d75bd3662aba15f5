"""Signs of a degenerate policy: each on a batch that shows just it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from slipstream import synthetic
from slipstream.config import MonitorConfig, RewardConfig
from slipstream.monitors import Monitor, degeneracy, verifier_gap
from slipstream.rewards import reward
from slipstream.types import Outcome, Score, ScoreKind, TaskAttempt, ToolCall, ToolStatus, Trajectory

OK, ERROR = ToolStatus.OK, ToolStatus.ERROR


def call(name: str, argument: str, status: ToolStatus = OK) -> ToolCall:
    return ToolCall(turn=0, name=name, arguments={"text": argument}, status=status, latency_s=0.0)


def episode(
    *calls: ToolCall, group: int = 0, outcome: Outcome = Outcome.COMPLETED, tokens: int = 16
) -> Trajectory:
    made = synthetic.trajectory(tokens)
    return dataclasses.replace(
        made,
        attempt=TaskAttempt(task=group, seed=1, group=group, attempt=0),
        tool_calls=list(calls),
        outcome=outcome,
        loss_mask=np.ones(tokens, np.uint8),
    )


def found(*episodes: Trajectory) -> dict[str, float]:
    return {name.removeprefix("monitor/"): value for name, value in degeneracy(episodes).items()}


def test_a_call_that_was_answered_and_is_made_again() -> None:
    again, retried = [call("search", "x")] * 3, [call("search", "x", ERROR)] * 4
    assert found(episode(*again), episode(*retried))["repeated_calls"] == 0.5
    assert found(episode(call("search", "x"), call("search", "y"), call("open", "x")))["repeated_calls"] == 0


def test_searching_without_an_end() -> None:
    cut = episode(call("search", "x"), outcome=Outcome.TRUNCATED)
    silent = episode(outcome=Outcome.TRUNCATED)
    late = episode(call("open", "x"), outcome=Outcome.TIMED_OUT)
    done = episode(call("answer", "x"))
    assert found(cut, silent, late, done)["no_end"] == 0.5


def test_messages_that_are_no_calls() -> None:
    broken = episode(call("search", "x"), outcome=Outcome.INVALID_ACTION)
    done, cut = episode(call("answer", "x")), episode(call("search", "x"), outcome=Outcome.TRUNCATED)
    batch = [broken, broken, broken, done, cut]
    watching, other = Monitor(MonitorConfig()), Monitor(MonitorConfig(no_call=0.0))
    assert watching.observe(batch)["monitor/no_call"] == other.observe(batch)["monitor/no_call"] == 0.6
    assert (
        "no_call is 0.60, above monitors.no_call = 0.5: messages are no valid calls; where they were at "
        "first, read kl/reference and masked/trust"
    ) in watching.alarms
    assert not [sentence for sentence in other.alarms if sentence.startswith("no_call")]


def test_one_answer_to_different_tasks() -> None:
    """Attempts at one task may agree; tasks may not."""
    same = [episode(call("answer", "Oslo"), group=group) for group in (0, 0, 1, 2)]
    other = episode(call("answer", "Bern"), group=3)
    assert found(*same, other)["one_answer"] == 0.75
    assert found(*same[:2])["one_answer"] == 0.0
    assert (
        found(*[episode(call("answer", str(group)), group=group) for group in range(4)])["one_answer"] == 0.25
    )


def test_length_is_compared_with_the_first_steps_and_survives_a_checkpoint() -> None:
    monitor = Monitor(MonitorConfig(length_growth=1.5))
    for _ in range(10):
        assert monitor.observe([episode(tokens=10)])["monitor/length_growth"] == 1.0
    assert monitor.observe([episode(tokens=14)])["monitor/length_growth"] == pytest.approx(1.4)
    assert monitor.alarms == []
    resumed = Monitor(MonitorConfig(length_growth=1.5))
    resumed.restore(monitor.state())
    row = resumed.observe([episode(tokens=16), episode(tokens=24)])
    assert (row["monitor/length_growth"], row["monitor/alarms"]) == (2.0, 1.0)
    assert resumed.alarms == [
        "length_growth is 2.00, above monitors.length_growth = 1.5: messages are that many times as long as "
        "at first; read episodes before you trust the reward"
    ]


def test_a_limit_of_nothing_watches_nothing() -> None:
    batch = [episode(*[call("search", "x")] * 3, outcome=Outcome.TRUNCATED)]
    off = Monitor(MonitorConfig(repeated_calls=0, no_end=0, one_answer=0, length_growth=0))
    assert off.observe(batch)["monitor/alarms"] == 0
    on = Monitor(MonitorConfig())
    assert on.observe(batch)["monitor/alarms"] == 2
    assert [sentence.split()[0] for sentence in on.alarms] == ["repeated_calls", "no_end"]


def checked(success: bool | None, verified: float | None, name: str = "verifier") -> Trajectory:
    """An episode with an outcome and what a verifier that is not trained on says; None: not judged."""
    outcome = None if success is None else 2.0 * success - 1.0
    return dataclasses.replace(
        episode(),
        scores=(
            Score(name="right", kind=ScoreKind.OUTCOME, weight=1.0, value=outcome),
            Score(name=name, kind=ScoreKind.METRIC, weight=0.0, value=verified),
        ),
    )


def test_the_gap_between_success_and_a_verifier_that_is_not_trained_on() -> None:
    """Of four episodes with both: success 3/4, verifier (1 + 0 + 0.5 + 0) / 4."""
    both = [checked(True, 1.0), checked(True, 0.0), checked(True, 0.5), checked(False, 0.0)]
    one_sided = [checked(None, 0.0), checked(True, None), checked(True, 0.0, "politeness"), episode()]
    assert verifier_gap(both + one_sided, "verifier") == (0.375, [])
    assert verifier_gap([checked(False, 1.0)], "verifier") == (-1.0, [])
    assert verifier_gap(one_sided, "verifier") == (None, [])
    assert verifier_gap(both + one_sided, "politeness") == (1.0, [])


def test_a_gap_above_its_limit_is_an_alarm_and_changes_no_reward() -> None:
    batch = [checked(True, 1.0), checked(True, 0.0)]
    monitor = Monitor(MonitorConfig())
    row = monitor.observe(batch)
    assert (row["monitor/verifier_gap"], row["monitor/alarms"]) == (0.5, 1.0)
    assert monitor.alarms == [
        "verifier_gap is 0.50, above monitors.verifier_gap = 0.2: outcomes say success by so much more than "
        "the verifier that is not trained on; read episodes before you trust the reward"
    ]
    assert [reward(one.scores, RewardConfig()) for one in batch] == [1.0, 1.0]
    assert Monitor(MonitorConfig(verifier_gap=0.5)).observe(batch)["monitor/alarms"] == 0
    assert Monitor(MonitorConfig(verifier_gap=0.0)).observe(batch)["monitor/alarms"] == 0
    assert "monitor/verifier_gap" not in Monitor(MonitorConfig(verifier="")).observe(batch)
    misspelt = Monitor(MonitorConfig(verifier="verfier"))
    assert misspelt.observe(batch)["monitor/alarms"] == 1.0
    assert misspelt.alarms == ["monitors.verifier: no episode has a metric verfier; nothing is compared"]


def test_success_in_training_is_compared_with_held_out_success() -> None:
    """The last ten batches: eight of 1 and two of 1/2 are 0.9; a checkpoint in between changes nothing."""
    monitor = Monitor(MonitorConfig())
    assert monitor.compare(0.0) == {}
    for _ in range(5):
        monitor.observe([checked(False, None)])
    for _ in range(8):
        monitor.observe([checked(True, None)])
    resumed = Monitor(MonitorConfig())
    resumed.restore(monitor.state())
    for _ in range(2):
        resumed.observe([checked(True, None), checked(False, None)])
    assert resumed.compare(0.75) == {"monitor/heldout_gap": pytest.approx(0.15)}
    assert resumed.alarms == []
    assert resumed.compare(0.5) == {"monitor/heldout_gap": pytest.approx(0.4)}
    assert resumed.alarms == [
        "heldout_gap is 0.40, above monitors.heldout_gap = 0.3: success is so much rarer at held-out tasks "
        "than in training, whose tasks are learnt by heart; pose more different ones"
    ]
    off = Monitor(MonitorConfig(heldout_gap=0.0))
    off.restore(resumed.state())
    assert (off.compare(0.0), off.alarms) == ({"monitor/heldout_gap": pytest.approx(0.9)}, [])
    resumed.restore({})
    assert resumed.observe([episode(tokens=10)])["monitor/length_growth"] == 1.0


def test_a_verifier_that_is_none_is_said_to_be_none() -> None:
    monitor = Monitor(MonitorConfig())
    row = monitor.observe([checked(True, 7.0), checked(False, -1.0), checked(True, 1.0)])
    assert (row["monitor/verifier_gap"], row["monitor/alarms"]) == (0.0, 1.0)
    assert monitor.alarms == [
        "metric verifier gave 7, expected 0 to 1: 2 of 3 episodes are left out of verifier_gap; mend "
        "that metric"
    ]
