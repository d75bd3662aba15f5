"""Floor 3. The hub's append-only log of events (events.py).

The folder holds segments `000000.log`, `000001.log`, .. of records (records.py); `seq` counts on over all
segments. A payload is

    u32 bytes of the event | event (MessagePack, a tagged struct) | after Received: the trajectory's
    record (wire.py)

Every segment but the first opens with a State, what all events before add up to, so that older segments
may be removed (`shorten`). A closed segment has an index `NNNNNN.index` for reading tools, rebuilt when
missing: u64 offset of each record, ascending.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np

from slipstream.errors import FrameError, RunFolderError, StorageError
from slipstream.events import AnyEvent, Event, State, decode_event
from slipstream.messages import Buffer
from slipstream.records import HEAD, Record, Scan, pack, payload, release, reserve, scan, sync, write_all

_U32: Final = struct.Struct("<I")
_ENCODER: Final = msgspec.msgpack.Encoder()
_OFFSET_BITS: Final = 40
_BUFFERED_BYTES: Final = 1 << 20
_RESERVED_BYTES: Final = 8 << 20
"""So far behind its end the open segment holds blocks, once it is larger than a write."""
_SECTOR_BYTES: Final = 512
"""The least that a disk writes as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """One event as the log holds it."""

    position: int
    """Segment number << 40 | offset in the segment."""
    event: AnyEvent
    record: bytes
    """The trajectory's record behind Received, else empty."""


class IngestLog:
    """The writer's end; one process at a time.

    Example: ``position = log.append(event, record); log.flush(); log.read(position)``.
    """

    def __init__(
        self, folder: Path, durability: Literal["process", "power"] = "process", segment_bytes: int = 64 << 20
    ) -> None:
        """Open or create the log; cuts a record torn by a crash.

        Raises StorageError for damage, RunFolderError when another process writes it.
        """
        self.folder = folder
        self.notes: list[str] = []
        """What recovery had to do, one sentence each."""
        self.opening: Callable[[], State] | None = None
        """Gives the state before the next event; without it segments open with their first event."""
        self._durability, self._segment_bytes = durability, segment_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        self._buffered: list[Buffer] = []
        self._buffered_bytes = 0
        self._unflushed = False
        """Something was written, by `read` or in vain, that no flush has made durable."""
        self._readers: dict[int, int] = {}
        self._offsets: list[int] = []
        """Where the records of the open segment begin."""
        self._reserved = 0
        """Where the blocks held for the open segment end."""
        self._first = self._base = self._state_bytes = 0
        """The first segment there is, the newest that opens with a State, and the State of the open one."""
        try:
            self._segment, self._size, self._seq = self._recover()
            self._file = self._open_segment()
        except (OSError, StorageError):
            os.close(self._lock)
            raise

    def append(self, event: Event, record: Buffer = b"") -> int:
        """Add an event, and the checked record of a trajectory, and return its position.

        It is durable after `flush`. Raises StorageError, after which only a restart helps.
        """
        # The State does not count: one larger than a segment would otherwise be written with every event.
        if self._size - self._state_bytes >= self._segment_bytes:
            self._next_segment()
        if self._segment and not self._size and self.opening is not None:
            self._add(self.opening(), b"")
            self._state_bytes = self._size
        return self._add(event, record)

    def _add(self, event: Event, record: Buffer) -> int:
        position = self._segment << _OFFSET_BITS | self._size
        body = _ENCODER.encode(event)
        buffers = pack(self._seq, [_U32.pack(len(body)), body], record)
        size = sum(map(len, buffers))
        self._buffered += buffers
        self._offsets.append(self._size)
        self._buffered_bytes += size
        self._size += size
        self._seq += 1
        if self._buffered_bytes >= _BUFFERED_BYTES:
            self._write()
        return position

    def flush(self) -> None:
        """Make everything appended durable; raises StorageError, after which only a restart helps."""
        if not self._buffered and not self._unflushed:
            return
        self._write()
        if self._durability == "power":
            sync(self._file, self.folder)
        self._unflushed = False

    def read(self, position: int) -> bytes:
        """Return the trajectory's record behind the event at a position."""
        self._write()
        segment, offset = position >> _OFFSET_BITS, position & ((1 << _OFFSET_BITS) - 1)
        if segment not in self._readers:
            self._readers[segment] = os.open(_segment_path(self.folder, segment), os.O_RDONLY)
        file = self._readers[segment]
        length, event_bytes = struct.unpack("<I12xI", os.pread(file, HEAD.size + _U32.size, offset))
        start = _U32.size + event_bytes
        return os.pread(file, length - start, offset + HEAD.size + start)

    def replay(self) -> Iterator[Entry]:
        """Yield the newest State and every event behind it, or all events, without trajectories' records."""
        self._write()
        for number in range(self._base, self._segment + 1):
            yield from _entries(self.folder, number, last=number == self._segment, records=False)

    def check(self, oldest_position: int | None) -> None:
        """Check what `replay` passes over and `read` may be asked for; raises StorageError for damage."""
        start = self._base if oldest_position is None else oldest_position >> _OFFSET_BITS
        if start < self._first:
            raise StorageError(
                f"{_segment_path(self.folder, start)} is missing: it holds trajectories that are still to be "
                f"trained; restore it from a copy, or start a new run folder from the last checkpoint"
            )
        for number in range(start, self._base):
            _checked(self.folder, number, None, last=False)

    def shorten(self, oldest_position: int | None, *, retain_bytes: int) -> int:
        """Remove the oldest segments and return how many.

        Kept are the segments from that of `oldest_position` on (None: nothing is needed), the newest, and
        before them up to `retain_bytes` for reading tools. Call it after `flush`: the state that a kept
        segment opens with must be durable. Raises StorageError.
        """
        if self._buffered or self._unflushed:
            # The caller's state is ahead of the log, after a failure for good: what is durable needs more.
            return 0
        needed = self._segment if oldest_position is None else oldest_position >> _OFFSET_BITS
        # A newest segment that is still empty holds no State yet.
        last = min(needed, self._segment if self._size else self._segment - 1)
        sizes = [_segment_path(self.folder, n).stat().st_size for n in range(self._first, last)]
        removed = 0
        while sizes and sum(sizes) > retain_bytes:
            sizes.pop(0)
            self._remove_first()
            removed += 1
        if removed and self._durability == "power":
            _sync_folder(self.folder)
        return removed

    def _remove_first(self) -> None:
        reader = self._readers.pop(self._first, None)
        if reader is not None:
            os.close(reader)
        _index_path(self.folder, self._first).unlink(missing_ok=True)
        _segment_path(self.folder, self._first).unlink()
        self._first += 1
        self._base = max(self._base, self._first)

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        try:
            release(self._file, self._path)
        finally:
            for file in (self._file, self._lock, *self._readers.values()):
                os.close(file)

    def _write(self) -> None:
        buffers, self._buffered, self._buffered_bytes = self._buffered, [], 0
        if buffers:
            self._unflushed = True
            self._reserve()
            write_all(self._file, buffers, self._path)

    def _reserve(self) -> None:
        """Hold blocks for what is about to be written and follows; a full segment is left without any."""
        end = min(self._size + _RESERVED_BYTES, self._segment_bytes)
        if self._reserved < self._size and self._reserved < end:
            reserve(self._file, self._reserved, end - self._reserved)
            self._reserved = end

    def _next_segment(self) -> None:
        self.flush()
        _write_index(self.folder, self._segment, self._offsets)
        full = self._file
        self._segment, self._size, self._state_bytes, self._offsets = self._segment + 1, 0, 0, []
        self._file = self._open_segment()
        os.close(full)

    def _open_segment(self) -> int:
        self._path = _segment_path(self.folder, self._segment)
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise StorageError(
                f"{self._path}: opening failed ({error.strerror}); free space or repair the disk"
            ) from error
        if self._durability == "power":
            _sync_folder(self.folder)
        self._reserved = max(self._size, _BUFFERED_BYTES)
        return file

    def _recover(self) -> tuple[int, int, int]:
        numbers, seq, size = _segment_numbers(self.folder), 0, 0
        self._first = numbers[0] if numbers else 0
        self._base = next((n for n in reversed(numbers) if _opens_with_state(self.folder, n)), 0)
        if self._first > self._base:
            raise StorageError(
                f"{_segment_path(self.folder, self._first)}: expected the state before it first, got another "
                f"event; restore the segments before it or start a new run folder"
            )
        for number in range(self._base, len(numbers) + self._first):
            path = _segment_path(self.folder, number)
            found = _checked(self.folder, number, seq if number > self._base else None,
                             last=number == numbers[-1])  # fmt: skip
            size = path.stat().st_size - found.torn
            if found.torn:
                os.truncate(path, size)
                self.notes.append(f"{path}: cut {found.torn} bytes of an event torn by a crash")
            seq = found.records[-1].seq + 1 if found.records else seq
            self._state_bytes = found.records[0].end if number == self._base > 0 else 0
            self._offsets = [record.offset for record in found.records]
        return (numbers[-1] if numbers else 0), size, seq


def read_events(folder: Path) -> Iterator[Entry]:
    """Yield every event of a log that may still be written; a torn end is passed over.

    Raises StorageError naming file and offset of damage.
    """
    numbers = _segment_numbers(folder)
    for number in numbers:
        yield from _entries(folder, number, last=number == numbers[-1], records=True)


def record_offsets(folder: Path, segment: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return the [n] offsets of a segment's records, from its index or, without one, from itself."""
    path = _index_path(folder, segment)
    if not path.exists() or not path.stat().st_size:  # a power failure may leave it empty
        return np.array([record.offset for record in _scan_segment(folder, segment).records], np.uint64)
    return np.fromfile(path, "<u8")


def _entries(folder: Path, number: int, *, last: bool, records: bool) -> Iterator[Entry]:
    data = _segment_path(folder, number).read_bytes()
    found = _refuse_damage(folder, number, scan(data), last=last)
    for record in found.records:
        body = payload(data, record)
        split = _U32.size + int.from_bytes(body[: _U32.size], "little")
        event = _event_of(data, record, folder, number)
        position = number << _OFFSET_BITS | record.offset
        yield Entry(position=position, event=event, record=bytes(body[split:]) if records else b"")


def _event_of(data: bytes, record: Record, folder: Path, number: int) -> AnyEvent:
    body = payload(data, record)
    try:
        return decode_event(body[_U32.size : _U32.size + int.from_bytes(body[: _U32.size], "little")])
    except FrameError as error:
        raise StorageError(
            f"{_segment_path(folder, number)} at offset {record.offset}: expected an event of this "
            f"version of Slipstream, got {error}; start a new run folder"
        ) from error


def _checked(folder: Path, number: int, seq: int | None, *, last: bool) -> Scan:
    found = _refuse_damage(folder, number, _scan_segment(folder, number), last=last)
    if found.records and seq is not None and found.records[0].seq != seq:
        raise StorageError(
            f"{_segment_path(folder, number)}: expected event {seq} first, got {found.records[0].seq}; "
            f"restore the missing segment or start a new run folder"
        )
    return found


def _opens_with_state(folder: Path, number: int) -> bool:
    """Return whether a segment holds all that events before it add up to."""
    with _segment_path(folder, number).open("rb") as file:
        head = file.read(HEAD.size)
        if len(head) < HEAD.size:
            return False
        end = HEAD.size + HEAD.unpack(head)[0]
        if end > os.fstat(file.fileno()).st_size:
            return False
        file.seek(0)
        data = file.read(end)
    found = scan(data).records
    return bool(found) and isinstance(_event_of(data, found[0], folder, number), State)


def _refuse_damage(folder: Path, number: int, found: Scan, *, last: bool) -> Scan:
    path = _segment_path(folder, number)
    if last and found.damage:
        found = _without_holes(path, found)
    gaps = [
        (a.end, b.offset)
        for a, b in zip(found.records, found.records[1:], strict=False)
        if b.seq != a.seq + 1
    ]
    damage = (
        found.damage
        or tuple(gaps)
        or (((path.stat().st_size - found.torn, 0),) if found.torn and not last else ())
    )
    if damage:
        raise StorageError(
            f"{path} is damaged at offset {damage[0][0]}: expected an event, got other bytes; restore "
            f"the file from a copy, or start a new run folder from the last checkpoint"
        )
    return found


def _without_holes(path: Path, found: Scan) -> Scan:
    """Return what lies before a sector that the disk had not written when the power failed.

    Sectors reach a disk in any order, and one that has not reads as zeros. What is synced has none: so
    neither the hole nor anything behind it was ever acknowledged.
    """
    start, end = found.damage[0]
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(end - start)
    cuts = [0, *range(_SECTOR_BYTES - start % _SECTOR_BYTES, len(data), _SECTOR_BYTES), len(data)]
    if all(any(data[left:right]) for left, right in itertools.pairwise(cuts)):
        return found
    kept = tuple(record for record in found.records if record.offset < start)
    return Scan(records=kept, damage=(), torn=path.stat().st_size - start)


def _scan_segment(folder: Path, number: int) -> Scan:
    path = _segment_path(folder, number)
    if path.stat().st_size == 0:
        return Scan(records=(), damage=(), torn=0)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        memoryview(mapped) as data,
    ):
        return scan(data)


def _write_index(folder: Path, number: int, offsets: Sequence[int]) -> None:
    fresh = _index_path(folder, number).with_suffix(".new")
    try:
        np.array(offsets, "<u8").tofile(fresh)
        fresh.replace(_index_path(folder, number))
    except OSError:
        # Only a convenience: readers do without. Whoever needs the disk says what is wrong with it.
        fresh.unlink(missing_ok=True)


def _segment_numbers(folder: Path) -> list[int]:
    numbers = sorted(int(path.stem) for path in folder.glob("*.log") if path.stem.isdigit())
    if numbers and numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise StorageError(
            f"{folder}: expected segments {numbers[0]} .. {numbers[-1]}, got {numbers}; restore the missing "
            f"ones or start a new run folder"
        )
    return numbers


def _segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.log"


def _index_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.index"


def _lock(folder: Path) -> int:
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise RunFolderError(
            f"{folder}: another hub writes this log; stop it or choose another run folder"
        ) from error
    return lock


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise StorageError(f"{folder}: fsync failed ({error.strerror})") from error
    finally:
        os.close(handle)
