"""Fuzz every decoder: `python tests/torture/fuzz.py --inputs 5000000 --seed 1`.

Workers mutate samples (fuzz_mutations.py) and decode them (fuzz_targets.py) under a cap of memory and of
seconds; with --coverage, atheris does so guided by coverage. An input that raises anything but its decoder's
documented errors, takes over 64 MiB, kills its process or does not come back is written into --finds, from
where `--replay FILE` runs it again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "engine"), str(HERE.parent.parent / "kernels")]

MEMORY_BYTES = 64 << 20
"""What decoding may add to a process, whatever it is given."""
HANG_TICKS, TICK_S = 20, 0.1
"""An input that takes this many ticks of CPU time hangs; the bound is wide, since machines are shared."""
STOP_S = 60.0
CHUNK = 2000
LATEST_BYTES = 1 << 17


class Hang(BaseException):
    """An input took too much CPU time."""


class Latest:
    """The input being decoded, where the parent finds it after any death of this process."""

    def __init__(self, path: Path) -> None:
        with path.open("w+b") as file:
            file.truncate(LATEST_BYTES)
            self._map = mmap.mmap(file.fileno(), LATEST_BYTES)
        self.number = 0
        self._seen, self._ticks = -1, 0

    def is_now(self, target: str, data: bytes) -> None:
        self.number += 1
        head = b"%b %d " % (target.encode(), len(data))
        self._map[: len(head)] = head
        self._map[len(head) : len(head) + len(data)] = data

    def tick(self, number: int, frame: FrameType | None) -> None:
        self._ticks = self._ticks + 1 if self._seen == self.number else 0
        self._seen = self.number
        if self._ticks >= HANG_TICKS:
            raise Hang

    @staticmethod
    def read(path: Path) -> tuple[str, bytes]:
        if not path.exists() or path.read_bytes()[:1] in (b"", b"\0"):
            raise RuntimeError(f"{path}: a worker ended before its first input")
        name, size, rest = path.read_bytes().split(b" ", 2)
        return name.decode(), rest[: int(size)]


def limit_memory() -> None:
    """Let this process grow by no more than MEMORY_BYTES from here."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def save(finds: Path, target: str, data: bytes, why: str) -> Path:
    finds.mkdir(parents=True, exist_ok=True)
    path = finds / f"{target}-{hashlib.sha256(data).hexdigest()[:16]}.bin"
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(why)
    return path


def work(arguments: argparse.Namespace) -> int:
    """One worker's part of a run; prints {"inputs": {target: n}, "finds": [...]}."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    from fuzz_targets import TARGETS, folder

    chosen = arguments.target or list(TARGETS)
    latest = Latest(arguments.finds / f"latest-{arguments.worker}")
    whole = sum(TARGETS[name].share for name in chosen)
    left, sources = {}, {}
    for name in chosen:
        target = TARGETS[name]
        samples = list(target.samples())
        sources[name] = target.mutate(samples, f"{arguments.seed}/{arguments.worker}/{name}")
        left[name] = max(1, round(arguments.inputs * target.share / whole))
        for sample in samples:
            attempt(target, name, sample, arguments.finds)
    done, finds = dict.fromkeys(chosen, 0), []
    limit_memory()
    signal.signal(signal.SIGPROF, latest.tick)
    signal.setitimer(signal.ITIMER_PROF, TICK_S, TICK_S)
    try:
        while any(left.values()) and len(finds) < 5 and not stopping:
            for name in chosen:
                # In parts of the same share, so that a run cut short has seen all of them.
                count = min(left[name], max(1, round(CHUNK * TARGETS[name].share / whole)))
                left[name] -= count
                done[name] += count
                finds += _chunk(TARGETS[name], name, sources[name], count, latest, arguments.finds)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        shutil.rmtree(folder(), ignore_errors=True)
    print(json.dumps({"inputs": done, "finds": [str(find) for find in finds]}))
    return 1 if finds else 0


def _chunk(target: Any, name: str, mutate: Any, count: int, latest: Latest, finds: Path) -> list[Path]:
    found = []
    decode, errors = target.decode, target.errors
    for _ in range(count):
        data = mutate()
        latest.is_now(name, data)
        try:
            decode(data)
        except errors:
            continue
        except (Exception, Hang):  # noqa: BLE001
            found.append(save(finds, name, data, traceback.format_exc()))
    return found


def attempt(target: Any, name: str, data: bytes, finds: Path) -> Path | None:
    """Decode one input; return where it was saved if that raised what it must not."""
    try:
        target.decode(data)
    except target.errors:
        return None
    except Exception:  # noqa: BLE001
        return save(finds, name, data, traceback.format_exc())
    return None


def replay(path: Path) -> int:
    """Decode one saved input, named TARGET-anything.bin, under the same limits."""
    from fuzz_targets import TARGETS

    name = path.name.split("-")[0]
    for sample in TARGETS[name].samples():
        attempt(TARGETS[name], name, sample, path.parent)
    limit_memory()
    try:
        TARGETS[name].decode(path.read_bytes())
    except TARGETS[name].errors as error:
        print(f"{path.name}: refused: {error}")
    return 0


def cover(arguments: argparse.Namespace) -> int:
    """Fuzz one target guided by coverage; libFuzzer ends the process at the first find."""
    import atheris

    with atheris.instrument_imports(include=["slipstream"]):
        from fuzz_targets import TARGETS
    (name,) = arguments.target
    target = TARGETS[name]
    corpus = arguments.finds / f"corpus-{name}"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(target.samples()):
        (corpus / f"sample-{number}").write_bytes(sample)

    def decode(data: bytes) -> None:
        try:
            target.decode(data)
        except target.errors:
            return

    limits = ["-max_len=8192", "-timeout=10", "-rss_limit_mb=4096", "-verbosity=0"]
    options = [f"-runs={arguments.inputs}", f"-seed={arguments.seed}", *limits]
    options += [f"-artifact_prefix={arguments.finds}/{name}-", f"-max_total_time={int(arguments.seconds)}"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], decode)
    atheris.Fuzz()
    return 0


def lead(arguments: argparse.Namespace) -> int:
    """Start the workers, wait for them, and say what they found."""
    began = time.monotonic()
    arguments.finds.mkdir(parents=True, exist_ok=True)
    share = -(-arguments.inputs // arguments.workers)
    command = [sys.executable, __file__, "--seed", str(arguments.seed), "--finds", str(arguments.finds)]
    command += [part for name in arguments.target for part in ("--target", name)]
    started = [
        subprocess.Popen(
            [*command, "--inputs", str(share), "--worker", str(worker)], stdout=subprocess.PIPE, text=True
        )
        for worker in range(arguments.workers)
    ]
    inputs: dict[str, int] = {}
    finds: list[str] = []
    for worker, process in enumerate(started):
        said, why = _said(process, arguments.seconds - (time.monotonic() - began))
        if not said:
            # Killed, or crashed in C: its last input is the find.
            target, data = Latest.read(arguments.finds / f"latest-{worker}")
            finds.append(str(save(arguments.finds, target, data, why)))
            continue
        result = json.loads(said.splitlines()[-1])
        finds += result["finds"]
        for name, count in result["inputs"].items():
            inputs[name] = inputs.get(name, 0) + count
    seconds = time.monotonic() - began
    print(json.dumps({"seed": arguments.seed, "inputs": sum(inputs.values()), "seconds": round(seconds, 1),
                      "of": inputs, "finds": finds}))  # fmt: skip
    return 1 if finds else 0


def _said(process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
    """What a worker printed, and why it did not if it did not; it is asked to stop, then killed."""
    for ask, limit_s in ((process.terminate, max(1.0, seconds)), (process.kill, STOP_S)):
        try:
            said, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            ask()
        else:
            return said, f"ended with {process.returncode}"
    process.communicate(timeout=STOP_S)
    return "", "did not come back"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=5_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--finds", type=Path, default=Path("fuzz-finds"))
    parser.add_argument("--seconds", type=float, default=7200.0, help="longest time for all of it")
    parser.add_argument(
        "--coverage", action="store_true", help="guided by coverage, by atheris; one --target"
    )
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.replay:
        return replay(given.replay)
    if given.coverage:
        return cover(given)
    return lead(given) if given.worker is None else work(given)


if __name__ == "__main__":
    sys.exit(main())
