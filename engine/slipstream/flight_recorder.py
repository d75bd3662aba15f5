"""Floor 1. What a process did last, in a memory-mapped ring that survives its death by any signal.

    0      header: magic, u32 pid, u32 slots, f64 when it ended, f64 when it started, u64 birth, boot id, role
    128    u64 events so far, f64 last sign of life
    256    the wait it is in: f64 since, f64 seconds at most, u32 CRC-32 of the text, u16 its bytes, the text
    1024   slots of 192 bytes: u64 number from 1, f64 time, u32 CRC-32 of the text, u16 its bytes, the text

Little-endian. Events have the time of day; signs of life and waits are on the machine's monotonic clock,
which its processes share and nobody sets. A slot or wait that was being written when the process died does
not match its CRC, and is left out. Nothing is ever waited for: the pages belong to the kernel as soon as
they are written, and reach the disk when it likes; after a power failure the ring may be stale.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from slipstream.errors import RunFolderError

FOLDER: Final = "flight"
"""Where the rings of a run's processes lie in its folder."""
SLOTS: Final = 1024
SLOT_BYTES: Final = 192
STACKS: Final = signal.SIGUSR1
"""Makes a recording process write the stacks of all its threads, even while Python is stuck in C."""
_MAGIC: Final = b"SLIPFLT1"
_HEADER: Final = struct.Struct("<8sIIddQ36s48s")
_ENDED: Final = struct.Struct("<d")
_ENDED_AT: Final = 16
_LIFE, _LIFE_AT = struct.Struct("<Qd"), 128
_WAIT, _WAIT_AT = struct.Struct("<ddIH"), 256
_SLOT, _SLOTS_AT = struct.Struct("<QdIH"), 1024
_WAIT_TEXT: Final = _SLOTS_AT - _WAIT_AT - _WAIT.size
_SLOT_TEXT: Final = SLOT_BYTES - _SLOT.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened."""

    time: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A wait that had not ended when it was read."""

    since: float
    """On the monotonic clock."""
    seconds: float
    """At most so long."""
    what: str
    """Who waits for what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """What a ring tells of its process."""

    role: str
    pid: int
    birth: int
    """When the process began, as birth_of gives it; with pid and boot id it names one process."""
    boot: str
    """The boot_id of its machine."""
    started: float
    ended: float
    """0 unless it came to its own end."""
    heard: float
    """The last sign of life, on the monotonic clock."""
    count: int
    """Events so far, those that the ring has lost included."""
    wait: Wait | None
    events: tuple[Event, ...]
    """Oldest first."""


class FlightRecorder:
    """Writes the ring of this process; before `start` everything is a no-op.

    Example: ``FLIGHT.start(folder / "flight" / "hub-0.ring"); FLIGHT.note("batch 7 handed out")``.
    """

    def __init__(self) -> None:
        """Record nothing yet."""
        self._map: mmap.mmap | None = None
        self._count, self._stacks = 0, -1

    def start(self, path: Path) -> None:
        """Record into `path` from now on, named after its role; an earlier process's ring is kept beside it.

        On STACKS the stacks of all threads go into `path` with the suffix .stacks.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.replace(path.with_suffix(".before"))
        # First: whoever finds the ring may ask for stacks, and a signal without a handler kills.
        self._stacks = os.open(path.with_suffix(".stacks"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        faulthandler.register(STACKS, file=self._stacks, all_threads=True)
        size = _SLOTS_AT + SLOTS * SLOT_BYTES
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            # Blocks, not a hole: on a full disk a page without one would end the process by SIGBUS.
            os.posix_fallocate(file, 0, size)
            self._map = mmap.mmap(file, size)
        finally:
            os.close(file)
        self._count = 0
        pid, role = os.getpid(), path.stem.encode()[:48]
        identity = birth_of(pid) or 0, boot_id().encode(), role
        self.beat()
        _HEADER.pack_into(self._map, 0, _MAGIC, pid, SLOTS, 0.0, time.time(), *identity)

    def note(self, text: str) -> None:
        """Add an event; of a long text the beginning is kept."""
        if self._map is None:
            return
        data = text.encode()[:_SLOT_TEXT]
        at = _SLOTS_AT + self._count % SLOTS * SLOT_BYTES
        self._count += 1
        self._map[at + _SLOT.size : at + _SLOT.size + len(data)] = data
        _SLOT.pack_into(self._map, at, self._count, time.time(), zlib.crc32(data), len(data))
        self.beat()

    def beat(self) -> None:
        """Say that this process is alive and getting on."""
        if self._map is not None:
            _LIFE.pack_into(self._map, _LIFE_AT, self._count, time.monotonic())

    def waits(self, what: str, seconds: float) -> None:
        """Say who waits for what, and how long at most; it stands until the next wait, or `goes_on`."""
        if self._map is None:
            return
        data = what.encode()[:_WAIT_TEXT]
        start = _WAIT_AT + _WAIT.size
        self._map[start : start + len(data)] = data
        _WAIT.pack_into(self._map, _WAIT_AT, time.monotonic(), seconds, zlib.crc32(data), len(data))

    def goes_on(self) -> None:
        """Say that the wait is over."""
        if self._map is not None:
            _WAIT.pack_into(self._map, _WAIT_AT, 0.0, 0.0, 0, 0)
            self.beat()

    def end(self) -> None:
        """Say that this process came to its own end, and record nothing any more."""
        if self._map is None:
            return
        self.goes_on()
        _ENDED.pack_into(self._map, _ENDED_AT, time.time())
        faulthandler.unregister(STACKS)
        os.close(self._stacks)
        self._map.close()
        self._map, self._stacks = None, -1


FLIGHT: Final = FlightRecorder()
"""This process's recorder: every module notes what it does here, as with a logger."""


def boot_id() -> str:
    """Return what names this machine since it was started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def birth_of(pid: int) -> int | None:
    """Return when a process of this machine began, in clock ticks since the machine did; None without one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Behind the name, which may hold spaces and brackets; field 22 of proc(5).
    return int(stat.rpartition(")")[2].split()[19])


def read_flight(path: Path) -> Flight:
    """Return what a ring tells, whatever its process is doing; raises RunFolderError for another file."""
    with path.open("rb") as file:
        data = file.read(_SLOTS_AT + SLOTS * SLOT_BYTES)
    if len(data) < _SLOTS_AT or not data.startswith(_MAGIC):
        raise RunFolderError(f"{path}: expected a flight recorder's ring, got {len(data)} other bytes")
    _, pid, slots, ended, started, birth, boot, role = _HEADER.unpack_from(data)
    count, heard = _LIFE.unpack_from(data, _LIFE_AT)
    events = sorted(_events(data, slots))
    return Flight(
        role=role.rstrip(b"\0").decode(errors="replace"),
        pid=pid,
        birth=birth,
        boot=boot.rstrip(b"\0").decode(errors="replace"),
        started=started,
        ended=ended,
        heard=heard,
        count=count,
        wait=_wait(data),
        events=tuple(Event(time=at, text=text) for _, at, text in events),
    )


def read_flights(folder: Path) -> list[Flight]:
    """Return the rings of a run's processes, by role; files that are none are left out."""
    flights = []
    for path in sorted(folder.glob("*.ring")):
        try:
            flights.append(read_flight(path))
        except RunFolderError:
            continue
    return flights


def _events(data: bytes, slots: int) -> Iterator[tuple[int, float, str]]:
    for at in range(_SLOTS_AT, min(len(data), _SLOTS_AT + slots * SLOT_BYTES) - SLOT_BYTES + 1, SLOT_BYTES):
        number, moment, check, length = _SLOT.unpack_from(data, at)
        text = data[at + _SLOT.size : at + _SLOT.size + min(length, _SLOT_TEXT)]
        if number and zlib.crc32(text) == check:
            yield number, moment, text.decode(errors="replace")


def _wait(data: bytes) -> Wait | None:
    since, seconds, check, length = _WAIT.unpack_from(data, _WAIT_AT)
    text = data[_WAIT_AT + _WAIT.size :][: min(length, _WAIT_TEXT)]
    if not since or zlib.crc32(text) != check:
        return None
    return Wait(since=since, seconds=seconds, what=text.decode(errors="replace"))
