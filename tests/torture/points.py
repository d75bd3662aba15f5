"""Small scripts of the parts that keep things on disk, cut off at every system call, and recovered.

    python tests/torture/points.py spool|log|checkpoint [--bug NAME]

A script says aloud what it has promised ("> n": kept from now on, "- n": may be forgotten from now on,
"< n": begun). Whatever happens to its process, the real code must find everything promised again, whole,
and nothing that was never begun.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import bugs
import google_crc32c
import shim

from slipstream import checkpoint, events, spool
from slipstream.errors import CheckpointError, SlipstreamError
from slipstream.ingest import IngestLog
from slipstream.spool import Spool

Say = Callable[[str], None]
HOME = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


def payload(number: int) -> bytes:
    """Return the bytes of thing number n: different for each, of many sizes."""
    source = random.Random(number)
    return source.randbytes(source.choice((3, 40, 180, 700, 1500)))


def record(number: int) -> bytes:
    """Return thing number n as the spool takes it: bytes that end in their own check."""
    body = number.to_bytes(4, "little") + payload(number)
    return body + google_crc32c.value(body).to_bytes(4, "little")


@dataclass(frozen=True, slots=True)
class Script:
    """A part under test."""

    write: Callable[[Path, Say, int], None]
    """Does things of a kind drawn from a seed, and says what it promises."""
    verify: Callable[[Path, Iterable[str]], list[str]]
    """Opens what is left and returns what is wrong with it."""


def said(words: Iterable[str]) -> tuple[set[int], set[int]]:
    """Return (begun, promised and not let go)."""
    begun, kept = set[int](), set[int]()
    for word in words:
        number = int(word[2:])
        (begun if word[0] in "<" else kept).add(number) if word[0] in "<>" else kept.discard(number)
    return begun, kept


def write_spool(folder: Path, say: Say, seed: int) -> None:
    """Append one by one and several at once, acknowledge, fill segments again, open again."""
    spool.SEGMENT_BYTES, spool._RESET_BYTES = 2500, 0
    source, pending = random.Random(seed), list[tuple[int, int]]()
    number = 0
    for _ in range(2):
        kept = Spool(folder / "a", durability="power")
        pending = [(seq, int.from_bytes(data[:4], "little")) for seq, data in kept.pending()]
        for _ in range(7):
            together = source.choice((1, 1, 3))
            batch = []
            for _ in range(together):
                number += 1
                say(f"< {number}")
                batch.append((kept.write(kept.next_seq, record(number)), number))
            kept.sync()
            for _, each in batch:
                say(f"> {each}")
            pending += batch
            while pending and source.random() < 0.45:
                seq, each = pending.pop(source.randrange(len(pending)))
                say(f"- {each}")
                kept.acknowledge([seq])
        kept.close()


def verify_spool(folder: Path, words: Iterable[str]) -> list[str]:
    """Open the spool, read it, use it, and open it again."""
    begun, promised = said(words)
    wrong = list[str]()
    for use in (True, False):
        kept = Spool(folder / "a", durability="process")
        found = set[int]()
        for _, data in kept.pending():
            number = int.from_bytes(data[:4], "little")
            if number == 0:
                continue
            if number not in begun or data != record(number):
                wrong.append(f"the spool holds {number}, which was never written so")
            found.add(number)
        if promised - found:
            wrong.append(f"lost: {sorted(promised - found)} of {sorted(promised)}")
        if use:
            kept.append(kept.next_seq, record(0))
        kept.close()
    return wrong


def write_log(folder: Path, say: Say, seed: int) -> None:
    """Append events in turns, over several segments, and open again."""
    source, number = random.Random(seed), 0
    for _ in range(2):
        log = IngestLog(folder, "power", segment_bytes=4000)
        for _ in range(8):
            turn = []
            for _ in range(source.choice((1, 2, 5))):
                number += 1
                say(f"< {number}")
                told = events.Quarantined(actor="a", file=str(number), reason=payload(number).hex())
                position = log.append(told)
                turn.append(number)
            if source.random() < 0.3:
                log.read(position)
            log.flush()
            for each in turn:
                say(f"> {each}")
        log.close()


def verify_log(folder: Path, words: Iterable[str]) -> list[str]:
    """Open the log, read it, use it, and read it again."""
    begun, promised = said(words)
    wrong = list[str]()
    for use in (True, False):
        log = IngestLog(folder, "process", segment_bytes=4000)
        found = list[int]()
        for entry in log.replay():
            event = entry.event
            if not isinstance(event, events.Quarantined) or event.actor != "a":
                continue
            found.append(int(event.file))
            if event.reason != payload(found[-1]).hex():
                wrong.append(f"the log holds another {event.file}")
        if found != list(range(1, len(found) + 1)):
            wrong.append(f"order: {found}")
        if promised - set(found):
            wrong.append(f"lost: {sorted(promised - set(found))}")
        if set(found) - begun:
            wrong.append(f"from nowhere: {sorted(set(found) - begun)}")
        if use:
            log.append(events.CheckpointPublished(step=1))
        log.close()
    return wrong


def write_checkpoint(folder: Path, say: Say, seed: int) -> None:
    """Save four times, keep two, and publish the best of them twice."""

    def content(step: int) -> Callable[[Path], None]:
        def write(into: Path) -> None:
            (into / "weights").write_bytes(payload(step))
            checkpoint.write_state(into / "state.json", {"step": step})

        return write

    for step in range(1 + seed % 3, 5 + seed % 3):
        say(f"< {step}")
        path = checkpoint.save_checkpoint(folder, step, content(step), keep=2)
        say(f"> {step}")
        if step % 2:
            say(f"< {1000 + step}")
            checkpoint.publish_folder(path, folder / "best")
            say(f"> {1000 + step}")


def verify_checkpoint(folder: Path, words: Iterable[str]) -> list[str]:
    """Load the newest, look at the best, and save once more."""
    begun, promised = said(words)
    newest, best = (
        max((n % 1000 for n in promised if (n > 1000) is kind), default=0) for kind in (False, True)
    )
    wrong = list[str]()
    try:
        found = checkpoint.load_latest(folder)
        wrong += _damage(found.path, begun)
        if found.step < newest:
            wrong.append(f"lost: step {newest} was published, step {found.step} is the newest")
    except CheckpointError as error:
        if newest:
            wrong.append(f"lost: step {newest} was published; {error}")
    if best:
        try:
            checkpoint.verify(folder / "best")
            wrong += _damage(folder / "best", begun)
        except CheckpointError as error:
            wrong.append(f"lost: the best, of step {best}, was published; {error}")
    for step in (40, 41):
        checkpoint.save_checkpoint(folder, step, lambda into: (into / "weights").touch(), keep=2)
    if checkpoint.load_latest(folder).step != 41:
        wrong.append("what is saved afterwards is not found")
    return wrong


def _damage(path: Path, begun: set[int]) -> list[str]:
    state = path / "state.json"
    step = json.loads(state.read_text())["step"] if state.exists() and state.stat().st_size else -1
    whole = step in begun and (path / "weights").read_bytes() == payload(step)
    return [] if whole else [f"{path.name} is not what was written: {step}"]


SCRIPTS = {
    "spool": Script(write_spool, verify_spool),
    "log": Script(write_log, verify_log),
    "checkpoint": Script(write_checkpoint, verify_checkpoint),
}


@dataclass(kw_only=True)
class Found:
    """What cutting a script off came to."""

    script: str
    calls: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, case: str, wrong: Iterable[str]) -> None:
        """Count a case."""
        self.counts[case.split(" at ")[0]] += 1
        self.wrong += [f"{self.script}, {case}: {each}" for each in wrong]


def every_point(
    name: str, *, bug: str = "", seed: int = 0, killing: bool = True, failing: bool = True
) -> Found:
    """Cut a script off at each of its system calls in every way, and recover."""
    found = Found(script=name)
    code, _, found.calls = attempt(name, bug=bug, seed=seed)
    _, _, syncs = attempt(name, bug=bug, seed=seed, kinds=shim.SYNC)
    _, _, writes = attempt(name, bug=bug, seed=seed, kinds=shim.WRITE)
    if code:
        found.wrong.append(f"{name}: the script ends with {code} by itself")
    if killing:
        for when in range(1, found.calls + 1):
            if bug and found.wrong:
                return found
            for what in ("kill_before", "kill_after", "torn"):
                _kill(found, bug, seed, when, what)
    if failing:
        for when in range(1, syncs + 1):
            _fail(found, bug, seed, when, "fail", shim.SYNC, errno.EIO)
        for when in range(1, found.calls + 1):
            _fail(found, bug, seed, when, "fail_ever", shim.EVERY, errno.ENOSPC)
        for when in range(1, writes + 1):
            _shorten(found, bug, seed, when)
    return found


def _kill(found: Found, bug: str, seed: int, when: int, what: str) -> None:
    case = f"{what} at {when}"
    with Case(found.script) as folder:
        code, words, _ = attempt(found.script, folder, bug=bug, seed=seed, when=when, what=what)
        wrong = [] if code == -signal.SIGKILL else [f"it was not killed, but ended with {code}"]
        found.add(case, wrong + recover(found.script, folder, words, bug))


def _fail(found: Found, bug: str, seed: int, when: int, what: str, kinds: int, error: int) -> None:
    case = f"{errno.errorcode[error]} at {when}"
    with Case(found.script) as folder:
        code, words, calls = attempt(
            found.script, folder, bug=bug, seed=seed, when=when, what=what, kinds=kinds, error=error
        )
        wrong = [] if code == 12 else [f"it ended with {code}, expected an error of the disk"]
        if what == "fail" and calls != when:
            wrong.append(f"after the failed sync {calls - when} more were tried")
        found.add(case, wrong + recover(found.script, folder, words, bug))


def _shorten(found: Found, bug: str, seed: int, when: int) -> None:
    case = f"short write at {when}"
    with Case(found.script) as folder:
        code, words, _ = attempt(
            found.script, folder, bug=bug, seed=seed, when=when, what="short", kinds=shim.WRITE
        )
        found.add(case, [f"it ended with {code}"] if code else recover(found.script, folder, words, bug))


class Case:
    """An empty folder, removed afterwards."""

    def __init__(self, name: str) -> None:
        """Make none yet."""
        self._name = name

    def __enter__(self) -> Path:
        """Make it."""
        self._home = Path(tempfile.mkdtemp(prefix="slipstream-points-", dir=HOME))
        folder = self._home / "part"
        folder.mkdir()
        return folder

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        shutil.rmtree(self._home)


def attempt(
    name: str,
    folder: Path | None = None,
    *,
    bug: str = "",
    seed: int = 0,
    when: int = shim.NEVER,
    what: str = "count",
    kinds: int = shim.EVERY,
    error: int = errno.EIO,
) -> tuple[int, list[str], int]:
    """Run a script in a process of its own; return its exit code, what it said, and its calls so far."""
    if folder is None:
        with Case(name) as fresh:
            return attempt(name, fresh, bug=bug, seed=seed, kinds=kinds)
    ends = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(
            name,
            folder,
            ends[1],
            bug,
            seed,
            lambda: shim.arm(folder, when=when, what=what, kinds=kinds, error=error),
        )
    os.close(ends[1])
    with os.fdopen(ends[0], "r") as file:
        words = file.read().splitlines()
    _, status = os.waitpid(pid, 0)
    calls = int(words.pop()) if words and words[-1].isdigit() else -1
    return os.waitstatus_to_exitcode(status), words, calls


def _child(name: str, folder: Path, out: int, bug: str, seed: int, arm: Callable[[], None]) -> None:
    code = 70
    try:
        bugs.plant(bug)
        arm()
        SCRIPTS[name].write(folder, lambda word: (os.write(out, f"{word}\n".encode()), None)[1], seed)
        code = 0
    except (SlipstreamError, OSError) as error:
        code = 12 if isinstance(error, SlipstreamError) or error.errno in (errno.EIO, errno.ENOSPC) else 70
    finally:
        os.write(out, f"{shim.calls()}\n".encode())
        os._exit(code)


def recover(name: str, folder: Path, words: list[str], bug: str) -> list[str]:
    """Verify what a script left, with the bug planted here too, since it may be in the recovery."""
    if not bug:
        return _verified(name, folder, words)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        bugs.plant(bug)
        os.write(writing, json.dumps(_verified(name, folder, words)).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        answer = file.read()
    os.waitpid(pid, 0)
    return list(json.loads(answer)) if answer else ["the recovery died"]


def _verified(name: str, folder: Path, words: Iterable[str]) -> list[str]:
    try:
        return SCRIPTS[name].verify(folder, words)
    except (SlipstreamError, OSError, ValueError) as error:
        return [f"the recovery failed: {error!r}"]


def main() -> int:
    """Run from the command line."""
    shim.load_into_this_program()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", choices=sorted(SCRIPTS))
    parser.add_argument("--bug", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("kills", "failures"))
    options = parser.parse_args()
    found = every_point(
        options.script,
        bug=options.bug,
        seed=options.seed,
        killing=options.only != "failures",
        failing=options.only != "kills",
    )
    print(json.dumps({**found.__dict__, "counts": dict(found.counts), "wrong": found.wrong[:20]}, indent=1))
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
