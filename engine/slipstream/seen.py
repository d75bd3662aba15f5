"""Floor 2. Which trajectories a hub has ever received, in a few numbers per sender.

A sender is an actor in one epoch. It counts its trajectories up one by one and they arrive nearly in order,
so that what arrived is one interval, or a few while some are on their way again: a watermark with gaps.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

from slipstream.types import TrajectoryId

Sender = tuple[str, int]
"""(actor, epoch)."""
Interval = tuple[int, int]
"""[first, behind the last)."""


class Seen:
    """A set of identities of one run.

    Example: ``seen.add(identity); assert identity in seen``.
    """

    def __init__(self, intervals: Iterable[tuple[str, int, tuple[Interval, ...]]] = ()) -> None:
        """Start with what `intervals` gave, or empty."""
        self._starts: dict[Sender, list[int]] = {}
        self._stops: dict[Sender, list[int]] = {}
        for actor, epoch, found in intervals:
            self._starts[actor, epoch] = [start for start, _ in found]
            self._stops[actor, epoch] = [stop for _, stop in found]

    def __contains__(self, identity: TrajectoryId) -> bool:
        """Return whether an identity was added."""
        sender = identity.actor, identity.epoch
        starts = self._starts.get(sender)
        if starts is None:
            return False
        at = bisect.bisect_right(starts, identity.seq) - 1
        return at >= 0 and identity.seq < self._stops[sender][at]

    def add(self, identity: TrajectoryId) -> None:
        """Add an identity that is not there yet."""
        sender, seq = (identity.actor, identity.epoch), identity.seq
        starts, stops = self._starts.setdefault(sender, []), self._stops.setdefault(sender, [])
        at = bisect.bisect_right(starts, seq)
        joins_left = at > 0 and stops[at - 1] == seq
        joins_right = at < len(starts) and starts[at] == seq + 1
        if joins_left and joins_right:
            stops[at - 1] = stops.pop(at)
            del starts[at]
        elif joins_left:
            stops[at - 1] = seq + 1
        elif joins_right:
            starts[at] = seq
        else:
            starts.insert(at, seq)
            stops.insert(at, seq + 1)

    def intervals(self) -> Iterator[tuple[str, int, tuple[Interval, ...]]]:
        """Yield (actor, epoch, intervals) of every sender."""
        for (actor, epoch), starts in self._starts.items():
            yield actor, epoch, tuple(zip(starts, self._stops[actor, epoch], strict=True))
