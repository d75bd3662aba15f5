"""Floor 5. One row of numbers for each episode of a run, so that lists are filtered without reading the log.

A row takes 132 bytes, and about as many in the tables that find it; nothing of an episode's text is held.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream import events
from slipstream.errors import ProtocolError
from slipstream.staleness import VersionTable
from slipstream.types import Outcome, Split, Timings, ToolStatus, TrajectoryId, Version
from slipstream.viewing.log import Found, Place
from slipstream.wire import ARRAYS

ROW: Final = np.dtype(
    [
        ("segment", "i4"), ("offset", "i8"), ("group", "i8"), ("task", "i8"), ("attempt", "i4"),
        ("evaluation", "i4"), ("split", "u1"), ("outcome", "u1"), ("fate", "u1"), ("success", "u1"),
        ("reward", "f4"), ("turns", "i4"), ("tokens", "i4"), ("serial_low", "i4"), ("serial_high", "i4"),
        ("step", "i4"), ("slip", "i4"), ("place", "i4"), ("actor", "u2"), ("epoch", "i4"), ("seq", "i8"),
        ("length", "i4"), ("calls", "i4"), ("cached", "i4"), ("tools", "u8"), ("statuses", "u1"),
        ("started", "f8"), ("finished", "f8"), ("generate", "f4"), ("tool_time", "f4"),
    ]
)  # fmt: skip
OUTCOMES: Final = tuple(Outcome)
SPLITS: Final = tuple(Split)
STATUSES: Final = tuple(ToolStatus)
FATES: Final = (
    "buffered", "trained", "evaluated", "dropped_by_slip", "filtered", "given_up", "duplicate",
    "failed_infrastructure", "unproven",
)  # fmt: skip
MOST_TOOLS: Final = 63
"""Tools told apart by name; the bit behind them stands for all others."""
_OTHER_TOOLS: Final = "(other tools)"
_LENGTHS: Final = struct.Struct("<8I")
_MASK: Final = [name for name, _ in ARRAYS].index("loss_mask")


class _Brief(msgspec.Struct, frozen=True):
    """What the index reads of a record's header."""

    timings: Timings


class _BriefCall(msgspec.Struct, frozen=True):
    """What the index reads of a tool call."""

    name: str
    status: ToolStatus
    cached: bool


_BRIEF: Final = msgspec.msgpack.Decoder(_Brief)
_CALLS: Final = msgspec.msgpack.Decoder(tuple[_BriefCall, ...])

GroupKey = tuple[int, int]
"""(serial of the evaluation or -1, group)."""


class RunIndex:
    """What the events of a run say about its episodes.

    Example: ``index.take(found)`` for each event; ``index.rows["reward"].mean()``.
    """

    def __init__(self) -> None:
        """Begin with no episode."""
        self._rows = np.zeros(1024, ROW)
        self.count = 0
        self.groups: dict[GroupKey, int] = {}
        """The place of each group, in the order of arrival: the column `place`."""
        self.members: list[list[int]] = []
        """Rows of the group at each place."""
        self.actors: list[str] = []
        self.tools: list[str] = []
        """Names by bit of the column `tools`."""
        self.evaluations: list[events.EvaluationDone] = []
        self.versions = VersionTable()
        self.trained_batches = 0
        self.unread = 0
        """Episodes whose numbers do not fit a row, or whose record is no record."""
        self._incarnation = 0
        self._row_of: dict[tuple[int, int, int], int] = {}
        """(actor, epoch, seq) -> row."""
        self._slips: dict[tuple[int, int, int, int], int] = {}

    @property
    def rows(self) -> NDArray[Any]:
        """The [n] rows, a view that is valid until the next event."""
        return self._rows[: self.count]

    def tools_of(self, mask: int) -> list[str]:
        """Return the names of the tools of a bit mask."""
        return [name for bit, name in enumerate(self.tools) if mask >> bit & 1]

    def take(self, found: Found) -> None:
        """Note one event."""
        match found.event:
            case events.Received() as event:
                self._received(event, found.place, found.record)
            case events.Published(update=update):
                self._add_versions([update.version])
                self._incarnation = update.version.incarnation
            case events.Incarnation(number=number):
                self._incarnation = number
            case events.Trained(step=step, identities=identities):
                self._trained(step, identities)
            case events.Dropped(identities=identities, reason=reason):
                self._settle(identities, reason)
            case events.GaveUp(identities=identities):
                self._settle(identities, "given_up")
            case events.RolledBack(step=step):
                undone = (self.rows["fate"] == FATES.index("trained")) & (self.rows["step"] > step)
                self.rows["fate"][undone] = FATES.index("buffered")
                self.rows["step"][undone] = self.rows["slip"][undone] = -1
            case events.EvaluationDone() as event:
                self.evaluations.append(event)
            case events.State(versions=versions, forks=forks, incarnation=incarnation):
                for number, step in forks.items():
                    self.versions.fork(number, step)
                self._add_versions(versions)
                self._incarnation = incarnation

    def _received(self, event: events.Received, place: Place, record: memoryview) -> None:
        if self.count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros(len(self._rows), ROW)])
        identity, attempt, serials = event.identity, event.attempt, event.serials
        actor = self._number(self.actors, identity.actor)
        group = self.groups.setdefault((event.evaluation, attempt.group), len(self.members))
        if group == len(self.members):
            self.members.append([])
        low, high = (serials[0], serials[-1]) if serials else (-1, -1)
        try:
            # In the order of ROW; one assignment is ten times as fast as one for each column.
            self._rows[self.count] = (
                place.segment, place.offset, attempt.group, attempt.task, attempt.attempt, event.evaluation,
                SPLITS.index(event.split), OUTCOMES.index(event.outcome), FATES.index(event.verdict),
                event.success, event.reward, event.turns, event.tokens, low, high, -1, -1, group,
                min(actor, 65535), identity.epoch, identity.seq, *self._look_into(record),
            )  # fmt: skip
        except (OverflowError, ValueError, struct.error, msgspec.MsgspecError, RecursionError):
            self.unread += 1
            return
        self.members[group].append(self.count)
        if event.verdict != "duplicate":
            self._row_of[actor, identity.epoch, identity.seq] = self.count
        self.count += 1

    def _look_into(self, record: memoryview) -> tuple[Any, ...]:
        """Return the last columns, which only the record knows: length, seconds, what was called."""
        lengths = _LENGTHS.unpack_from(record)
        between = _LENGTHS.size + sum(lengths[:-2])
        behind = between + lengths[-2]
        timings = _BRIEF.decode(record[between:behind]).timings
        calls = _CALLS.decode(record[behind : behind + lengths[-1]])
        tools = statuses = cached = 0
        for call in calls:
            tools |= 1 << self._tool(call.name)
            statuses |= 1 << STATUSES.index(call.status)
            cached += call.cached
        return (
            lengths[_MASK], len(calls), cached, tools, statuses,
            timings.started_s, timings.finished_s, timings.generate_s, timings.tools_s,
        )  # fmt: skip

    def _trained(self, batch: int, identities: Iterable[TrajectoryId]) -> None:
        """Book what the optimizer step behind `batch` steps was made of; metrics.jsonl counts it too."""
        for number in self._settle(identities, "trained"):
            row = self._rows[number]
            row["step"] = batch + 1
            row["slip"] = self._slip(batch, int(row["serial_low"]), int(row["serial_high"]))
        self.trained_batches = max(self.trained_batches, batch + 1)

    def _slip(self, step: int, low: int, high: int) -> int:
        """Return the largest slip of an episode's tokens when they were trained, or -1 if it is unknown."""
        key = (step, self._incarnation, low, high)
        if key not in self._slips:
            try:
                self._slips[key] = int(self.versions.slip_at(step, self._incarnation, [low, high]).max())
            except ProtocolError:
                self._slips[key] = -1
        return self._slips[key]

    def _settle(self, identities: Iterable[TrajectoryId], fate: str) -> list[int]:
        """Give episodes their fate and return the rows of those that are known."""
        numbers = {name: number for number, name in enumerate(self.actors)}
        keys = ((numbers.get(i.actor, -1), i.epoch, i.seq) for i in identities)
        found = [self._row_of[key] for key in keys if key in self._row_of]
        self._rows["fate"][found] = FATES.index(fate)
        return found

    def _add_versions(self, versions: Iterable[Version]) -> None:
        for version in versions:
            try:
                self.versions.add(version)
            except ProtocolError:
                self.unread += 1

    def _tool(self, name: str) -> int:
        if name not in self.tools and len(self.tools) >= MOST_TOOLS:
            name = _OTHER_TOOLS
        return min(self._number(self.tools, name), MOST_TOOLS)

    @staticmethod
    def _number(names: list[str], name: str) -> int:
        """Return the place of a name in a list, at the end of which it is put if it is new."""
        try:
            return names.index(name)
        except ValueError:
            names.append(name)
            return len(names) - 1
