"""Floor 1. Every wait of the engine ends: this is the one place that says when, and who waits for whom."""

from __future__ import annotations

import asyncio
import math
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from slipstream.errors import DeadlineError
from slipstream.flight_recorder import FLIGHT

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Longest waits of a peer, in seconds."""

    start_s: float = 600.0
    """A hub that was started and does not listen yet: it replays its log first."""
    connect_s: float = 60.0
    """Hello to Welcome."""
    send_s: float = 60.0
    """Handing one message to the transport."""
    credit_s: float = 300.0
    """A finished trajectory waiting for the hub's acknowledgements."""
    batch_s: float = 900.0
    """The learner waiting for one batch."""
    drain_s: float = 30.0
    """Acknowledgement of everything sent, at the end."""
    ping_s: float = 2.0
    """Silence after which a peer asks the hub for a sign of life."""
    silence_s: float = 60.0
    """Silence of the hub after which it counts as dead."""


class Deadline:
    """A point in time by which something must have happened.

    Example: ``Deadline(30.0, who="learner", waits_for="batch 7 of the hub at tcp://127.0.0.1:5555")``.
    """

    __slots__ = ("_clock", "_end", "_seconds", "_since", "_waits_for", "_who")

    def __init__(
        self, seconds: float, who: str, waits_for: str, *, clock: Callable[[], float] = time.monotonic,
        since_s: float = 0.0,
    ) -> None:  # fmt: skip
        """Start the clock; the wait began `since_s` ago."""
        self._clock, self._seconds, self._who, self._waits_for = clock, seconds, who, waits_for
        self._since = time.time() - since_s
        self._end = clock() + seconds - since_s

    def remaining(self) -> float:
        """Return the seconds left, never below 0."""
        return max(0.0, self._end - self._clock())

    def expired(self) -> bool:
        """Return whether the deadline has passed."""
        return self._clock() >= self._end

    def error(self) -> DeadlineError:
        """Return the error that says who waits for whom and since when, with the stacks of all threads."""
        since = time.strftime("%H:%M:%S", time.localtime(self._since))
        error = DeadlineError(
            f"{self._who} waited {self._seconds:g} s for {self._waits_for} (since {since}) in vain"
        )
        error.add_note(_stacks())
        return error

    def check(self) -> None:
        """Raise DeadlineError once the deadline has passed."""
        if self.expired():
            raise self.error()


class Waits:
    """The waits of a state machine that is told the time: by what it waits for, each with its end.

    Example: ``waits.begin("credit", "credit of the hub", 300.0, now); waits.check(later)``.
    """

    __slots__ = ("_open", "_who", "ends_at")

    def __init__(self, who: str) -> None:
        """Wait for nothing yet."""
        self._who = who
        self._open: dict[str, tuple[float, float, str]] = {}
        self.ends_at = math.inf
        """When the first of them runs out."""

    def __contains__(self, name: object) -> bool:
        """Return whether a wait is under way."""
        return name in self._open

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the waits that are under way."""
        return iter(self._open)

    @property
    def began_at(self) -> float:
        """When that one began; infinite without any."""
        return min(
            ((end, end - seconds) for end, seconds, _ in self._open.values()), default=(0.0, math.inf)
        )[1]

    def begin(self, name: str, waits_for: str, seconds: float, now: float) -> None:
        """Begin a wait, unless it is under way already."""
        if name not in self._open:
            self._open[name] = (now + seconds, seconds, waits_for)
            self.ends_at = min(self.ends_at, now + seconds)
            FLIGHT.waits(waits_for, seconds)

    def end(self, name: str) -> None:
        """End a wait, if it is under way."""
        if self._open.pop(name, None) is None:
            return
        self.ends_at = min((end for end, _, _ in self._open.values()), default=math.inf)
        FLIGHT.goes_on()
        for _, seconds, waits_for in self._open.values():
            FLIGHT.waits(waits_for, seconds)

    def check(self, now: float) -> None:
        """Raise DeadlineError, saying who waits for whom, once a wait has run out."""
        if now < self.ends_at:
            return
        end, seconds, waits_for = min(self._open.values())
        raise Deadline(seconds, self._who, waits_for, clock=lambda: now, since_s=now - end + seconds).error()


async def within(awaitable: Awaitable[T], seconds: float, who: str, waits_for: str) -> T:
    """Await something for at most `seconds`; raises DeadlineError on expiry."""
    deadline = Deadline(seconds, who, waits_for)
    FLIGHT.waits(waits_for, seconds)
    try:
        async with asyncio.timeout(seconds):
            return await awaitable
    except TimeoutError as error:
        raise deadline.error() from error
    finally:
        FLIGHT.goes_on()


def _stacks() -> str:
    parts = []
    for thread, frame in sys._current_frames().items():
        parts.append(f"thread {thread}:\n" + "".join(traceback.format_stack(frame, limit=12)))
    return "\n".join(parts)
