"""What environments of tools share: literal failures, literal scores."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from worlds import attempt, step

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments.tool_episode import ANSWER, FAULTS, Faults, Result, ToolEpisode, failed, tool
from slipstream.interfaces import Resumable
from slipstream.tools.hermes import format_call
from slipstream.types import ScoreKind, Split, Task, ToolStatus

TASK = Task(split=Split.TRAIN, index=3, question="?", data={"answer": "42"})


class Echo(ToolEpisode):
    """Says what it is told."""

    tools = (tool("echo", "Say it again", "text"), ANSWER)
    verdict: bool | str = True

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        return Result(text=arguments["text"])

    def right(self) -> bool | str:
        return self.verdict and self._answer == "42" if self.verdict is True else self.verdict


def test_failures_are_drawn_as_they_always_were() -> None:
    """Literal: another sequence would make old runs and figures incomparable."""
    faults = Faults(Split.TRAIN, attempt(3), 0.5)
    struck = [faults.strike() for _ in range(12)]
    assert "".join("-" if fault is None else str(FAULTS.index(fault)) for fault in struck) == GOLDEN


GOLDEN = "02211-101022"


@pytest.mark.parametrize(("rate", "struck"), [(0.0, 0), (1.0, 50)])
def test_failures_have_their_rate(rate: float, struck: int) -> None:
    faults = Faults(Split.TRAIN, attempt(), rate)
    assert sum(faults.strike() is not None for _ in range(50)) == struck


def test_failures_go_on_from_a_state_that_crossed_a_wire() -> None:
    faults, others = Faults(Split.TRAIN, attempt(), 0.5), Faults(Split.TRAIN, attempt(9), 0.5)
    faults.strike()
    version, words, gauss = faults.state()
    others.restore([version, list(words), gauss])
    assert [faults.strike() for _ in range(20)] == [others.strike() for _ in range(20)]


def outcome(verdict: bool | str, *texts: str) -> dict[str, tuple[ScoreKind, float, float | None, str]]:
    async def episode() -> Any:
        environment = Echo(EnvironmentConfig(tool_failure_rate=0.0), RewardConfig())
        environment.verdict = verdict
        assert isinstance(environment, Resumable)
        await environment.reset(TASK, attempt(3))
        moves = [await step(environment, text) for text in texts]
        assert moves[0].observation == "hello" and moves[0].call.status is ToolStatus.OK
        assert [move.reward for move in moves] == [-0.05, -0.25, -0.05]
        assert [move.done for move in moves] == [False, False, True]
        return await environment.score()

    return {s.name: (s.kind, s.weight, s.value, s.invalid) for s in asyncio.run(episode())}


@pytest.mark.parametrize(
    ("verdict", "answer", "value", "invalid"),
    [
        (True, "42", 1.0, ""),
        (True, "41", -1.0, ""),
        (False, "42", -1.0, ""),
        ("the judge is ill", "42", None, "the judge is ill"),
    ],
)
def test_scores(verdict: bool | str, answer: str, value: float | None, invalid: str) -> None:
    said = (format_call("echo", {"text": "hello"}), "nothing", format_call("answer", {"text": answer}))
    assert outcome(verdict, *said) == {
        "outcome": (ScoreKind.OUTCOME, 1.0, value, invalid),
        "step": (ScoreKind.PENALTY, -0.05, 3.0, ""),
        "invalid": (ScoreKind.PENALTY, -0.2, 1.0, ""),
    }


def test_errors_are_one_short_line() -> None:
    assert failed("a\n  b") == Result(text="error: a b", status=ToolStatus.ERROR)
    assert len(failed("x" * 999).text) == 200
