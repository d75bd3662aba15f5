"""Floor 3. An actor's unacknowledged trajectories on disk, so that kill -9 loses none.

One file of records (records.py): the payload is a trajectory's record, `seq` counts up for the life of
the file. Acknowledged
records stay until the file holds nothing else or mostly dead bytes; sent again after a crash, the hub
knows them by identity.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from slipstream.errors import RunFolderError, StorageError
from slipstream.messages import Buffer
from slipstream.records import HEAD, Record, pack, scan, sync, write_all
from slipstream.records import payload as payload_of

_CLEAN_UP_BYTES = 4 << 20


class Spool:
    """The append-only file of one actor.

    Example: ``seq = spool.append(spool.next_seq, [b"record"]); spool.acknowledge([seq])``.
    """

    def __init__(
        self, path: Path, *, durability: Literal["process", "power"] = "process", limit_bytes: int = 1 << 30
    ) -> None:
        """Open or create the file and recover what it holds.

        Raises RunFolderError when another process holds the file.
        """
        self.path = path
        self.notes: list[str] = []
        """What recovery had to do, one sentence each."""
        self._durability, self._limit = durability, limit_bytes
        self._pending: dict[int, Record] = {}
        self.next_seq = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._size, self._live = 0, 0
        self._recover()
        self._live = sum(HEAD.size + record.length for record in self._pending.values())

    def append(self, seq: int, payload: Sequence[Buffer], checked: Sequence[Buffer] = ()) -> int:
        """Make one record durable and return its `seq`; `checked` frames (records.pack) end its payload.

        Raises StorageError when the cap would be exceeded (nothing is written) or the disk fails.
        """
        assert seq == self.next_seq, "the spool numbers its records itself"
        size = HEAD.size + sum(map(len, payload)) + sum(map(len, checked))
        if not self.has_room(size - HEAD.size):
            raise StorageError(
                f"{self.path}: the spool holds {self._size} of {self._limit} bytes and cannot take "
                f"{size} more; the hub acknowledges too slowly"
            )
        if self._size + size > self._limit:
            self._compact()
        write_all(self._file, pack(seq, payload, checked), self.path)
        if self._durability == "power":
            sync(self._file, self.path)
        self._pending[seq] = Record(offset=self._size, seq=seq, length=size - HEAD.size)
        self._size += size
        self._live += size
        self.next_seq = seq + 1
        return seq

    def has_room(self, payload_bytes: int) -> bool:
        """Return whether a record of this size fits beside the unacknowledged ones."""
        return self._live + HEAD.size + payload_bytes <= self._limit

    def acknowledge(self, seqs: Iterable[int]) -> None:
        """Forget records; the file shrinks once nothing, or little, of it is still needed."""
        for seq in seqs:
            record = self._pending.pop(seq, None)
            self._live -= HEAD.size + record.length if record else 0
        if not self._pending and self._size >= min(_CLEAN_UP_BYTES, self._limit):
            self._truncate(0)

    def pending(self) -> Iterator[tuple[int, bytes]]:
        """Yield (seq, payload) of every unacknowledged record, oldest first."""
        for seq in self.pending_seqs():
            if seq in self._pending:
                yield seq, self.read(seq)

    def pending_seqs(self) -> list[int]:
        """Return the numbers of the unacknowledged records, oldest first."""
        return sorted(self._pending)

    def read(self, seq: int) -> bytes:
        """Return the payload of an unacknowledged record."""
        record = self._pending[seq]
        return os.pread(self._file, record.length, record.offset + HEAD.size)

    def __len__(self) -> int:
        """Return the number of unacknowledged records."""
        return len(self._pending)

    def __contains__(self, seq: int) -> bool:
        """Return whether a record is unacknowledged."""
        return seq in self._pending

    def close(self) -> None:
        """Close the file, and remove it when everything in it is acknowledged."""
        if not self._pending:
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        os.close(self._lock)

    def _take_lock(self) -> int:
        lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise RunFolderError(f"{self.path}: another process uses this spool; stop it or give this actor "
                                 f"another name") from error  # fmt: skip
        return lock

    def _recover(self) -> None:
        self._size = os.fstat(self._file).st_size
        if self._size == 0:
            return
        with mmap.mmap(self._file, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as data:
            found = scan(data)
            if found.damage:
                self._quarantine(found.records, data)
                return
        self._pending = {record.seq: record for record in found.records}
        self.next_seq = max(self._pending, default=-1) + 1
        if found.torn:
            self._truncate(self._size - found.torn)
            self.notes.append(f"{self.path}: cut {found.torn} bytes of a record torn by a crash")

    def _quarantine(self, records: Sequence[Record], data: Buffer) -> None:
        aside = self.path.with_suffix(".quarantined")
        number = 1
        while aside.exists():
            aside, number = self.path.with_suffix(f".{number}.quarantined"), number + 1
        self.notes.append(f"{self.path}: damaged; kept as {aside.name}, {len(records)} valid records saved")
        old = self.path.rename(aside)
        assert old == aside
        self._rewrite([(record.seq, bytes(payload_of(data, record))) for record in records])

    def _compact(self) -> None:
        self._rewrite(list(self.pending()))

    def _rewrite(self, records: Sequence[tuple[int, bytes]]) -> None:
        """Replace the file by one that holds only these records, atomically."""
        fresh = self.path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        pending: dict[int, Record] = {}
        size = 0
        for seq, body in records:
            pending[seq] = Record(offset=size, seq=seq, length=len(body))
            size += write_all(file, pack(seq, [body]), fresh)
        if self._durability == "power":
            sync(file, fresh)
        fresh.replace(self.path)
        os.close(self._file)
        self._file, self._size, self._pending = file, size, pending
        self.next_seq = max(self.next_seq, max(pending, default=-1) + 1)

    def _truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            raise StorageError(f"{self.path}: truncating failed ({error.strerror})") from error
        self._size = size
