"""An independent reading of a run's log: what became of every trajectory, by identity."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from slipstream import events
from slipstream.config import RunConfig
from slipstream.ingest import read_events
from slipstream.metrics import read_rows, rows_of
from slipstream.spool import Spool, spools_in
from slipstream.types import Trajectory, TrajectoryId
from slipstream.wire import decode_trajectory

UNUSABLE = {"duplicate", "failed_infrastructure", "unproven"}


@dataclass
class Books:
    """The fates of a log's trajectories, evaluations apart."""

    received: dict[TrajectoryId, events.Received] = field(default_factory=dict)
    records: dict[TrajectoryId, bytes] = field(default_factory=dict)
    batches: dict[int, tuple[TrajectoryId, ...]] = field(default_factory=dict)
    """The living line: what a rollback undid is not in it."""
    dropped: dict[TrajectoryId, str] = field(default_factory=dict)
    quarantined: int = 0
    opened: list[int] = field(default_factory=list)
    posed: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Of the groups, where a curriculum chose them, or 0."""
    """The task of each."""
    rollbacks: list[int] = field(default_factory=list)
    steps: dict[int, int] = field(default_factory=dict)
    """serial -> optimizer steps."""
    evaluated: set[TrajectoryId] = field(default_factory=set)

    @property
    def made(self) -> set[TrajectoryId]:
        """Every training trajectory that arrived."""
        return {identity for identity, event in self.received.items() if event.evaluation < 0}

    @property
    def trained(self) -> list[TrajectoryId]:
        """Every trajectory of the living line, in order."""
        return [identity for step in sorted(self.batches) for identity in self.batches[step]]

    @property
    def unusable(self) -> set[TrajectoryId]:
        """Refused on arrival."""
        return {identity for identity in self.made if self.received[identity].verdict in UNUSABLE}

    @property
    def buffered(self) -> set[TrajectoryId]:
        """Waiting for their batch."""
        return self.made - set(self.trained) - set(self.dropped) - self.unusable

    def trajectory(self, identity: TrajectoryId) -> Trajectory:
        """Return what was sampled."""
        return decode_trajectory(self.records[identity])

    def by_attempt(self) -> dict[tuple[int, int], Trajectory]:
        """Return the trained trajectories by (group, attempt)."""
        found = {}
        for identity in self.trained:
            attempt = self.received[identity].attempt
            found[attempt.group, attempt.attempt] = self.trajectory(identity)
        return found

    def take(self, event: events.AnyEvent, record: bytes) -> None:
        """Follow one event."""
        match event:
            case events.Received(identity=identity):
                assert identity not in self.received, f"{identity} is in the log twice"
                self.received[identity], self.records[identity] = event, record
                assert decode_trajectory(record).identity == identity
            case events.Trained(step=step, identities=identities):
                assert step == len(self.batches), f"batch {step} follows batch {len(self.batches) - 1}"
                self.batches[step] = identities
            case events.RolledBack(step=step):
                self.rollbacks.append(step)
                self.batches = {n: batch for n, batch in self.batches.items() if n < step}
            case events.Dropped(identities=identities, reason=reason):
                self.dropped.update(dict.fromkeys(identities, reason))
            case events.GaveUp(identities=identities):
                self.dropped.update(dict.fromkeys(identities, "given_up"))
            case events.Quarantined():
                self.quarantined += 1
            case events.GroupOpened(group=group, task=task, size=size):
                self.opened.append(group)
                self.sizes.append(size)
                self.posed.append(task)
            case events.Published(update=update):
                self.steps[update.version.serial] = update.version.step


def read_books(folder: Path) -> Books:
    """Read the log of a run folder."""
    books = Books()
    for entry in read_events(folder / "trajectories"):
        books.take(entry.event, entry.record)
    return books


def sizes_of(books: Books, config: RunConfig) -> list[int]:
    """Return how many episodes each group has."""
    return [size or config.batch.group_size for size in books.sizes]


def check_books(books: Books, config: RunConfig) -> None:
    """Nothing received is lost, nothing is trained twice, no task is skipped or repeated."""
    trained, sizes = books.trained, sizes_of(books, config)
    assert len(trained) == len(set(trained)), "a trajectory was trained twice"
    assert set(trained) <= books.made, "something was trained that never arrived"
    assert not set(trained) & set(books.dropped), "a dropped trajectory was trained"
    assert not set(trained) & books.unusable, "a refused trajectory was trained"
    fates = [set(trained), books.buffered, set(books.dropped), books.unusable]
    assert len(books.made) == sum(map(len, fates))
    attempts = [books.received[identity].attempt for identity in trained]
    slots = {(attempt.group, attempt.attempt) for attempt in attempts}
    assert len(slots) == len(trained), "an attempt was trained twice"
    for step, batch in books.batches.items():
        groups = Counter(books.received[identity].attempt.group for identity in batch)
        assert len(groups) == config.batch.groups
        assert groups == {group: sizes[group] for group in groups}, (
            f"batch {step} is not of whole groups: {groups}"
        )
    assert books.opened == list(range(len(books.opened))), "a task was skipped when groups were opened"
    # A curriculum passes tasks over that are far from its band, and goes back to none.
    assert books.posed == (sorted(set(books.posed)) if config.curriculum.enabled else books.opened)
    for identity in books.made:
        attempt = books.received[identity].attempt
        assert attempt.group < len(books.opened)
        assert attempt.task == books.posed[attempt.group]
    _check_senders(books)


def _check_senders(books: Books) -> None:
    """An actor numbers its trajectories one by one: a hole would be one that was made and lost."""
    numbers: dict[tuple[str, int], list[int]] = {}
    for identity in books.received:
        numbers.setdefault((identity.actor, identity.epoch), []).append(identity.seq)
    if books.quarantined == 0:
        for sender, seqs in numbers.items():
            assert sorted(seqs) == list(range(min(seqs), max(seqs) + 1)), f"{sender} lost some of {seqs}"


def check_finished(folder: Path, config: RunConfig) -> Books:
    """Check a run that has ended well: books, summary, rows, spools; return its books."""
    books = read_books(folder)
    check_books(books, config)
    assert sorted(books.batches) == list(range(config.steps))
    groups = {books.received[identity].attempt.group for identity in books.trained}
    status = json.loads((folder / "status.json").read_text())["books"]
    kept = {books.received[identity].attempt.group for identity in books.buffered}
    filtered = sum(reason == "filtered" for reason in books.dropped.values())
    sizes = sizes_of(books, config)
    owed = sum(sizes) - sum(sizes[group] for group in groups) - len(books.buffered) - filtered
    assert status["leased"] + status["waiting"] == owed, "an opened task is neither trained, kept nor owed"
    assert not groups & kept
    assert status["made"] == len(books.made) + books.quarantined
    assert status["trained"] == len(books.trained)
    assert status["buffered"] == len(books.buffered)
    left_out = ("dropped_by_slip", "filtered", "given_up")
    assert sum(status[fate] for fate in left_out) == len(books.dropped)
    assert status["quarantined"] == books.quarantined
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == config.steps
    assert summary["trajectories"] == len(books.trained)
    assert (folder / "learning_curve.png").stat().st_size > 0
    rows = rows_of(read_rows(folder), "train")
    assert [row["step"] for row in rows] == list(range(1, config.steps + 1))
    due = {step for step in range(config.steps + 1) if step % config.evaluation.every == 0} | {config.steps}
    assert {int(row["step"]) for row in rows_of(read_rows(folder), "evaluation")} == due
    for path in spools_in(folder / "spool"):
        spool = Spool(path)
        left = {decode_trajectory(payload).identity for _, payload in spool.pending()}
        spool.close()
        assert left <= set(books.received), "a spool holds what never arrived"
    return books
