"""Floor 2. When to stop trying an episode whose infrastructure fails again and again.

An outage fails every episode, and ends: all of them are tried until it does. A task whose own infrastructure
is broken (a record that is gone, a repository that does not build) fails while others succeed: tried for
ever, it would hold a place of the gate for ever, and enough of its kind would stop the run.
"""

from __future__ import annotations

from slipstream.events import Received, Slot


class Patience:
    """Counts failures of each episode since it last succeeded.

    Example: ``if patience.is_over(received): give_up(received.slot)``.
    """

    def __init__(self, limit: int) -> None:
        """Lose patience after `limit` failures; 0 never."""
        self._limit = limit
        self._failures: dict[Slot, int] = {}
        self._refuted: set[Slot] = set()
        """Failing episodes since whose first failure another has succeeded: this is no outage."""

    def is_over(self, event: Received) -> bool:
        """Take an arrival in; return whether its episode has failed too often while others succeeded."""
        slot = event.slot
        if event.verdict in ("buffered", "evaluated"):
            self._failures.pop(slot, None)
            self._refuted.discard(slot)
            self._refuted.update(self._failures)
            return False
        if event.verdict != "failed_infrastructure":
            return False
        self._failures[slot] = self._failures.get(slot, 0) + 1
        return 0 < self._limit <= self._failures[slot] and slot in self._refuted

    def forget(self, slot: Slot) -> None:
        """Forget the group of an episode."""
        self._failures = {other: count for other, count in self._failures.items() if other[:2] != slot[:2]}
        self._refuted &= self._failures.keys()
