"""Signs of a degenerate policy: each on a batch that shows just it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from slipstream import synthetic
from slipstream.config import MonitorConfig
from slipstream.monitors import Monitor, degeneracy
from slipstream.types import Outcome, TaskAttempt, ToolCall, ToolStatus, Trajectory

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
