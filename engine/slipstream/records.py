"""Floor 2. Records of the append-only files (spool, ingest log), integers little-endian:

    u32 length of payload | u32 CRC-32C of (seq, payload) | u64 seq | payload

`seq` grows from record to record of one file. A file that ends inside a record was torn by a crash;
anything else that is not
a record is damage, and the valid records after it can still be found.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import google_crc32c
import numpy as np

from slipstream.errors import StorageError
from slipstream.integrity import crc32c, crc32c_of_checked
from slipstream.messages import Buffer

HEAD: Final = struct.Struct("<IIQ")
END: Final = bytes(HEAD.size)
"""Stands behind the last record of a file that is written over again."""
_SEQ: Final = struct.Struct("<Q")
_MOST_BUFFERS: Final = 512
_SEQ_STRIDE: Final = 1 << 32
_LIBC: Final = ctypes.CDLL(None)
_FALLOC_FL_KEEP_SIZE: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Where one valid record lies."""

    offset: int
    seq: int
    length: int
    """Bytes of the payload."""

    @property
    def end(self) -> int:
        """Offset of the byte after the record."""
        return self.offset + HEAD.size + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What a file holds."""

    records: tuple[Record, ...]
    damage: tuple[tuple[int, int], ...]
    """(offset, end) of each stretch that is no record."""
    torn: int
    """Bytes of an unfinished record at the end."""


def pack(seq: int, payload: Sequence[Buffer], checked: Buffer = b"") -> list[Buffer]:
    """Return the buffers of one record; the payload ends in `checked`, which is not copied.

    `checked` are bytes that end in their own CRC-32C, as the caller knows: it is not computed again.
    """
    before = b"".join(payload)
    check = google_crc32c.value(_SEQ.pack(seq) + before)
    if not checked:
        return [HEAD.pack(len(before), check, seq) + before]
    check = crc32c_of_checked(checked, check)
    return [HEAD.pack(len(before) + len(checked), check, seq) + before, checked]


def scan(data: Buffer, *, ends_at_zeros: bool = False) -> Scan:
    """Return every valid record of a file's bytes, and what is not one.

    With `ends_at_zeros` a head of zeros ends the file: behind it lie bytes of its former use.
    """
    view, records, damage = memoryview(data), list[Record](), list[tuple[int, int]]()
    position = 0
    while position < len(view):
        if ends_at_zeros and view[position : position + HEAD.size] == END:
            break
        least = records[-1].seq + 1 if records else 0
        record = _record_at(view, position, least)
        if record is not None:
            records.append(record)
            position = record.end
            continue
        following = _next_record(view, position, least)
        if following is None:
            torn = _is_torn(view, position)
            damage += [] if torn else [(position, len(view))]
            return Scan(
                records=tuple(records), damage=tuple(damage), torn=len(view) - position if torn else 0
            )
        damage.append((position, following))
        position = following
    return Scan(records=tuple(records), damage=tuple(damage), torn=0)


def payload(data: Buffer, record: Record) -> memoryview:
    """Return a record's payload as a view."""
    return memoryview(data)[record.offset + HEAD.size : record.end]


def write_all(file: int, buffers: Sequence[Buffer], path: object) -> int:
    """Write buffers at the end of a file and return their bytes; raises StorageError (disk full, I/O)."""
    total = sum(map(len, buffers))
    try:
        done = os.writev(file, buffers[:_MOST_BUFFERS])
        pending = list(buffers) if done < total else []
        while pending:
            while pending and done >= len(pending[0]):
                done -= len(pending.pop(0))
            if pending:
                pending[0] = memoryview(pending[0])[done:]
                done = os.writev(file, pending[:_MOST_BUFFERS])
    except OSError as error:
        raise StorageError(
            f"{path}: writing failed ({error.strerror}); free space or repair the disk"
        ) from error
    return total


def write_at(file: int, buffers: Sequence[Buffer], offset: int, path: object) -> int:
    """Write buffers at an offset of a file and return their bytes; raises StorageError (disk full, I/O)."""
    total = sum(map(len, buffers))
    try:
        done = os.pwritev(file, buffers, offset)
        rest = memoryview(b"".join(buffers))[done:] if done < total else b""
        while rest:
            done = os.pwrite(file, rest, offset + total - len(rest))
            rest = rest[done:]
    except OSError as error:
        raise StorageError(
            f"{path}: writing failed ({error.strerror}); free space or repair the disk"
        ) from error
    return total


def reserve(file: int, offset: int, size: int) -> None:
    """Ask the file system for the blocks of a stretch behind a file's end; its size stays as it is.

    On ext4, writing into them takes three quarters of the time on the processor, and a sync two thirds of
    its wait. Where it is not possible nothing happens.
    """
    fallocate = getattr(_LIBC, "fallocate", None)
    if fallocate is not None:
        fallocate(file, _FALLOC_FL_KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(size))


def release(file: int, path: object) -> None:
    """Give back the blocks behind a file's end; raises StorageError, though what was written is safe."""
    try:
        os.ftruncate(file, os.fstat(file).st_size)
    except OSError as error:
        raise StorageError(f"{path}: truncating failed ({error.strerror}); repair the disk") from error


def sync(file: int, path: object) -> None:
    """Force a file's data to the disk; raises StorageError.

    A failure is final, since the kernel may have dropped the pages.
    """
    try:
        os.fdatasync(file)
    except OSError as error:
        raise StorageError(
            f"{path}: fdatasync failed ({error.strerror}); restart this role to replay"
        ) from error


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, so that a new or renamed file is found; raises StorageError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise StorageError(
            f"{folder}: fsync failed ({error.strerror}); restart this role to replay"
        ) from error
    finally:
        os.close(handle)


def _record_at(view: memoryview, offset: int, least: int) -> Record | None:
    if offset + HEAD.size > len(view):
        return None
    length, check, seq = HEAD.unpack_from(view, offset)
    record = Record(offset=offset, seq=seq, length=length)
    if not least <= seq < least + _SEQ_STRIDE or length == 0 or record.end > len(view):
        return None
    body = view[offset + HEAD.size : record.end]
    return record if crc32c([body], crc32c([_SEQ.pack(seq)])) == check else None


def _next_record(view: memoryview, position: int, least: int) -> int | None:
    """Return the offset of the first valid record after a bad one."""
    if position + HEAD.size <= len(view):
        # A damaged payload leaves the length in order: the next record follows it.
        behind = position + HEAD.size + HEAD.unpack_from(view, position)[0]
        if behind < len(view) and _record_at(view, behind, least) is not None:
            return int(behind)
    for offset in _plausible(view, position + 1, least):
        if _record_at(view, offset, least) is not None:
            return offset
    return None


def _plausible(view: memoryview, start: int, least: int) -> list[int]:
    """Return the offsets whose 16 bytes could be a record's head, without computing any checksum."""
    count = len(view) - start - HEAD.size + 1
    if count <= 0:
        return []
    data = np.frombuffer(view[start:], np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(data, HEAD.size)[:count]
    length = windows[:, 0:4].astype(np.uint64) @ (1 << (8 * np.arange(4, dtype=np.uint64)))
    seq_high = windows[:, 12:16].astype(np.uint64) @ (1 << (8 * np.arange(4, dtype=np.uint64)))
    offsets = np.arange(start, start + count, dtype=np.uint64)
    fits = (length > 0) & (offsets + HEAD.size + length <= len(view))
    near = (seq_high >= least >> 32) & (seq_high <= (least >> 32) + 1)
    return [int(offset) for offset in offsets[fits & near]]


def _is_torn(view: memoryview, position: int) -> bool:
    """Return whether the file simply ends inside the record that starts here."""
    if position + HEAD.size > len(view):
        return True
    return bool(position + HEAD.size + HEAD.unpack_from(view, position)[0] > len(view))
