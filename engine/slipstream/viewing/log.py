"""Floor 5. The hub's log for a reader that follows it: what is new, what is missing, one record by its place.

Segments may be removed at the front and grow at the end while they are read. Of a closed segment its index
says where records begin, so that nobody reads through the trajectories to find them; their own checksums are
checked when one is looked at.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from slipstream.errors import FrameError, RunFolderError
from slipstream.events import AnyEvent, decode_event
from slipstream.ingest import record_offsets
from slipstream.records import HEAD, scan

_U32: Final = struct.Struct("<I")
_MOST_NOTES: Final = 20
_OPEN_FILES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a record of the log begins; written `segment.offset`."""

    segment: int
    offset: int

    def __str__(self) -> str:
        return f"{self.segment}.{self.offset}"

    @classmethod
    def of(cls, text: str) -> Place:
        """Read what `str` wrote; raises ValueError for anything else."""
        segment, found, offset = text.partition(".")
        if not (found and segment.isascii() and segment.isdigit() and offset.isascii() and offset.isdigit()):
            raise ValueError(f"expected SEGMENT.OFFSET, got {text[:40]!r}")
        return cls(segment=int(segment), offset=int(offset))


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One event of the log."""

    place: Place
    event: AnyEvent
    record: memoryview
    """The trajectory's record behind Received, else empty; a view, gone when the next event is asked for."""


class LogReader:
    """Follows a log from its first segment on.

    Example: ``for found in reader.fresh(): ...``, again and again; ``reader.record(place)``.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet, and nothing has to be there."""
        self._folder = folder
        self._segment = self._offset = -1
        self.notes: list[str] = []
        """What is missing or damaged, one sentence each."""
        self.bytes_read = 0
        self._files: dict[int, int] = {}

    @property
    def bytes_there(self) -> int:
        """Bytes of all segments that are there now, read or not."""
        return sum(size for _, size in self._sizes())

    @property
    def at_end(self) -> bool:
        """Whether everything that was there a moment ago has been read."""
        sizes = self._sizes()
        return not sizes or (self._segment, self._offset) >= sizes[-1]

    def fresh(self) -> Iterator[Found]:
        """Yield what has not been read yet, up to the present end; a torn end is left for later."""
        while self._open_next():
            path = self._path(self._segment)
            try:
                with path.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if size > self._offset:
                        yield from self._of_segment(file.fileno(), size)
            except FileNotFoundError:
                self._note(f"{path.name} was removed while it was read.")
            if not self._path(self._segment + 1).exists():
                return

    def record(self, place: Place) -> bytes:
        """Return the trajectory's record of a Received event; raises RunFolderError when it is not there."""
        name = self._path(place.segment).name
        try:
            file = self._file(place.segment)
            length, _, _, event_bytes = struct.unpack(
                "<IIQI", os.pread(file, HEAD.size + _U32.size, place.offset)
            )
            start = _U32.size + event_bytes
            if start >= length or place.offset + HEAD.size + length > os.fstat(file).st_size:
                raise RunFolderError(f"{name} holds no trajectory at offset {place.offset}")
            return os.pread(file, length - start, place.offset + HEAD.size + start)
        except FileNotFoundError:
            raise RunFolderError(f"{name} is gone: hub.retain_bytes keeps only the newest") from None
        except (struct.error, OSError, OverflowError) as error:
            raise RunFolderError(f"{name} cannot be read at offset {place.offset}: {error}") from None

    def _file(self, segment: int) -> int:
        """Return a segment's open file; a few stay open, also when their names are removed."""
        if segment not in self._files:
            self._files[segment] = os.open(self._path(segment), os.O_RDONLY | os.O_CLOEXEC)
            while len(self._files) > _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
        return self._files[segment]

    def _open_next(self) -> bool:
        """Go to the next segment when this one is read; return whether there is one to read."""
        sizes = self._sizes()
        if not sizes:
            return False
        numbers = [number for number, _ in sizes]
        if self._segment < 0:
            self._segment, self._offset = numbers[0], 0
            if numbers[0]:
                self._note(f"The log begins with segment {numbers[0]}: older ones were removed "
                           f"(hub.retain_bytes), and their episodes are not shown.")  # fmt: skip
            return True
        later = [number for number in numbers if number > self._segment]
        known = dict(sizes).get(self._segment)
        if later and (known is None or self._offset >= known):
            if later[0] > self._segment + 1:
                self._note(f"Segments {self._segment + 1} to {later[0] - 1} of the log are missing.")
            self._segment, self._offset = later[0], 0
        return True

    def _of_segment(self, file: int, size: int) -> Iterator[Found]:
        with mmap.mmap(file, size, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as data:
            for offset in self._offsets(data, size):
                end = offset + HEAD.size + HEAD.unpack_from(data, offset)[0]
                # Views are let go before the file is, also when nobody asks for what is left.
                with data[offset + HEAD.size : end] as body:
                    found = self._found(body, Place(segment=self._segment, offset=offset))
                    self._advance(end)
                    if found is not None:
                        with found.record:
                            yield found
            if self._path(self._segment + 1).exists() and self._offset < size:
                self._note(
                    f"{self._path(self._segment).name}: the last {size - self._offset} bytes are no event."
                )
                self._advance(size)

    def _offsets(self, data: memoryview, size: int) -> Iterator[int]:
        """Yield where the whole records behind the last read one begin."""
        if self._path(self._segment).with_suffix(".index").exists():
            offsets = record_offsets(self._path(self._segment).parent, self._segment)
            for offset in offsets[offsets >= self._offset].tolist():
                if offset + HEAD.size > size or offset + HEAD.size + HEAD.unpack_from(data, offset)[0] > size:
                    break
                yield offset
            return
        start = self._offset
        with data[start:size] as rest:
            seen = scan(rest)
        name = self._path(self._segment).name
        for left, right in seen.damage:
            self._note(f"{name}: {right - left} bytes at offset {start + left} are damaged.")
        yield from (start + record.offset for record in seen.records)

    def _found(self, body: memoryview, place: Place) -> Found | None:
        try:
            split = _U32.size + _U32.unpack_from(body)[0]
            event = decode_event(bytes(body[_U32.size : split]))
        except (FrameError, struct.error) as error:
            self._note(f"{self._path(place.segment).name}: no event at offset {place.offset} ({error}).")
            return None
        return Found(place=place, event=event, record=body[split:])

    def _advance(self, offset: int) -> None:
        self.bytes_read += offset - self._offset
        self._offset = offset

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes and len(self.notes) < _MOST_NOTES:
            self.notes.append(sentence)

    def _sizes(self) -> list[tuple[int, int]]:
        """Return (number, bytes) of each segment, in order."""
        found = []
        for path in self._folder.glob("*.log"):
            try:
                if path.stem.isdigit():
                    found.append((int(path.stem), path.stat().st_size))
            except FileNotFoundError:
                continue
        return sorted(found)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.log"
