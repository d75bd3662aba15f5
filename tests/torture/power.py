"""What a disk may hold after the power failed: every state that unsynced writes and names allow, recovered.

    python tests/torture/power.py spool|log|checkpoint [--states N] [--seed N] [--bug NAME]

The scripts of points.py run once under the shim, which records their calls. Between two calls the power
fails: of each file, what was written since its last fsync is there, missing, cut off or in pieces of 512
bytes, in any order; of each folder, new, removed and renamed entries since its last fsync are there up to
some point. No more is promised by POSIX, and no file system keeps less (ALICE, Pillai et al. 2014, OSDI).
From each state the real code recovers, and must find all that was promised before that moment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import bugs
import points
import shim

SECTOR = 512
_HEAD = struct.Struct("<BQII")
WRITE, SYNC, SYNC_FOLDER, CREATE, SIZE, RENAME, EXCHANGE, UNLINK, MKDIR, RMDIR, LINK, MARK = range(1, 13)


@dataclass(slots=True, eq=False)
class File:
    """Bytes that are safe, and what was done since: (offset, bytes), or (size, None) for a truncation."""

    safe: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def sync(self) -> None:
        """Make everything safe."""
        for change in self.pending:
            _change(self.safe, *change)
        self.pending.clear()

    def after_crash(self, source: random.Random, mood: str) -> bytes:
        """Return what a crash may leave."""
        found = bytearray(self.safe)
        for number, (offset, data) in enumerate(self.pending):
            if data is None or mood == "all":
                if mood == "all" or source.random() < 0.5:
                    _change(found, offset, data)
            elif mood == "cut" and number == len(self.pending) - 1:
                _change(found, offset, data[: source.randrange(len(data) + 1)])
            elif mood == "cut":
                _change(found, offset, data)
            elif mood == "pieces":
                for start, piece in _pieces(offset, data):
                    if source.random() < 0.6:
                        _change(found, start, piece)
            elif mood == "some" and source.random() < 0.5:
                _change(found, offset, data)
        return bytes(found)


@dataclass(slots=True, eq=False)
class Folder:
    """Entries that are safe, those there are now, and what was done in between."""

    safe: dict[str, File | Folder] = field(default_factory=dict)
    now: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[dict[str, File | Folder | None]] = field(default_factory=list)
    """Each a change of some entries that happens as a whole."""

    def change(self, entries: dict[str, File | Folder | None]) -> None:
        """Change entries now; they are safe later."""
        _enter(self.now, entries)
        self.pending.append(entries)

    def sync(self) -> None:
        """Make everything safe."""
        self.safe = dict(self.now)
        self.pending.clear()

    def after_crash(self, source: random.Random, mood: str) -> dict[str, File | Folder]:
        """Return what a crash may leave."""
        found = dict(self.safe)
        count = {"all": len(self.pending), "none": 0}.get(mood, source.randint(0, len(self.pending)))
        for entries in self.pending[:count]:
            _enter(found, entries)
        return found


def _enter(folder: dict[str, File | Folder], entries: dict[str, File | Folder | None]) -> None:
    for name, what in entries.items():
        if what is None:
            folder.pop(name, None)
        else:
            folder[name] = what


def _change(data: bytearray, offset: int, new: bytes | None) -> None:
    if new is None:
        del data[offset:]
        data.extend(bytes(offset - len(data)))
    else:
        data.extend(bytes(max(0, offset - len(data))))
        data[offset : offset + len(new)] = new


def _pieces(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    start = 0
    while start < len(data):
        end = min(len(data), start + SECTOR - (offset + start) % SECTOR)
        yield offset + start, data[start:end]
        start = end


class Disk:
    """The folder of a script as a disk has it, call by call."""

    def __init__(self, root: Path) -> None:
        """Start with an empty folder."""
        self._root, self.root = str(root), Folder()

    def take(self, kind: int, number: int, path: str, data: bytes) -> None:
        """Follow one call."""
        holder, name = self._find(path)
        match kind:
            case 1:
                self._file(path).pending.append((number, data))
            case 2:
                self._file(path).sync()
            case 3:
                folder = holder.now[name] if name else self.root
                assert isinstance(folder, Folder)
                folder.sync()
            case 4:
                holder.change({name: File()})
            case 5:
                self._file(path).pending.append((number, None))
            case 6 | 7 | 11:
                self._rename(kind, holder, name, data.decode())
            case 8 | 10:
                holder.change({name: None})
            case 9:
                holder.change({name: Folder()})

    def _rename(self, kind: int, holder: Folder, name: str, other: str) -> None:
        target, new = self._find(other)
        assert target is holder, "the scripts rename within one folder"
        if kind == LINK:
            holder.change({new: holder.now[name]})
        else:
            holder.change({name: holder.now[new] if kind == EXCHANGE else None, new: holder.now[name]})

    def _find(self, path: str) -> tuple[Folder, str]:
        parts = path.removeprefix(self._root).strip("/").split("/")
        folder = self.root
        for part in parts[:-1]:
            inner = folder.now[part]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, parts[-1]

    def _file(self, path: str) -> File:
        folder, name = self._find(path)
        file = folder.now[name]
        assert isinstance(file, File)
        return file

    def after_crash(self, source: random.Random) -> dict[str, bytes | None]:
        """Return one state a crash may leave: path -> bytes, or None for a folder."""
        state: dict[str, bytes | None] = {}
        moods = ("all", "none", "some", "cut", "pieces")
        mood = source.choice(moods)

        def walk(folder: Folder, prefix: str) -> None:
            for name, what in folder.after_crash(source, mood).items():
                if isinstance(what, Folder):
                    state[prefix + name] = None
                    walk(what, f"{prefix}{name}/")
                else:
                    state[prefix + name] = what.after_crash(
                        source, mood if source.random() < 0.5 else source.choice(moods)
                    )

        walk(self.root, "")
        return state


def record(name: str, seed: int, bug: str) -> tuple[str, list[tuple[int, int, str, bytes]], list[str]]:
    """Run a script under the shim; return its folder, its calls, and what it said, which marks count."""
    with points.Case(name) as folder:
        words: list[str] = []
        file = os.memfd_create("trace")
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            _record_in_child(name, folder, file, writing, seed, bug)
        os.close(writing)
        with os.fdopen(reading) as said:
            words = said.read().splitlines()
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"{name}, seed {seed}: the script ended with {status}"
        size = os.fstat(file).st_size
        data = os.pread(file, size, 0)
        os.close(file)
        return str(folder), list(_calls(data)), words


def _record_in_child(name: str, folder: Path, file: int, out: int, seed: int, bug: str) -> None:
    code = 1
    try:
        bugs.plant(bug)
        count = 0

        def say(word: str) -> None:
            nonlocal count
            os.write(out, f"{word}\n".encode())
            count += 1
            shim.mark(count)

        shim.trace(file)
        shim.arm(folder)
        points.SCRIPTS[name].write(folder, say, seed)
        code = 0
    finally:
        os._exit(code)


def _calls(data: bytes) -> Iterator[tuple[int, int, str, bytes]]:
    position = 0
    while position < len(data):
        kind, number, first, second = _HEAD.unpack_from(data, position)
        position += _HEAD.size
        path, rest = data[position : position + first], data[position + first : position + first + second]
        yield kind, number, path.decode(), rest
        position += first + second


@dataclass(kw_only=True)
class Found:
    """What crashes of one part came to."""

    script: str
    seed: int
    states: int = 0
    different: int = 0
    calls: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def crash(name: str, *, states: int, seed: int, bug: str = "", most_wrong: int = 20) -> Found:
    """Recover from `states` states of a part, over several scripts drawn from seeds."""
    found, seen, started = Found(script=name, seed=seed), set[bytes](), time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="slipstream-power-", dir=points.HOME))
    while found.states < states and len(found.wrong) < most_wrong:
        _crash_one(found, seen, home, states=states, seed=seed, bug=bug)
        seed += 1
    shutil.rmtree(home, ignore_errors=True)
    found.different, found.seconds = len(seen), time.monotonic() - started
    return found


def _crash_one(found: Found, seen: set[bytes], home: Path, *, states: int, seed: int, bug: str) -> None:
    root, calls, words = record(found.script, seed, bug)
    found.calls += len(calls)
    source, disk, told = random.Random(seed), Disk(Path(root)), 0
    each = max(1, min(20, states // len(calls)))
    for number, (kind, value, path, data) in enumerate(calls):
        if kind == MARK:
            told = value
        else:
            disk.take(kind, value, path, data)
        for _ in range(each):
            if found.states >= states:
                return
            found.states += 1
            state = disk.after_crash(source)
            digest = hashlib.blake2b(repr((told, sorted(state.items()))).encode(), digest_size=12).digest()
            if digest in seen:
                continue
            seen.add(digest)
            wrong = _recover(found.script, home / "part", state, words[:told])
            if wrong and bug:
                found.wrong += wrong
                return
            found.wrong += [f"{found.script}, seed {seed}, after call {number}: {each}" for each in wrong[:1]]


def _recover(name: str, folder: Path, state: dict[str, bytes | None], words: list[str]) -> list[str]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path, data in state.items():
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)
    return points.recover(name, folder, words, bug="")


def main() -> int:
    """Run from the command line."""
    shim.load_into_this_program()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", choices=sorted(points.SCRIPTS))
    parser.add_argument("--bug", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--states", type=int, default=2000)
    options = parser.parse_args()
    found = crash(
        options.script,
        states=options.states,
        seed=options.seed,
        bug=options.bug,
        most_wrong=1 if options.bug else 20,
    )
    print(json.dumps(found.__dict__, indent=1))
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
