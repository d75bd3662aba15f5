"""Floor 4. Which server a rollout asks next, and how many it may ask at once: rules without sockets or clock.

    place     the server that had the rollout before (its prefix cache has the tokens), else the least loaded
              of those with room; a server that failed rests, longer each time
    limit     requests of this client that a server may have at once; every look at the server moves it

                  waiting > 0 or kv_cache > HIGH      limit x DECREASE      it preempts, or soon will
                  limit nearly used                   limit + INCREASE

Source: additive increase, multiplicative decrease: Chiu and Jain 1989, "Analysis of the increase and decrease
algorithms for congestion avoidance in computer networks", section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from slipstream.retries import Backoff

HIGH: Final = 0.9
"""Share of a server's key-value cache above which it is asked less."""
INCREASE: Final = 4.0
DECREASE: Final = 0.7
NEARLY: Final = 0.75
"""Share of a limit from which it counts as used."""
FIRST_LIMIT: Final = 32.0


@dataclass(slots=True, kw_only=True)
class _Member:
    limit: float
    running: int = 0
    failures: int = 0
    """In a row."""
    rests_until: float = 0.0


class Router:
    """Places requests on servers by name; all times are of one monotonic clock, in seconds.

    Example: ``name = router.place(rollout_id, now)``; ``router.done(name)`` or ``router.failed(name, now)``.
    """

    def __init__(self, *, most: int, backoff: Backoff) -> None:
        """Never have more than `most` requests at one server; `backoff` says how long one rests."""
        self._most, self._backoff = float(max(1, most)), backoff
        self._members: dict[str, _Member] = {}
        self._last: dict[int, str] = {}
        """Rollout -> the server that has its prefix."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the servers there are."""
        return tuple(self._members)

    def limit(self, name: str) -> float:
        """Return how many requests a server may have at once."""
        return self._members[name].limit

    def keep(self, names: set[str]) -> None:
        """Have exactly these servers."""
        for name in names - self._members.keys():
            self._members[name] = _Member(limit=min(self._most, FIRST_LIMIT))
        for name in self._members.keys() - names:
            del self._members[name]

    def place(self, rollout_id: int, now: float) -> str | None:
        """Take a place at a server for a request of a rollout; None while there is none."""
        open_to = {
            name: member
            for name, member in self._members.items()
            if now >= member.rests_until and member.running < max(1, int(member.limit))
        }
        if not open_to:
            return None
        name = self._last.get(rollout_id, "")
        if name not in open_to:
            name = min(open_to, key=lambda each: open_to[each].running / open_to[each].limit)
        self._last[rollout_id] = name
        open_to[name].running += 1
        return name

    def done(self, name: str) -> None:
        """Give a place back: the server has answered."""
        if member := self._members.get(name):
            member.running -= 1
            member.failures = 0

    def failed(self, name: str, now: float) -> None:
        """Give a place back: the server has failed, and is left alone for a while."""
        if member := self._members.get(name):
            member.running -= 1
            if now >= member.rests_until:  # requests that fail together are one failure
                member.rests_until = now + self._backoff.first_s + self._backoff.wait_s(member.failures)
                member.failures += 1

    def given_up(self, name: str) -> None:
        """Give a place back: nobody waits for the answer any more, which says nothing about the server."""
        if member := self._members.get(name):
            member.running -= 1

    def observe(self, name: str, *, kv_cache: float, waiting: int) -> None:
        """Take in a look at a server: the used share of its key-value cache, and its queue."""
        member = self._members.get(name)
        if member is None:
            return
        if waiting > 0 or kv_cache > HIGH:
            member.limit = max(1.0, member.limit * DECREASE)
        elif member.running >= NEARLY * member.limit:
            member.limit = min(self._most, member.limit + INCREASE)

    def release(self, rollout_id: int) -> None:
        """Forget a rollout."""
        self._last.pop(rollout_id, None)
