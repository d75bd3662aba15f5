"""Floor 2. Trying again what failed for a reason outside the policy: exponential back-off with full jitter.

    wait before retry n, n from 0  ~  uniform(0, min(longest, first x 2^n))

Source: full jitter, M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from slipstream.errors import InfrastructureError
from slipstream.flight_recorder import FLIGHT

T = TypeVar("T")
LONGEST_S: Final = 10.0
_ALARM_FROM: Final = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait before trying again.

    Example: ``Backoff(first_s=0.1).wait_s(3)`` is between 0 and 0.8 seconds.
    """

    first_s: float
    """Longest wait before the first retry."""
    longest_s: float = LONGEST_S
    uniform: Callable[[float, float], float] = field(default=random.SystemRandom().uniform)
    """Draws from an interval; the system's numbers by default, so that no seeded generator is disturbed."""

    def wait_s(self, retry: int) -> float:
        """Return the seconds to wait before retry number `retry`, from 0."""
        # Beyond 2^32 the longest wait is reached anyhow, and a float would overflow.
        return self.uniform(0.0, min(self.longest_s, self.first_s * 2.0 ** min(retry, 32)))


async def retried(
    operation: Callable[[int], Awaitable[T]], *, retries: int, backoff: Backoff, until_s: float
) -> T:
    """Return what `operation` returns, given how often it failed before.

    After an InfrastructureError it is called again, at most `retries` times, and never when the wait would
    pass `until_s` on the loop's clock; then that error is raised. Any other error is raised at once.
    """
    for retry in range(retries):
        try:
            return await operation(retry)
        except InfrastructureError:
            wait_s = backoff.wait_s(retry)
            if asyncio.get_running_loop().time() + wait_s >= until_s:
                raise
            await asyncio.sleep(wait_s)
    return await operation(retries)


class Brake:
    """Slows an actor down whose episodes fail for reasons outside the policy, and raises the alarm.

    The hub leases a failed episode again at once: without a brake an environment that is down would be
    asked thousands of times a second.
    """

    def __init__(self, backoff: Backoff) -> None:
        """Start with no failure."""
        self._backoff, self._in_a_row = backoff, 0

    def wait_s(self, task: int, issue: int, failure: str) -> float:
        """Return the seconds to wait before another lease is asked for, 0 after an episode without `failure`.

        `issue` counts how often this episode has been leased before.
        """
        if not failure:
            self._in_a_row = 0
            return 0.0
        self._in_a_row += 1
        times = max(issue + 1, self._in_a_row)
        if times >= _ALARM_FROM and times & (times - 1) == 0:
            who = f"task {task}, attempted {issue + 1} times" if issue >= self._in_a_row else "every task"
            alarm = f"infrastructure failed {times} times in a row ({who}): {failure}"
            log.warning("%s", alarm)
            FLIGHT.note(alarm)
        return self._backoff.wait_s(times - 1)
