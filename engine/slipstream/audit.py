"""Floor 4. What became of every trajectory, by log and spools alone: is one lost, is one trained twice?

An independent reading: it follows identities and numbers, and uses nothing of the state that the hub keeps
(ledger_state.py).

    received      has exactly one fate: refused, dropped, trained, or held for a later batch
    an attempt    is trained once in the living line, which a rollback cuts
    an actor      numbers what one process of it makes one by one: a hole is a trajectory that vanished

Segments of the log that a checkpoint covers may have been removed: then the reading begins with the State
that the first segment opens with, and what was received before it is known by number only.
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipstream import events
from slipstream.errors import FrameError
from slipstream.ingest import read_events
from slipstream.records import payload, scan
from slipstream.spool import spools_in
from slipstream.types import TrajectoryId
from slipstream.wire import inspect_trajectory

_ASIDE = re.compile(r"(.+?)\.\d+(\.\d+)?\.quarantined")
"""A damaged segment of an actor's spool."""
REFUSED = frozenset({"duplicate", "failed_infrastructure", "unproven"})
Sender = tuple[str, str]
"""Actor and session: one process of an actor, whatever epochs it went through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The result; both counts are 0 as long as Slipstream keeps its promises."""

    lost: int
    """Numbers missing between those of a sender, and trajectories received that no fate has."""
    doubled: int
    """Fates too many: trained, dropped or received more than once, or two of one attempt trained."""
    findings: tuple[str, ...]
    """A sentence for each sort of loss or doubling found."""


def audit(folder: Path) -> Audit:
    """Read log and spools of a run folder whose processes have ended; raises StorageError (damage)."""
    history = History()
    for entry in read_events(folder / "trajectories"):
        history.take(entry.event)
    kept = set(_spooled(folder / "spool"))
    aside = {match[1] for path in (folder / "spool").glob("*") if (match := _ASIDE.fullmatch(path.name))}
    vanished = {
        sender: missing
        for sender, missing in history.holes(kept).items()
        if sender[0] not in aside  # the bytes are kept there
    }
    return _judge(history, vanished)


@dataclass(slots=True)
class History:
    """What the events of a log say of trajectories, evaluation included where nothing else is said."""

    received: dict[TrajectoryId, events.Received] = field(default_factory=dict)
    held: dict[events.Slot, TrajectoryId] = field(default_factory=dict)
    """Slot of an attempt -> the trajectory that waits for its batch."""
    batches: dict[int, tuple[TrajectoryId, ...]] = field(default_factory=dict)
    """The living line."""
    dropped: Counter[TrajectoryId] = field(default_factory=Counter)
    twice: Counter[TrajectoryId] = field(default_factory=Counter)
    """Received again though the log held it."""
    sessions: dict[tuple[str, int], str] = field(default_factory=dict)
    quarantined: Counter[str] = field(default_factory=Counter)
    """Actor -> records of it that were none; they may have had any number."""
    before: dict[tuple[str, int], tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """(actor, epoch) -> intervals of the numbers received before the first event."""
    begun: bool = False

    def take(self, event: events.AnyEvent) -> None:
        """Follow one event."""
        first, self.begun = not self.begun, True
        match event:
            case events.State() if first:
                self._begin(event)
            case events.Epoch(actor=actor, epoch=epoch, session=session):
                self.sessions[actor, epoch] = session
            case events.Received(identity=identity):
                if identity in self.received or self._came_before(identity):
                    self.twice[identity] += 1
                self.received[identity] = event
                if event.evaluation < 0 and event.verdict == "buffered":
                    self.held[event.slot] = identity
            case events.Trained(step=step, identities=identities):
                self.batches[step] = identities
                self._release(identities)
            case events.Dropped(identities=identities) | events.GaveUp(identities=identities):
                self.dropped.update(identities)
                self._release(identities)
            case events.RolledBack(step=step):
                for undone in [number for number in self.batches if number >= step]:
                    for identity in self.batches.pop(undone):
                        if identity in self.received:
                            self.held[self.received[identity].slot] = identity
            case events.Quarantined(actor=actor):
                self.quarantined[actor] += 1

    def _begin(self, state: events.State) -> None:
        """Take what a shortened log says of the segments that are gone."""
        self.sessions = {(actor, epoch): session for actor, epoch, session in state.sessions}
        self.before = {(actor, epoch): intervals for actor, epoch, intervals in state.seen}
        self.received = {kept.received.identity: kept.received for kept in state.items}
        self.held = {
            kept.received.slot: kept.received.identity for kept in state.items if kept.fate == "buffered"
        }
        self.batches = dict(enumerate(state.batches, state.first_batch))
        self.dropped.update(kept.received.identity for kept in state.items if kept.fate == "filtered")

    def _came_before(self, identity: TrajectoryId) -> bool:
        intervals = self.before.get((identity.actor, identity.epoch), ())
        return any(start <= identity.seq < stop for start, stop in intervals)

    def trained(self) -> list[TrajectoryId]:
        """Return what the living line has trained, in order."""
        return [identity for step in sorted(self.batches) for identity in self.batches[step]]

    def holes(self, kept: Iterable[TrajectoryId]) -> dict[Sender, int]:
        """Return how many numbers each sender misses between the known ones; `kept` are in spools."""
        numbers: dict[Sender, set[int]] = {}
        for identity in {*self.received, *kept}:
            if self._came_before(identity):
                continue
            session = self.sessions.get((identity.actor, identity.epoch), f"epoch {identity.epoch}")
            numbers.setdefault((identity.actor, session), set()).add(identity.seq)
        for (actor, epoch), intervals in self.before.items():
            known = numbers.setdefault((actor, self.sessions.get((actor, epoch), f"epoch {epoch}")), set())
            # Below its end the first interval has no holes, and may be long.
            known.add(intervals[0][1] - 1)
            known.update(seq for start, stop in intervals[1:] for seq in range(start, stop))
        missing = Counter[Sender]()
        for sender, known in numbers.items():
            missing[sender] = max(known) - min(known) + 1 - len(known)
        return dict(_less(missing, self.quarantined))

    def _release(self, identities: Iterable[TrajectoryId]) -> None:
        for identity in identities:
            event = self.received.get(identity)
            if event is not None and self.held.get(event.slot) == identity:
                del self.held[event.slot]


def _less(missing: Mapping[Sender, int], quarantined: Mapping[str, int]) -> Iterator[tuple[Sender, int]]:
    """Take those off that came as bytes without a readable number, and yield what is left."""
    left = dict(quarantined)
    for sender, count in missing.items():
        explained = min(count, left.get(sender[0], 0))
        left[sender[0]] = left.get(sender[0], 0) - explained
        if count > explained:
            yield sender, count - explained


def _judge(history: History, vanished: Mapping[Sender, int]) -> Audit:
    trained = history.trained()
    fates = Counter(trained) + history.dropped + Counter(history.held.values())
    training = {identity: event for identity, event in history.received.items() if event.evaluation < 0}
    fates.update(identity for identity, event in training.items() if event.verdict in REFUSED)
    fateless = [identity for identity in training if not fates[identity]]
    too_many = {identity: count - 1 for identity, count in fates.items() if count > 1}
    attempts = Counter(training[identity].slot for identity in set(trained) if identity in training)
    again = {slot: count - 1 for slot, count in attempts.items() if count > 1}
    losses: dict[str, Mapping[Any, int]] = {
        "trajectories vanished between an actor and the log": vanished,
        "trajectories were received and have no fate": dict.fromkeys(fateless, 1),
    }
    doublings: dict[str, Mapping[Any, int]] = {
        "fates too many of trajectories": too_many,
        "trajectories are in the log again": history.twice,
        "attempts too many were trained": again,
    }
    return Audit(
        lost=_total(losses),
        doubled=_total(doublings),
        findings=tuple(
            f"{sum(found.values())} {what}, such as {next(iter(found))}"
            for what, found in [*losses.items(), *doublings.items()]
            if found
        ),
    )


def _total(sorts: Mapping[str, Mapping[Any, int]]) -> int:
    return sum(sum(found.values()) for found in sorts.values())


def _spooled(folder: Path) -> Iterator[TrajectoryId]:
    """Yield what the spools in a folder hold, without changing them; a torn end is passed over."""
    for spool in spools_in(folder):
        for path in sorted(folder.glob(f"{spool.name}.[0-9]*")):
            if path.suffix[1:].isdigit() and path.stat().st_size:
                yield from _identities(path)


def _identities(path: Path) -> Iterator[TrajectoryId]:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        memoryview(mapped) as data,
    ):
        for record in scan(data, ends_at_zeros=True).records:
            with payload(data, record) as body:
                identity = _identity(bytes(body))
            if identity is not None:
                yield identity


def _identity(record: bytes) -> TrajectoryId | None:
    try:
        return inspect_trajectory(record).header.identity
    except FrameError:
        return None
