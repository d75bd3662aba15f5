"""Stand-ins for disk and wire of the simulator: they forget what a crash may take, and remember every truth.

The oracle is here too: it sees each record when it is made, made durable, logged, acknowledged and trained,
and raises Violation at the first effect that breaks a promise.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache
from typing import Any, Final, Protocol
from unittest import mock

import msgspec
import numpy as np

from slipstream import curriculum, events, ledger, synthetic, wire
from slipstream.config import RunConfig
from slipstream.errors import DamageError
from slipstream.ingest import Entry
from slipstream.messages import Buffer
from slipstream.transport import actor_core, learner_core
from slipstream.types import (
    Lease,
    Outcome,
    Score,
    ScoreKind,
    Split,
    TaskAttempt,
    Trajectory,
    TrajectoryId,
    WeightUpdate,
)
from slipstream.wire import Arrival, Header

RUN: Final = "run"


class Violation(AssertionError):
    """A promise was broken."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """A trajectory without arrays: all that the protocol looks at."""

    header: Header
    serials: tuple[int, ...]

    @property
    def identity(self) -> TrajectoryId:
        return self.header.identity

    @property
    def attempt(self) -> TaskAttempt:
        return self.header.attempt

    @property
    def split(self) -> Split:
        return self.header.split

    @property
    def evaluation(self) -> int:
        return self.header.evaluation

    @property
    def issue(self) -> int:
        return self.header.issue


_TEMPLATE: Final = synthetic.trajectory(8)


class Wire(Protocol):
    """How trajectories become bytes."""

    most_bytes: int
    """Most bytes of a record."""

    def answer(self, lease: Lease, serials: set[int], outcome: Outcome) -> Any:
        """Return a trajectory."""

    def identity(self, record: Buffer) -> TrajectoryId:
        """Return whose record this is."""

    def serials(self, made: Any) -> set[int]:
        """Return the serials of a trajectory's tokens."""

    def open(self) -> AbstractContextManager[object]:
        """Let the cores and the ledger use it."""


class RealWire:
    """That of the product (wire.py)."""

    most_bytes = wire.most_bytes(_TEMPLATE)

    def answer(self, lease: Lease, serials: set[int], outcome: Outcome) -> Trajectory:
        """Return a trajectory of eight tokens."""
        mask, some = _TEMPLATE.loss_mask, sorted(serials)
        versions = np.full(mask.size, -1, np.int32)
        versions[mask == 1] = [some[n % len(some)] for n in range(int(mask.sum()))]
        return dataclasses.replace(
            _TEMPLATE, attempt=lease.attempt, split=lease.split, evaluation=lease.evaluation,
            issue=lease.issue, outcome=outcome, versions=versions, stage=lease.stage,
            scores=scores_of(lease), turn_rewards=np.array([scores_of(lease)[0].value, 0.0], np.float32),
        )  # fmt: skip

    def identity(self, record: Buffer) -> TrajectoryId:
        """Return whose record this is."""
        return wire.inspect_trajectory(record).header.identity

    def serials(self, made: Trajectory) -> set[int]:
        """Return the serials of a trajectory's tokens."""
        return set(made.versions[made.loss_mask == 1].tolist())

    def open(self) -> AbstractContextManager[object]:
        """Change nothing."""
        return nullcontext()


class CheapWire:
    """Records without arrays at a fraction of the cost: header, serials and a CRC."""

    most_bytes = 400

    def answer(self, lease: Lease, serials: set[int], outcome: Outcome) -> Sample:
        """Return a sample."""
        header = Header(
            identity=_NOBODY, attempt=lease.attempt, split=lease.split, evaluation=lease.evaluation,
            issue=lease.issue, scores=scores_of(lease), sampling=_TEMPLATE.sampling,
            timings=_TEMPLATE.timings, outcome=outcome, note="", stage=lease.stage,
        )  # fmt: skip
        return Sample(header=header, serials=tuple(sorted(serials)))

    def identity(self, record: Buffer) -> TrajectoryId:
        """Return whose record this is."""
        return _DECODE(record[:-4]).identity

    def serials(self, made: Sample) -> set[int]:
        """Return the serials of a sample."""
        return set(made.serials)

    def open(self) -> AbstractContextManager[object]:
        """Put it in the place of the product's."""
        stack = ExitStack()
        for module, name, stand_in in (
            (actor_core, "encode_trajectory", _encode),
            (actor_core, "most_bytes", lambda _: self.most_bytes),
            (ledger, "inspect_trajectory", _inspect),
            (learner_core, "decode_trajectory", _decode),
        ):
            stack.enter_context(mock.patch.object(module, name, stand_in))
        return stack


_NOBODY: Final = TrajectoryId(run="", actor="", epoch=-1, seq=-1)
_SPOOL_BYTES: Final = 3600
"""What an actor's spool takes, and one trajectory more."""
_ENCODE: Final = msgspec.msgpack.Encoder().encode
_DECODE: Final = msgspec.msgpack.Decoder(Sample).decode


def _encode(made: Sample, identity: TrajectoryId) -> bytes:
    header = msgspec.structs.replace(made.header, identity=identity)
    body = _ENCODE(Sample(header=header, serials=made.serials))
    return body + zlib.crc32(body).to_bytes(4, "little")


def _decode(record: Buffer) -> Sample:
    if not _is_intact(record):
        raise DamageError("check: expected another CRC")
    return _DECODE(record[:-4])


def _inspect(record: Buffer) -> Arrival:
    made = _decode(record)
    reward = made.header.scores[0].value or 0.0
    return Arrival(header=made.header, turns=1, reward=reward, sampled=8, serials=made.serials)


def _is_intact(record: Buffer) -> bool:
    return zlib.crc32(record[:-4]).to_bytes(4, "little") == record[-4:]


class Oracle:
    """What is true, whatever anybody believes."""

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        self.config, self.wire = config, wire
        self.made: dict[TrajectoryId, bytes] = {}
        """Durable at its actor at some time -> its bytes."""
        self.poison: set[TrajectoryId] = set()
        self.claims: dict[TrajectoryId, tuple[set[int], set[int]]] = {}
        """Serials of the tokens, and those that its session has proven so far."""
        self.logged: set[TrajectoryId] = set()
        """Durable in the hub's log."""
        self.verdicts: dict[TrajectoryId, str] = {}
        self.attempts: dict[TrajectoryId, TaskAttempt] = {}
        self.sizes: dict[int, int] = {}
        """group -> the episodes it was opened with, as the log last said."""
        self.replaced: dict[int, set[int]] = {}
        """batch -> groups that were filtered while it was the next one."""
        self.sessions: dict[str, list[str]] = {}
        """name -> the sessions the hub has let in, in order of their first Hello."""
        self.updates: dict[int, WeightUpdate] = {}
        self.forks: dict[int, int] = {}
        self.fenced = 0

    def joined(self, name: str, session: str) -> None:
        """A hub let a session in: one that another has replaced must never come back."""
        known = self.sessions.setdefault(name, [])
        if session in known and known[-1] != session:
            raise Violation(f"{name}: session {session} was replaced by {known[-1]} and let in again")
        if session not in known:
            known.append(session)

    def opened(self, event: events.GroupOpened) -> None:
        """A group is opened: with as many episodes as are configured, or fewer for a curriculum."""
        most, exploration = self.config.batch.group_size, self.config.curriculum.exploration
        least = exploration.least_group_size if self.config.curriculum.enabled else most
        self.sizes[event.group] = event.size or most
        if not (least or most) <= self.sizes[event.group] <= most:
            raise Violation(f"group {event.group} was opened with {event.size} episodes")

    def received(self, event: events.Received, record: Buffer, name: str, session: str) -> None:
        """A record goes into the log."""
        identity = event.identity
        if identity in self.verdicts:
            raise Violation(f"{identity} is logged twice")
        if self.made.get(identity) != record:
            raise Violation(f"{identity} is logged with other bytes than its actor made durable")
        if self.sessions[name][-1] != session:
            raise Violation(f"{identity} was taken from a session of {name} that has been replaced")
        if event.verdict in ("buffered", "evaluated"):
            serials, proven = self.claims[identity]
            pinned = event.evaluation < 0 or serials == {event.evaluation}
            if not serials <= proven or not pinned or identity in self.poison:
                raise Violation(f"{identity} has tokens of {serials}, proven are {proven}: {event.verdict}")
        self.verdicts[identity], self.attempts[identity] = event.verdict, event.attempt

    def lost_from_log(self, identity: TrajectoryId) -> None:
        """A crash took an event that was not flushed."""
        self.verdicts.pop(identity, None)

    def acknowledged(self, identity: TrajectoryId) -> None:
        """An actor forgets a record: it must be in the log."""
        if identity not in self.logged and identity not in self.poison:
            raise Violation(f"{identity} is forgotten by its actor and not durable at the hub")

    def trained(self, line: list[list[Any]], batch: list[Any], incarnation: int) -> None:
        """A learner trains on a batch, after those of its line."""
        step = len(line)
        attempts = [(x.attempt.group, x.attempt.attempt) for x in batch]
        groups = sorted({group for group, _ in attempts})
        if attempts != [(group, n) for group in groups for n in range(self.sizes[group])]:
            raise Violation(f"batch {step} is not of whole groups in order: {attempts}")
        if len(groups) != self.config.batch.groups:
            raise Violation(f"batch {step} has {len(groups)} groups")
        before = {x.attempt.group for old in line for x in old}
        if before & set(groups):
            raise Violation(f"batch {step} trains again on groups {sorted(before & set(groups))}")
        for x in batch:
            if self.verdicts.get(x.identity) != "buffered" or x.identity not in self.logged:
                raise Violation(f"batch {step} has {x.identity}, which the log calls "
                                f"{self.verdicts.get(x.identity)}")  # fmt: skip
        for group in groups:
            serials = {s for x in batch if x.attempt.group == group for s in self.wire.serials(x)}
            slip = min(self.slip(step, incarnation, serial) for serial in serials)
            if slip > self.config.max_slip:
                raise Violation(f"batch {step}: group {group} is {slip} versions old")
        for x in batch:
            serials = self.wire.serials(x)
            slip = min(self.slip(step, incarnation, serial) for serial in serials)
            if slip > self.config.max_slip and not any(self._lives(incarnation, s) for s in serials):
                raise Violation(f"batch {step}: {x.identity} is {slip} versions old, of a branch given up")

    def _lives(self, incarnation: int, serial: int) -> bool:
        """Tell whether the line of an incarnation holds the weights of a serial."""
        version = self.updates[serial].version
        return self._owner(incarnation, version.step) == self._owner(version.incarnation, version.step)

    def slip(self, step: int, incarnation: int, serial: int) -> int:
        """Count the versions between two, by walking the tree of lines: both ways from where they part."""
        version = self.updates[serial].version
        one = [self._owner(incarnation, s) for s in range(step + 1)]
        other = [self._owner(version.incarnation, s) for s in range(version.step + 1)]
        common = sum(a == b for a, b in zip(one, other, strict=False))
        return len(one) + len(other) - 2 * common

    def _owner(self, incarnation: int, step: int) -> int:
        """Return the incarnation that made the weights of a step of a line: a fork repeats its root's."""
        while incarnation > 0 and step <= self.forks[incarnation]:
            incarnation -= 1
        return incarnation

    def filtered(self, event: events.Dropped, batch: int) -> None:
        """A group leaves the buffer because it tells nothing: whole, alike, and no more than may be."""
        groups = Counter(self.attempts[identity].group for identity in event.identities)
        if len(groups) != 1 or groups != {group: self.sizes[group] for group in groups}:
            raise Violation(f"{event.identities} are filtered, and no whole group")
        if len({score_of(self.attempts[identity]) for identity in event.identities}) > 1:
            raise Violation(f"{event.identities} are filtered, and differ")
        self.replaced.setdefault(batch, set()).update(groups)
        if len(self.replaced[batch]) > self.config.curriculum.dynamic.refills * self.config.batch.groups:
            raise Violation(f"{self.replaced[batch]} are replaced for batch {batch}")


_SEGMENT_EVENTS: Final = 97


class MemoryJournal:
    """The hub's log: a crash takes any end of what was not flushed; a State opens every so many events."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._entries: list[tuple[events.AnyEvent, Buffer]] = []
        self._durable = 0
        self.speaker = ("", "")
        """(name, session) of the peer whose message is being handled."""
        self.opening: Callable[[], events.State] | None = None
        """Gives what all events so far add up to."""
        self._left = _SEGMENT_EVENTS

    def append(self, event: events.AnyEvent, record: Buffer = b"") -> int:
        """Add an event."""
        if type(event) is events.Received:
            self._oracle.received(event, record, *self.speaker)
        elif type(event) is events.GroupOpened:
            self._oracle.opened(event)
        elif type(event) is events.Incarnation:
            self._oracle.forks[event.number] = event.fork_step
        elif type(event) is events.Dropped and event.reason == "filtered":
            self._oracle.filtered(event, len(self.trained()))
        self._left -= 1
        if not self._left and self.opening is not None:
            self._left = _SEGMENT_EVENTS
            self._entries.append((self.opening(), b""))
        self._entries.append((event, record))
        return len(self._entries) - 1

    def flush(self) -> None:
        """Make everything durable."""
        self._keep(len(self._entries))

    def read(self, position: int) -> Buffer:
        """Return the record behind an event."""
        return self._entries[position][1]

    def replay(self) -> Iterator[Entry]:
        """Yield the newest State and what follows, as from a log whose other segments are gone."""
        states = [at for at, (event, _) in enumerate(self._entries) if type(event) is events.State]
        for position in range(states[-1] if states else 0, len(self._entries)):
            yield Entry(position=position, event=self._entries[position][0], record=b"")

    def crash(self, chance: random.Random) -> None:
        """Forget some end of what was not flushed."""
        kept = chance.randint(self._durable, len(self._entries))
        for event, _ in self._entries[kept:]:
            if type(event) is events.Received:
                self._oracle.lost_from_log(event.identity)
            elif type(event) is events.Dropped and event.reason == "filtered":
                group = self._oracle.attempts[event.identities[0]].group
                for groups in self._oracle.replaced.values():
                    groups.discard(group)
        del self._entries[kept:]
        self._keep(kept)

    def _keep(self, end: int) -> None:
        for position in range(self._durable, end):
            event = self._entries[position][0]
            if type(event) is events.Received:
                self._oracle.logged.add(event.identity)
            elif type(event) is events.Epoch:
                self._oracle.joined(event.actor, event.session)
            elif type(event) is events.Incarnation:
                self._oracle.joined("learner", event.session)
        self._durable = end

    def trained(self) -> dict[int, tuple[TrajectoryId, ...]]:
        """Return the batches of the living line, as the log tells it."""
        batches: dict[int, tuple[TrajectoryId, ...]] = {}
        for event, _ in self._entries:
            if type(event) is events.Trained:
                batches[event.step] = event.identities
            elif type(event) is events.RolledBack:
                batches = {step: held for step, held in batches.items() if step < event.step}
        return batches


def progress_of(config: RunConfig, said: Iterable[tuple[events.AnyEvent, Buffer]]) -> events.Progress:
    """Return what a log makes of a curriculum, read by itself: batch after batch of the living line."""
    received: dict[TrajectoryId, events.Received] = {}
    batches: list[tuple[TrajectoryId, ...]] = []
    filtered: dict[int, list[TrajectoryId]] = {}
    measured: dict[int, float] = {}
    for event, _ in said:
        match event:
            case events.Received(identity=identity):
                received[identity] = event
            case events.Dropped(identities=identities, reason="filtered"):
                filtered.setdefault(len(batches), []).extend(identities)
            case events.Trained(identities=identities):
                batches.append(identities)
            case events.RolledBack(step=step):
                del batches[step:]
                measured = {at: kl for at, kl in measured.items() if at <= step}
            case events.Measured(step=step, kl=kl):
                measured[step] = kl
    progress = events.Progress()
    for step, batch in enumerate(batches):
        groups: dict[int, list[events.Received]] = {}
        for identity in (*batch, *filtered.get(step, ())):
            groups.setdefault(received[identity].attempt.group, []).append(received[identity])
        results = [
            curriculum.GroupResult(
                task=group, stage=members[0].stage, successes=sum(x.success for x in members),
                episodes=len(members), alike=len({x.reward for x in members}) == 1,
            )
            for group, members in sorted(groups.items())
        ]  # fmt: skip
        progress = curriculum.followed(
            progress, results, measured.get(step), config.curriculum,
            notches=curriculum.notches(config.sampling.temperature, config.curriculum.exploration),
            most_size=config.batch.group_size,
        )  # fmt: skip
    return progress


class MemorySpool:
    """An actor's spool: a crash takes an end of what is not synced, and may bring back what was forgotten."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self.full = False
        self._records: dict[int, tuple[TrajectoryId, Buffer]] = {}
        self._gone: dict[int, tuple[TrajectoryId, Buffer]] = {}
        """Acknowledged, and perhaps not yet written over."""
        self._unsynced: list[int] = []
        self._bytes = 0
        self.next_seq = 0

    def write(self, seq: int, record: Buffer) -> int:
        """Write a record."""
        identity = self._oracle.wire.identity(record)
        self._records[seq] = identity, record
        self._unsynced.append(seq)
        self._bytes += len(record)
        self.next_seq = seq + 1
        return seq

    def sync(self) -> list[int]:
        """Make all that was written durable and return the numbers of it."""
        done, self._unsynced = self._unsynced, []
        for seq in done:
            identity, record = self._records[seq]
            self._oracle.made[identity] = bytes(record)
        return done

    def has_room(self, payload_bytes: int) -> bool:
        """Return whether a record fits."""
        return not self.full and self._bytes + payload_bytes <= self._oracle.wire.most_bytes + _SPOOL_BYTES

    def acknowledge(self, seqs: Iterable[int]) -> None:
        """Forget records."""
        for seq in seqs:
            found = self._records.pop(seq, None)
            if found is not None:
                self._oracle.acknowledged(found[0])
                self._bytes -= len(found[1])
                self._gone[seq] = found

    def read(self, seq: int) -> Buffer:
        """Return a record."""
        return self._records[seq][1]

    def pending_seqs(self) -> list[int]:
        """Return the numbers of all records."""
        return sorted(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, seq: int) -> bool:
        return seq in self._records

    def crash(self, chance: random.Random) -> None:
        """Start over as the next process finds it."""
        kept = chance.randint(0, len(self._unsynced))
        for seq in self._unsynced[kept:]:
            del self._records[seq]
        self._unsynced = self._unsynced[:kept]
        self.sync()
        if self._gone and chance.random() < 0.5:
            seq = chance.choice(sorted(self._gone))
            self._records[seq] = self._gone[seq]
        self._gone.clear()
        self._bytes = sum(len(record) for _, record in self._records.values())
        self.next_seq = max(self._records, default=-1) + 1


@cache
def score_of(attempt: TaskAttempt) -> float:
    """Return how an attempt ends, +1 or -1: some groups are alike, and the later ones succeed more often."""
    chance = random.Random(attempt.group * 1013 + attempt.attempt)
    return 1.0 if chance.random() < (0.3, 0.6, 0.9)[min(2, attempt.group // 12)] else -1.0


def scores_of(lease: Lease) -> tuple[Score, ...]:
    """Return its judgement."""
    value = score_of(lease.attempt)
    return (Score(name="answer", kind=ScoreKind.OUTCOME, weight=1.0, value=value),)


@cache
def seconds_of(group: int, attempt: int, issue: int) -> float:
    """Return how long an episode takes: some tasks always take long, so that a bias would show."""
    chance = random.Random(group * 1009 + attempt * 31 + issue)
    slow = 8.0 if group % 5 == 0 else 1.0
    return slow * chance.uniform(0.05, 0.6)
