"""Floor 3. An actor's unacknowledged trajectories on disk, so that kill -9 loses none.

Segments `NAME.0`, `NAME.1`, .. hold records (records.py): the payload is a trajectory's record, `seq` counts
up over all segments. A segment whose records are all acknowledged is written over from its beginning:
pages the kernel already holds cost a fraction of new ones. What is acknowledged and not yet written over
may be sent again after a crash; the hub knows it by identity.

    write    the record survives kill -9
    sync     with durability = "power" it also survives a power failure: one fdatasync for all written since
    append   both

After a failed write or sync the kernel may have dropped what it was given: the spool refuses everything
until it is opened again, by a process that recovers what the disk really holds.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from slipstream.errors import RunFolderError, StorageError
from slipstream.messages import Buffer
from slipstream.records import END, HEAD, Record, Scan, pack, scan, sync, sync_folder, write_at
from slipstream.records import payload as payload_of

SEGMENT_BYTES: Final = 4 << 20
"""Size from which the next record goes to another segment."""
_RESET_BYTES: Final = 1 << 20
"""Least bytes of an acknowledged segment worth the system call that empties it."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Segment:
    """One file; `size` bytes of it are in use, `live` of its records unacknowledged."""

    path: Path
    file: int
    size: int = 0
    live: int = 0


class _Disk:
    """Remembers the first failure within its `with` blocks."""

    failure: StorageError | None = None

    def __enter__(self) -> None:
        """Begin to watch."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Take note."""
        if self.failure is None and isinstance(error, StorageError):
            self.failure = error


class Spool:
    """The unacknowledged records of one actor.

    Example: ``seq = spool.append(spool.next_seq, record); spool.acknowledge([seq])``.
    """

    def __init__(
        self, path: Path, *, durability: Literal["process", "power"] = "process", limit_bytes: int = 1 << 30
    ) -> None:
        """Open or create the segments `path`.N and recover what they hold.

        Raises RunFolderError when another process holds them.
        """
        self.path = path
        self.notes: list[str] = []
        """What recovery had to do, one sentence each."""
        self._durability, self._limit = durability, limit_bytes
        self._pending: dict[int, tuple[_Segment, int, int]] = {}
        """seq -> (segment, offset, bytes) of a record's payload."""
        self.next_seq = 0
        self._unsynced: list[_Segment] = []
        self._disk = _Disk()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        self._segments = [_open(known) for known in _segment_paths(path)]
        for segment in list(self._segments):
            self._recover(segment)
        self._live_bytes = sum(HEAD.size + length for _, _, length in self._pending.values())
        self._current = self._segments[-1] if self._segments else self._new_segment()

    def append(self, seq: int, record: Buffer) -> int:
        """Make the record of one trajectory durable and return its `seq`.

        Raises StorageError as `write` and `sync` do.
        """
        self.write(seq, record)
        self.sync()
        return seq

    def write(self, seq: int, record: Buffer) -> int:
        """Write the record of one trajectory and return its `seq`; hand it over only after `sync`.

        Raises StorageError when the cap would be exceeded (nothing is written) or the disk fails.
        """
        self._refuse_after_failure()
        assert seq == self.next_seq, "the spool numbers its records itself"
        size = HEAD.size + len(record)
        if not self.has_room(len(record)):
            raise StorageError(
                f"{self.path}: the spool holds {self._live_bytes} of {self._limit} bytes and cannot take "
                f"{size} more; the hub acknowledges too slowly"
            )
        with self._disk:
            segment = self._current = self._segment_for(size)
            write_at(segment.file, [*pack(seq, [], record), END], segment.size, segment.path)
        if self._durability == "power" and segment not in self._unsynced:
            self._unsynced.append(segment)
        self._pending[seq] = segment, segment.size + HEAD.size, len(record)
        segment.size += size
        segment.live += 1
        self._live_bytes += size
        self.next_seq = seq + 1
        return seq

    def sync(self) -> None:
        """Make everything written so far as durable as was asked for; raises StorageError."""
        self._refuse_after_failure()
        # Taken first: another thread may write meanwhile, and what it writes counts for the next sync.
        segments, self._unsynced = self._unsynced, []
        with self._disk:
            for segment in segments:
                sync(segment.file, segment.path)

    @property
    def must_sync(self) -> bool:
        """Whether records are durable only after `sync`."""
        return self._durability == "power"

    def has_room(self, payload_bytes: int) -> bool:
        """Return whether a record of this size fits beside the unacknowledged ones."""
        return self._live_bytes + HEAD.size + payload_bytes <= self._limit

    def acknowledge(self, seqs: Iterable[int]) -> None:
        """Forget records; a segment that is left without any will be written over; raises StorageError."""
        self._refuse_after_failure()
        for seq in seqs:
            if seq not in self._pending:
                continue
            segment, _, length = self._pending.pop(seq)
            self._live_bytes -= HEAD.size + length
            segment.live -= 1
            if not segment.live and (segment is not self._current or segment.size >= _RESET_BYTES):
                with self._disk:
                    write_at(segment.file, [END], 0, segment.path)
                segment.size = 0

    def read(self, seq: int) -> bytes:
        """Return the payload of an unacknowledged record; raises StorageError after a failure."""
        self._refuse_after_failure()
        segment, offset, length = self._pending[seq]
        return os.pread(segment.file, length, offset)

    def pending(self) -> Iterator[tuple[int, bytes]]:
        """Yield (seq, payload) of every unacknowledged record, oldest first."""
        for seq in self.pending_seqs():
            if seq in self._pending:
                yield seq, self.read(seq)

    def pending_seqs(self) -> list[int]:
        """Return the numbers of the unacknowledged records, oldest first."""
        return sorted(self._pending)

    def __len__(self) -> int:
        """Return how many records are unacknowledged."""
        return len(self._pending)

    def __contains__(self, seq: int) -> bool:
        """Return whether a record is unacknowledged."""
        return seq in self._pending

    def close(self) -> None:
        """Close the segments, and remove them when everything is acknowledged."""
        for segment in self._segments:
            if not self._pending and self._disk.failure is None:
                segment.path.unlink(missing_ok=True)
            os.close(segment.file)
        os.close(self._lock)

    def _refuse_after_failure(self) -> None:
        if self._disk.failure is not None:
            raise StorageError(f"{self._disk.failure}; until then the spool takes and gives nothing")

    def _segment_for(self, size: int) -> _Segment:
        """Return a segment with room; a record larger than a segment gets one for itself."""
        current = self._current
        if not current.size or current.size + size <= SEGMENT_BYTES:
            return current
        return next((segment for segment in self._segments if not segment.size), None) or self._new_segment()

    def _new_segment(self) -> _Segment:
        numbers = [_number(segment.path) for segment in self._segments]
        segment = _open(Path(f"{self.path}.{max(numbers, default=-1) + 1}"))
        if self._durability == "power":
            sync_folder(self.path.parent)
        self._segments.append(segment)
        return segment

    def _take_lock(self) -> int:
        lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise RunFolderError(f"{self.path}: another process uses this spool; stop it or give this actor "
                                 f"another name") from error  # fmt: skip
        return lock

    def _recover(self, segment: _Segment) -> None:
        bytes_there = os.fstat(segment.file).st_size
        if bytes_there == 0:
            return
        with mmap.mmap(segment.file, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as data:
            found = scan(data, ends_at_zeros=True)
            saved = [(record.seq, bytes(payload_of(data, record))) for record in found.records]
            clean = bytes(data[_end(found) : _end(found) + HEAD.size]) in (b"", END)
        # Without a valid record behind it, what is no record was being written when the actor died.
        if any(end < bytes_there for _, end in found.damage):
            self._quarantine(segment, saved)
            return
        if not clean:
            cut = bytes_there - _end(found)
            self.notes.append(f"{segment.path}: cut {cut} bytes of a record torn by a crash")
        os.ftruncate(segment.file, _end(found))
        self._hold(segment, found.records)

    def _hold(self, segment: _Segment, records: Sequence[Record]) -> None:
        self._pending |= {
            record.seq: (segment, record.offset + HEAD.size, record.length) for record in records
        }
        segment.size, segment.live = (records[-1].end if records else 0), len(records)
        self.next_seq = max(self.next_seq, *(record.seq + 1 for record in records), 0)

    def _quarantine(self, segment: _Segment, saved: Sequence[tuple[int, bytes]]) -> None:
        """Keep a damaged segment aside and write its valid records anew."""
        aside, number = Path(f"{segment.path}.quarantined"), 1
        while aside.exists():
            aside, number = Path(f"{segment.path}.{number}.quarantined"), number + 1
        self.notes.append(f"{segment.path}: damaged; kept as {aside.name}, {len(saved)} valid records saved")
        # A crash in between finds the damaged segment once more: never neither of the two.
        os.link(segment.path, aside)
        fresh = _open(segment.path.with_suffix(".new"))
        os.ftruncate(fresh.file, 0)
        records, size = list[Record](), 0
        for seq, payload in saved:
            records.append(Record(offset=size, seq=seq, length=len(payload)))
            size += write_at(fresh.file, pack(seq, [payload]), size, fresh.path)
        if self._durability == "power":
            sync(fresh.file, fresh.path)
        fresh.path.replace(segment.path)
        if self._durability == "power":
            sync_folder(self.path.parent)
        os.close(segment.file)
        segment.file = fresh.file
        self._hold(segment, records)


def spools_in(folder: Path) -> list[Path]:
    """Return the spools whose segments lie in a folder, as paths for `Spool`."""
    return sorted({path.with_suffix("") for path in folder.glob("*.[0-9]*") if path.suffix[1:].isdigit()})


def _open(path: Path) -> _Segment:
    try:
        return _Segment(path=path, file=os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise StorageError(
            f"{path}: opening failed ({error.strerror}); free space or repair the disk"
        ) from error


def _segment_paths(path: Path) -> list[Path]:
    found = [known for known in path.parent.glob(f"{path.name}.*") if known.suffix[1:].isdigit()]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.suffix[1:])


def _end(found: Scan) -> int:
    return found.records[-1].end if found.records else 0
