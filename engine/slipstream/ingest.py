"""Floor 3. The hub's append-only log of events (events.py).

The folder holds segments `000000.log`, `000001.log`, .. of records (records.py); `seq` counts on over all
segments. A payload is

    u32 bytes of the event | event (MessagePack, a tagged struct) | after Received: the trajectory's
    record (wire.py)

A closed segment has an index `NNNNNN.index` for reading tools, rebuilt when missing: u64 offset of each
record, ascending.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np

from slipstream.errors import FrameError, RunFolderError, StorageError
from slipstream.events import AnyEvent, Event, decode_event
from slipstream.messages import Buffer
from slipstream.records import HEAD, Scan, pack, payload, scan, sync, write_all

_U32: Final = struct.Struct("<I")
_ENCODER: Final = msgspec.msgpack.Encoder()
_OFFSET_BITS: Final = 40
_BUFFERED_BYTES: Final = 256 << 10


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
        self._durability, self._segment_bytes = durability, segment_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        self._buffered: list[Buffer] = []
        self._buffered_bytes = 0
        self._readers: dict[int, int] = {}
        self._offsets: list[int] = []
        """Where the records of the open segment begin."""
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
        if self._size >= self._segment_bytes:
            self._next_segment()
        position = self._segment << _OFFSET_BITS | self._size
        body = _ENCODER.encode(event)
        buffers = pack(self._seq, [_U32.pack(len(body)) + body], record)
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
        if not self._buffered:
            return
        self._write()
        if self._durability == "power":
            sync(self._file, self.folder)

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
        """Yield every event from the beginning, without the trajectories' records."""
        self._write()
        for number in range(self._segment + 1):
            yield from _entries(self.folder, number, last=number == self._segment, records=False)

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        for file in (self._file, self._lock, *self._readers.values()):
            os.close(file)

    def _write(self) -> None:
        buffers, self._buffered, self._buffered_bytes = self._buffered, [], 0
        if buffers:
            write_all(self._file, buffers, self._path)

    def _next_segment(self) -> None:
        self.flush()
        os.close(self._file)
        _write_index(self.folder, self._segment, self._offsets)
        self._segment, self._size, self._offsets = self._segment + 1, 0, []
        self._file = self._open_segment()

    def _open_segment(self) -> int:
        self._path = _segment_path(self.folder, self._segment)
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if self._durability == "power":
            _sync_folder(self.folder)
        return file

    def _recover(self) -> tuple[int, int, int]:
        numbers, seq, size = _segment_numbers(self.folder), 0, 0
        for number in numbers:
            path = _segment_path(self.folder, number)
            found = _checked(self.folder, number, seq, last=number == numbers[-1])
            size = path.stat().st_size - found.torn
            if found.torn:
                os.truncate(path, size)
                self.notes.append(f"{path}: cut {found.torn} bytes of an event torn by a crash")
            seq = found.records[-1].seq + 1 if found.records else seq
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
    if not path.exists():
        return np.array([record.offset for record in _scan_segment(folder, segment).records], np.uint64)
    return np.fromfile(path, "<u8")


def _entries(folder: Path, number: int, *, last: bool, records: bool) -> Iterator[Entry]:
    data = _segment_path(folder, number).read_bytes()
    found = _refuse_damage(folder, number, scan(data), last=last)
    for record in found.records:
        body = payload(data, record)
        split = _U32.size + int.from_bytes(body[: _U32.size], "little")
        event = _decode(body[_U32.size : split], folder, number, record.offset)
        position = number << _OFFSET_BITS | record.offset
        yield Entry(position=position, event=event, record=bytes(body[split:]) if records else b"")


def _decode(body: memoryview, folder: Path, number: int, offset: int) -> AnyEvent:
    try:
        return decode_event(body)
    except FrameError as error:
        raise StorageError(
            f"{_segment_path(folder, number)} at offset {offset}: expected an event of this version of "
            f"Slipstream, got {error}; start a new run folder"
        ) from error


def _checked(folder: Path, number: int, seq: int, *, last: bool) -> Scan:
    found = _refuse_damage(folder, number, _scan_segment(folder, number), last=last)
    if found.records and found.records[0].seq != seq:
        raise StorageError(
            f"{_segment_path(folder, number)}: expected event {seq} first, got {found.records[0].seq}; "
            f"restore the missing segment or start a new run folder"
        )
    return found


def _refuse_damage(folder: Path, number: int, found: Scan, *, last: bool) -> Scan:
    path = _segment_path(folder, number)
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
    np.array(offsets, "<u8").tofile(fresh)
    fresh.replace(_index_path(folder, number))


def _segment_numbers(folder: Path) -> list[int]:
    numbers = sorted(int(path.stem) for path in folder.glob("*.log") if path.stem.isdigit())
    if numbers != list(range(len(numbers))):
        raise StorageError(
            f"{folder}: expected segments 0 .. {len(numbers) - 1}, got {numbers}; restore the missing "
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
