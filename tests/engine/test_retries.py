"""Retries wait with full jitter, bounded by count and time, and never repeat what is meant to be shown."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest

from slipstream.errors import InfrastructureError, ToolError
from slipstream.retries import Backoff, Brake, retried


class Clock(asyncio.SelectorEventLoop):
    """Time passes only while nothing can run."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        look: Callable[[float | None], list[Any]] = self._selector.select

        def skip(timeout: float | None = None) -> list[Any]:
            self._now += timeout or 0.0
            return look(0.0)

        self._selector.select = skip

    def time(self) -> float:
        return self._now


LONGEST = Backoff(first_s=1.0, longest_s=8.0, uniform=lambda low, high: high)


def tried(failures: int, error: Exception, *, retries: int, until_s: float = 1e9) -> tuple[Any, list[float]]:
    """Return what came out, and when each attempt was made."""
    times: list[float] = []

    async def operation(retry: int) -> str:
        assert retry == len(times)
        times.append(asyncio.get_running_loop().time())
        if retry < failures:
            raise error
        return "value"

    async def run() -> Any:
        try:
            return await retried(operation, retries=retries, backoff=LONGEST, until_s=until_s)
        except (InfrastructureError, ToolError, ValueError) as raised:
            return raised

    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(run()), times


def test_waits_double_up_to_the_longest() -> None:
    value, times = tried(6, InfrastructureError("down"), retries=6)
    assert value == "value"
    assert times == pytest.approx([0, 1, 3, 7, 15, 23, 31])


def test_the_count_is_a_bound() -> None:
    error = InfrastructureError("down")
    value, times = tried(100, error, retries=2)
    assert value is error and len(times) == 3
    value, times = tried(100, error, retries=0)
    assert value is error and len(times) == 1


def test_no_wait_passes_the_deadline() -> None:
    error = InfrastructureError("down")
    value, times = tried(100, error, retries=9, until_s=6.0)
    assert value is error and times == pytest.approx([0, 1, 3])


@pytest.mark.parametrize("error", [ToolError("no such document"), ValueError("mistake")])
def test_other_errors_are_never_tried_again(error: Exception) -> None:
    value, times = tried(1, error, retries=5)
    assert value is error and len(times) == 1


def test_jitter_is_full_and_reproducible() -> None:
    backoff = Backoff(first_s=1.0, longest_s=4.0, uniform=random.Random(7).uniform)
    drawn = [backoff.wait_s(retry) for retry in (0, 1, 2, 3, 50) for _ in range(400)]
    again = Backoff(first_s=1.0, longest_s=4.0, uniform=random.Random(7).uniform)
    assert drawn == [again.wait_s(retry) for retry in (0, 1, 2, 3, 50) for _ in range(400)]
    for index, top in enumerate((1.0, 2.0, 4.0, 4.0, 4.0)):
        part = drawn[400 * index :][:400]
        assert 0.0 <= min(part) < 0.05 * top and 0.95 * top < max(part) <= top


def test_waiting_disturbs_no_seeded_generator() -> None:
    random.seed(3)
    expected = random.Random(3).random()
    for retry in range(10):
        Backoff(first_s=1.0).wait_s(retry)
    assert random.random() == expected


def test_the_brake_slows_failures_down_and_lets_go(caplog: pytest.LogCaptureFixture) -> None:
    brake = Brake(LONGEST)
    with caplog.at_level(logging.WARNING):
        assert [brake.wait_s(5, 0, "down") for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert caplog.messages == ["infrastructure failed 4 times in a row (every task): down"]
    assert brake.wait_s(6, 0, "") == 0.0
    assert brake.wait_s(5, 0, "down") == 1.0


def test_one_task_that_always_fails_is_slowed_down_among_others_that_do_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    brake = Brake(LONGEST)
    waits = []
    with caplog.at_level(logging.WARNING):
        for issue in range(5):
            waits.append(brake.wait_s(5, issue, "down"))
            assert brake.wait_s(6, 0, "") == 0.0
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert caplog.messages == ["infrastructure failed 4 times in a row (task 5, attempted 4 times): down"]
