"""The audit on logs written event by event: what is planted in them is counted, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest

from slipstream import events, synthetic
from slipstream.audit import audit
from slipstream.config import BatchConfig, RunConfig
from slipstream.ingest import IngestLog
from slipstream.ledger_snapshot import snapshot
from slipstream.ledger_state import LedgerState
from slipstream.receiving import Verdict, describe
from slipstream.spool import Spool
from slipstream.types import Split, TaskAttempt, Trajectory, TrajectoryId
from slipstream.wire import encode_trajectory, inspect_trajectory

GROUP = 4


def identity(seq: int, *, epoch: int = 0, actor: str = "a") -> TrajectoryId:
    return TrajectoryId(run="run", actor=actor, epoch=epoch, seq=seq)


def made(known: TrajectoryId, slot: int) -> Trajectory:
    """Return a trajectory that answers the attempt of a slot, groups of GROUP."""
    group, attempt = divmod(slot, GROUP)
    return dataclasses.replace(
        synthetic.trajectory(),
        identity=known,
        attempt=TaskAttempt(task=group, seed=1, group=group, attempt=attempt),
    )


class Log:
    """A log to plant things in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = IngestLog(folder / "trajectories")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    def say(self, *said: events.Event) -> None:
        for event in said:
            self._log.append(event)

    def join(self, *, epoch: int = 0, session: str = "s", actor: str = "a") -> None:
        self.say(events.Epoch(actor=actor, epoch=epoch, session=session))

    def receive(
        self, known: TrajectoryId, slot: int | None = None, verdict: Verdict = "buffered"
    ) -> TrajectoryId:
        record = encode_trajectory(made(known, known.seq if slot is None else slot))
        self._log.append(describe(inspect_trajectory(record), verdict), record)
        return known

    def receive_all(self, seqs: Iterable[int], *, epoch: int = 0) -> list[TrajectoryId]:
        return [self.receive(identity(seq, epoch=epoch)) for seq in seqs]

    def train(self, step: int, identities: Iterable[TrajectoryId]) -> None:
        self.say(events.Trained(step=step, identities=tuple(identities)))


@pytest.fixture
def log(tmp_path: Path) -> Iterable[Log]:
    with Log(tmp_path) as log:
        log.join()
        yield log


def counts(log: Log) -> tuple[int, int]:
    """Return what is lost and doubled."""
    log._log.flush()
    found = audit(log.folder)
    assert bool(found.findings) == bool(found.lost or found.doubled), found
    return found.lost, found.doubled


def test_an_empty_folder_and_a_log_of_every_fate_are_well(log: Log, tmp_path: Path) -> None:
    assert audit(tmp_path / "none") == audit(tmp_path)
    first, second = log.receive_all(range(4)), log.receive_all(range(4, 8))
    log.train(0, first)
    log.train(1, second)
    log.say(events.RolledBack(step=1))
    third = log.receive_all(range(8, 12))
    log.say(events.Dropped(identities=tuple(third), reason="dropped_by_slip"))
    log.train(1, second)
    log.receive(identity(12), slot=1, verdict="duplicate")
    log.receive(identity(13), slot=8)  # the attempt that was dropped, again
    log.receive_all(range(14, 16))
    assert counts(log) == (0, 0)


def test_a_number_that_is_nowhere_is_lost(log: Log) -> None:
    log.receive_all([0, 1, 3, 5, 6])
    assert counts(log) == (2, 0)


def test_what_a_spool_or_a_quarantine_holds_is_not_lost(log: Log) -> None:
    log.receive_all([0, 1, 3, 5])
    spool = Spool(log.folder / "spool" / "a")
    spool.append(0, encode_trajectory(made(identity(2), 2)))
    assert counts(log) == (1, 0)
    log.say(events.Quarantined(actor="b", file="x", reason="of another actor"))
    assert counts(log) == (1, 0)
    log.say(events.Quarantined(actor="a", file="x", reason="no trajectory"))
    assert counts(log) == (0, 0)


def test_what_only_a_damaged_segment_of_a_spool_held_is_not_lost(log: Log) -> None:
    log.receive_all([0, 2])
    (log.folder / "spool").mkdir()
    (log.folder / "spool" / "b.0.quarantined").touch()
    assert counts(log) == (1, 0)
    (log.folder / "spool" / "a.0.1.quarantined").touch()
    assert counts(log) == (0, 0)


def test_one_process_numbers_on_over_its_epochs_and_another_begins_anew(log: Log) -> None:
    log.receive_all([0, 1])
    log.join(epoch=1)
    log.receive_all([3], epoch=1)
    assert counts(log) == (1, 0)
    log.join(epoch=2, session="another process")
    log.receive_all([8, 9], epoch=2)
    assert counts(log) == (1, 0)


def test_numbers_below_the_oldest_that_the_log_still_has_are_not_lost(log: Log) -> None:
    log.train(0, [identity(seq) for seq in range(4)])  # their own events were removed with a segment
    log.train(1, log.receive_all(range(5, 9)))
    log.say(events.RolledBack(step=0))
    log.train(0, [identity(seq) for seq in range(4)])
    assert counts(log) == (0, 0)


def buffered(known: TrajectoryId) -> events.Received:
    return describe(inspect_trajectory(encode_trajectory(made(known, known.seq))), "buffered")


def test_a_shortened_log_is_read_from_the_state_it_opens_with(tmp_path: Path) -> None:
    """What was trained before is known by number: it is neither lost nor may it come again."""
    config = RunConfig(batch=BatchConfig(groups=1, group_size=GROUP))
    state = LedgerState(config)
    with Log(tmp_path) as log:
        log._log.opening = lambda: snapshot(state)
        said: list[events.AnyEvent] = [events.Epoch(actor="a", epoch=0, session="s")]
        said += [events.GroupOpened(group=group, task=group, split=Split.TRAIN) for group in range(3)]
        for step in range(2):
            known = tuple(identity(seq) for seq in range(step * GROUP, (step + 1) * GROUP))
            said += [buffered(one) for one in known]
            said.append(events.Trained(step=step, identities=known))
        said += [buffered(identity(9)), events.CheckpointPublished(step=2, oldest=2)]
        log.say(*said)
        for event in said:
            state.apply(event, 0)
        log._log._next_segment()
        log._log.append(events.RolledBack(step=2))
        log._log.flush()
        assert log._log.shorten(None, retain_bytes=0) == 1
        # 8 is missing between what was trained and 9.
        assert counts(log) == (1, 0)
        log.receive(identity(8))
        assert counts(log) == (0, 0)
        log.receive(identity(3), 11)
        assert counts(log) == (0, 1)


def test_a_batch_that_vanishes_without_a_rollback_is_lost(log: Log) -> None:
    log.train(0, log.receive_all(range(4)))
    log.train(0, log.receive_all(range(4, 8)))
    assert counts(log) == (4, 0)


def test_an_attempt_that_takes_the_place_of_another_loses_it(log: Log) -> None:
    log.receive_all([0, 1])
    log.receive(identity(2), slot=1)
    assert counts(log) == (1, 0)


def test_a_trajectory_trained_in_two_batches_is_doubled(log: Log) -> None:
    batch = log.receive_all(range(4))
    log.train(0, batch)
    log.train(1, [*log.receive_all(range(4, 7)), batch[2]])
    assert counts(log) == (0, 1)
    log.say(events.RolledBack(step=0))
    assert counts(log) == (0, 0)


def test_two_trajectories_of_one_attempt_trained_are_doubled(log: Log) -> None:
    log.train(0, log.receive_all(range(4)))
    again = log.receive(identity(4), slot=0)
    log.train(1, [again, *log.receive_all(range(5, 8))])
    assert counts(log) == (0, 1)


def test_a_trajectory_that_was_dropped_and_trained_is_doubled(log: Log) -> None:
    batch = log.receive_all(range(4))
    log.say(events.Dropped(identities=(batch[0],), reason="filtered"))
    log.train(0, batch)
    assert counts(log) == (0, 1)


def test_a_refused_trajectory_that_is_trained_is_doubled(log: Log) -> None:
    log.train(0, [log.receive(identity(0), verdict="unproven"), *log.receive_all(range(1, 4))])
    assert counts(log) == (0, 1)


def test_a_trajectory_received_again_is_doubled(log: Log) -> None:
    log.receive_all([0, 1, 0])
    assert counts(log) == (0, 1)
