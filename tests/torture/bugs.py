"""Bugs that the rig must catch, planted into the processes of a run: nothing of them is in the product.

Each is what somebody could write in good faith. `CAUGHT_BY` names the quick test that fails with it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import google_crc32c

import slipstream.transport.actor_client as actor_client
from slipstream import (
    checkpoint,
    deadlines,
    hub,
    ingest,
    leases,
    ledger,
    ledger_state,
    records,
    seen,
    spool,
    wire,
)
from slipstream import messages as m
from slipstream.errors import StorageError
from slipstream.transport.actor_core import ActorCore

CAUGHT_BY: dict[str, str] = {
    "acknowledged_before_the_flush": "hub_kills",
    "no_dedupe": "cuts",
    "no_check_of_the_bytes": "flips",
    "no_resending": "cuts",
    "credit_leaks": "calm",
    "unproven_weights_accepted": "calm",
    "quarantine_forgets": "calm",
    "leases_of_the_dead_are_lost": "actor_kills",
    "rollback_ignored": "learner_kills",
    "watermark_outside_the_checkpoint": "learner_kills",
    "old_epoch_not_fenced": "clones",
    "wait_without_a_deadline": "silence",
    "torn_tail_trusted": "points_of_the_log",
    "spool_promises_before_it_writes": "points_of_the_spool",
    "checkpoint_not_atomic": "points_of_the_checkpoint",
    "failed_sync_tried_again": "failures_of_the_spool",
    "log_never_synced": "power_of_the_log",
    "new_segment_without_its_folder": "power_of_the_spool",
    "checkpoint_renamed_before_its_files": "power_of_the_checkpoint",
}


def plant(name: str) -> None:
    """Plant a bug into this process; "" plants none."""
    if name:
        assert name in CAUGHT_BY, name
        globals()[name]()


def acknowledged_before_the_flush() -> None:
    """Answers go out before the log is written: every 32nd turn writes it."""
    flush, turns = ledger.Ledger.flush, itertools.count(1)

    def flushing(self: ledger.Ledger) -> None:
        if next(turns) % 32 == 0:
            flush(self)

    ledger.Ledger.flush = flushing


def no_dedupe() -> None:
    """The hub does not look whether it has a trajectory already."""

    _always(seen.Seen, "__contains__", False)


def no_check_of_the_bytes() -> None:
    """Neither messages nor records are compared with their checks."""
    real = m.decode_message

    def decode(frame: m.Buffer) -> m.AnyMessage:
        body = bytes(frame[:-4])
        return real(body + google_crc32c.value(body).to_bytes(4, "little"))

    def check(record: m.Buffer) -> Any:
        body = bytes(record[:-4])
        return wire._check_in_python(body + google_crc32c.value(body).to_bytes(4, "little"))

    wire._check = check
    for module in list(sys.modules.values()):
        if getattr(module, "decode_message", None) is real:
            module.decode_message = decode


def no_resending() -> None:
    """What was on the way when the hub died stays in the spool."""
    real, sent = ActorCore._take_welcome, set[int]()

    def take(self: ActorCore, message: m.Welcome) -> None:
        sent.update(self._on_the_way)
        real(self, message)
        self._queue = deque(seq for seq in self._queue if seq not in sent)

    ActorCore._take_welcome = take


def credit_leaks() -> None:
    """An acknowledgement gives no credit back."""

    def acknowledged(self: ActorCore, seqs: Sequence[int]) -> None:
        self._spool.acknowledge(seqs)
        for seq in seqs:
            self._records.pop(seq, None)
            self._held.discard(self._leases.pop(seq, None))

    ActorCore._acknowledged = acknowledged


def unproven_weights_accepted() -> None:
    """Every version counts as proven."""
    _always(ledger_state.LedgerState, "is_proven", True)


def quarantine_forgets() -> None:
    """What is no trajectory is counted and thrown away."""
    _always(hub, "quarantine_in", lambda _: "gone.bin")


def leases_of_the_dead_are_lost() -> None:
    """A released episode is not owed any more, as far as the desk is concerned."""

    def release(self: leases.LeaseDesk, slot: Any, issue: int | None = None) -> None:
        held = self.leased.get(slot)
        if held is not None and issue in (None, held[1].issue):
            self.leased[slot] = ("nobody", held[1])

    leases.LeaseDesk.release = release


def rollback_ignored() -> None:
    """Batches that a rolled back learner must train again leave the line, and do not return to the buffer."""

    def rolled_back(self: ledger_state.LedgerState, step: int) -> None:
        for undone in sorted(number for number in self.batches if number >= step):
            del self.batches[undone]

    ledger_state.LedgerState._rolled_back = rolled_back


def watermark_outside_the_checkpoint() -> None:
    """How far training got is kept in a file beside the checkpoints, and believed."""
    from slipstream.transport import learner_client

    mark = Path(os.environ["SLIPSTREAM_TORTURE_MARK"])
    connect, pull = learner_client.LearnerClient.connect, learner_client.LearnerClient.pull

    def connecting(self: Any, step: int, history: str = "") -> Any:
        return connect(self, max(step, int(mark.read_text()) if mark.exists() else 0), history)

    def pulling(self: Any, step: int, timeout_s: float | None = None) -> Any:
        batch = pull(self, step, timeout_s)
        mark.write_text(str(step + 1))
        return batch

    learner_client.LearnerClient.connect = connecting
    learner_client.LearnerClient.pull = pulling


def old_epoch_not_fenced() -> None:
    """Whoever was let in once stays in, whoever takes its name."""
    real = ledger.Ledger._hello

    def hello(self: ledger.Ledger, peer: bytes, message: m.Hello, now: float) -> Any:
        before = dict(self._peers)
        replies = real(self, peer, message, now)
        self._peers = {**before, **self._peers}
        self._replaced.clear()
        return replies

    ledger.Ledger._hello = hello


def wait_without_a_deadline() -> None:
    """Nobody gives a silent hub up."""
    _always(deadlines.Deadline, "check", None)
    _always(deadlines.Deadline, "expired", False)
    _always(deadlines.Waits, "check", None)

    async def within(awaitable: Any, *_: Any) -> Any:
        return await awaitable

    actor_client.within = within


def torn_tail_trusted() -> None:
    """A record counts as whole when its head is."""

    def record_at(view: memoryview, offset: int, least: int) -> records.Record | None:
        if offset + records.HEAD.size > len(view):
            return None
        length, _, seq = records.HEAD.unpack_from(view, offset)
        if length == 0 or seq < least:
            return None
        return records.Record(
            offset=offset, seq=seq, length=min(length, len(view) - offset - records.HEAD.size)
        )

    records._record_at = record_at


def spool_promises_before_it_writes() -> None:
    """The spool keeps a record in memory and writes it with the next one."""
    real, kept = spool.write_at, list[Any]()

    def write_at(file: int, buffers: Any, offset: int, path: object) -> int:
        for late in kept:
            real(*late)
        kept[:] = [(file, [bytes(each) for each in buffers], offset, path)]
        return sum(map(len, buffers))

    spool.write_at = write_at


def checkpoint_not_atomic() -> None:
    """Files are written where they will be found, and the manifest is not looked at."""

    def publish(target: Path, write: Callable[[Path], None], notes: Any) -> None:
        target.mkdir(parents=True, exist_ok=True)
        write(target)
        (target / checkpoint.MANIFEST).write_text(
            json.dumps({"format": checkpoint.FORMAT, **notes, "files": {}})
        )

    checkpoint.publish = publish
    _always(checkpoint, "verify", {"files": {}})


def failed_sync_tried_again() -> None:
    """A failed fdatasync is tried again until it says yes."""

    def sync(file: int, path: object) -> None:
        for _ in range(3):
            try:
                return os.fdatasync(file)
            except OSError as error:
                kept = error
        raise StorageError(f"{path}: fdatasync failed ({kept.strerror})")

    spool.sync = sync


def log_never_synced() -> None:
    """The log leaves to the kernel when its bytes reach the disk."""
    _always(ingest, "sync", None)


def new_segment_without_its_folder() -> None:
    """A new segment of the spool is synced, its name is not."""
    _always(spool, "sync_folder", None)


def checkpoint_renamed_before_its_files() -> None:
    """The folder gets its name before its files are on the disk."""
    _always(checkpoint, "_sync_file", None)


def _always(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, lambda *_, **__: value)
