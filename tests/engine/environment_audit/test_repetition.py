"""What is played twice is compared, unless something beneath the environment failed in it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any

import pytest

from slipstream.config import load_config
from slipstream.environment_audit.episode import Episode
from slipstream.environment_audit.repetition import determinism, resumable
from slipstream.environment_audit.stage import Stage
from slipstream.environment_audit.verdicts import Level, Verdict
from slipstream.types import Outcome


class LateStage(Stage):
    """Beneath it something is late in those episodes that are counted among `late`."""

    def __init__(self, late: Collection[int]) -> None:
        super().__init__(load_config("research"), episodes=4, seed=1)
        self.late, self.count = late, 0

    async def play(self, *given: Any, **more: Any) -> Episode:
        episode = await super().play(*given, **more)
        if self.count in self.late:
            episode.outcome, episode.moves, episode.scores = Outcome.INFRASTRUCTURE_FAILURE, [], ()
        self.count += 1
        return episode


def verdicts(late: Collection[int]) -> tuple[Verdict, Verdict]:
    async def judged() -> tuple[Verdict, Verdict]:
        stage = LateStage(late)
        assert not await stage.look()
        until = time.monotonic() + 60.0
        first = await determinism(stage, until)
        stage.count = 0
        return first, await resumable(stage, until)

    return asyncio.run(judged())


@pytest.mark.parametrize(("late", "left"), [((), 8), ((1,), 7), ((0, 3), 6)])
def test_what_failed_beneath_is_no_difference(late: Collection[int], left: int) -> None:
    twice, moved = verdicts(late)
    assert (twice.level, moved.level) == (Level.PASS, Level.PASS)
    assert twice.sentence.startswith(f"{left} episodes played twice")
    assert moved.sentence.startswith(f"{left - 4} episodes that moved")


def test_where_everything_failed_nothing_is_said_to_be_equal() -> None:
    for verdict in verdicts(range(int(1e6))):
        assert verdict.level is Level.WARN and "in each pair" in verdict.sentence
