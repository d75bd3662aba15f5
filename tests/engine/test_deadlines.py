"""Waits end and say who waited for whom."""

from __future__ import annotations

import asyncio

import pytest

from slipstream.deadlines import Deadline, within
from slipstream.errors import DeadlineError


def test_a_deadline_expires_by_its_clock() -> None:
    times = iter([10.0, 12.0, 14.9, 15.0, 15.0, 15.1])
    deadline = Deadline(5.0, "learner", "batch 7", clock=lambda: next(times))
    assert deadline.remaining() == 3.0
    deadline.check()
    assert deadline.expired()
    with pytest.raises(
        DeadlineError, match=r"learner waited 5 s for batch 7 \(since \d\d:\d\d:\d\d\)"
    ) as caught:
        deadline.check()
    assert "test_a_deadline_expires_by_its_clock" in caught.value.__notes__[0]
    assert deadline.remaining() == 0.0


def test_within_returns_or_names_the_wait() -> None:
    async def value() -> int:
        return 7

    assert asyncio.run(within(value(), 1.0, "a", "b")) == 7
    with pytest.raises(DeadlineError, match=r"actor-0 waited 0\.01 s for the hub"):
        asyncio.run(within(asyncio.Event().wait(), 0.01, "actor-0", "the hub"))


def test_within_leaves_other_timeouts_alone() -> None:
    async def fails() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(within(fails(), 1.0, "a", "b"))
