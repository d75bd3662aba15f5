"""Floor 5. An audit from outside: starts its workers, ends them in time, tells what they found.

worker      all checks, then a few episodes to compare
repeater    the same episodes alone, where strings have other hashes
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from slipstream import config as configuration
from slipstream.config import RunConfig
from slipstream.environment_audit import worker
from slipstream.environment_audit.repetition import processes
from slipstream.environment_audit.verdicts import Digest, Findings, Level, Message, Refusal, Verdict, plain
from slipstream.errors import ConfigurationError, SlipstreamError

LONGEST_S: Final = 54.0
"""Most seconds of an audit, start and report included."""
_REPORT_S: Final = 3.0
"""Of these, for ending the workers and writing."""
_CLOSE_S: Final = 2.0
"""Given to workers that are done, to close what they hold."""
_POLL_S: Final = 0.05
_TAIL: Final = 400
"""Characters shown of what a worker that crashed said last."""

Tell = Callable[[Verdict], None]


@dataclass(slots=True)
class _Child:
    """A worker process and what it has said so far."""

    process: subprocess.Popen[bytes]
    answer: Path
    errors: Path
    verdicts: list[Verdict] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)
    begun: str = ""
    """The check that it is in."""
    refusal: Refusal | None = None
    versions: dict[str, str] = field(default_factory=dict)
    done: bool = False
    read: int = 0

    def listen(self) -> Iterator[Verdict]:
        """Take in what is new; yields verdicts."""
        with self.answer.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.splitlines():
            message = msgspec.json.decode(line, type=Message)
            self.done |= message.done is not None
            self.refusal = message.refusal or self.refusal
            self.versions = message.versions or self.versions
            self.begun = message.begun.check if message.begun else self.begun
            if message.digest:
                self.digests.append(message.digest)
            if message.verdict:
                self.verdicts.append(message.verdict)
                yield message.verdict

    def end(self) -> None:
        """Kill it with all it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait(timeout=10.0)


def audited(
    config: RunConfig,
    tell: Tell,
    *,
    episodes: int,
    seed: int,
    threshold: float,
    longest_s: float = LONGEST_S,
) -> Findings:
    """Return the verdicts on the configured environment, each told as it comes.

    Raises ConfigurationError, or the SlipstreamError, for which there is nothing to audit.
    """
    began = time.monotonic()
    until_s = began + longest_s - _REPORT_S
    with tempfile.TemporaryDirectory(prefix="slipstream-audit-") as folder:
        place = Path(folder)
        configuration.save(config, place / "config.toml")
        job = worker.Job(
            config=str(place / "config.toml"),
            answer="",
            episodes=episodes,
            seed=seed,
            threshold=threshold,
            until_s=until_s - 1.0,
            parent=os.getpid(),
            digests_only=False,
        )
        children: list[_Child] = []
        try:
            children.append(_started(place, job, "worker", hash_seed="1"))
            repeating = msgspec.structs.replace(job, digests_only=True)
            children.append(_started(place, repeating, "repeater", hash_seed="2"))
            _wait(children, tell, until_s)
        finally:
            for child in children:
                child.end()
        main, repeater = children
        if main.refusal is not None:
            kind = (
                ConfigurationError
                if main.refusal.exit_code == ConfigurationError.exit_code
                else SlipstreamError
            )
            raise kind(main.refusal.error)
        for verdict in _last(main, repeater):
            tell(verdict)
            main.verdicts.append(verdict)
        return Findings(verdicts=main.verdicts, versions=main.versions, seconds=time.monotonic() - began)


def _started(place: Path, job: worker.Job, name: str, *, hash_seed: str) -> _Child:
    answer, errors = place / f"{name}.jsonl", place / f"{name}.log"
    answer.touch()
    spelled = msgspec.json.encode(msgspec.structs.replace(job, answer=str(answer))).decode()
    with errors.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", worker.__name__, spelled],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            start_new_session=True,
        )
    return _Child(process=process, answer=answer, errors=errors)


def _wait(children: list[_Child], tell: Tell, until_s: float) -> None:
    """Listen until both have ended, or the time has."""
    running = True
    while running and time.monotonic() < until_s:
        time.sleep(_POLL_S)
        # What a process said before its end is read after it.
        running = any(child.process.poll() is None for child in children)
        for child in children:
            for verdict in child.listen():
                if child is children[0]:
                    tell(verdict)
        if children[0].refusal is not None:
            return
        if all(child.done for child in children):
            until_s = min(until_s, time.monotonic() + _CLOSE_S)


def _last(main: _Child, repeater: _Child) -> Iterator[Verdict]:
    """Yield the verdicts that need both, or that the worker did not live to give."""
    given = {verdict.check for verdict in main.verdicts}
    missing = [name for name in worker.NAMES if name not in given and name != worker.PROCESSES]
    if not main.done:
        code = main.process.returncode
        where = main.begun or "its start"
        said = plain(main.errors.read_bytes().decode("utf-8", "replace"))[-_TAIL:].strip()
        tail = f": {said.splitlines()[-1]}" if said else ""
        why = f"its process did not end in time and was killed, in {where}"
        if code is not None and code != -signal.SIGKILL:
            ended = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            why = f"its process ended {ended}, in {where}{tail}"
        yield Verdict(check=missing[0] if missing else "errors", level=Level.FAIL, sentence=why)
        for name in missing[1:]:
            yield Verdict(check=name, level=Level.WARN, sentence="not reached")
        return
    if not missing:
        repeats = not any(v.check == "determinism" and v.level is Level.FAIL for v in main.verdicts)
        yield processes(main.digests, repeater.digests, repeats=repeats)
