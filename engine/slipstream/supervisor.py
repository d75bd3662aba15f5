"""Floor 4. Starts role processes, watches them, restarts those that may be, and stops all at the end.

    loop            waits for                     released by
    supervise       awaited roles to end with 0   their exit, another role's failure, a signal, `finish_s`
    stop            roles to end after SIGTERM    their exit, or SIGKILL after `stop_s`

A role gets `--parent PID` and ends by itself when this process is gone (process.guard_parent).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from slipstream.errors import DeadlineError, RoleError, UserError

POLL_S = 0.1
SENTENCE = "slipstream: "
"""How a role's last words begin on stderr; the command line writes them so."""


class StoppedBySignal(Exception):
    """The user or the system asked this process to end."""

    def __init__(self, number: int) -> None:
        """Keep which signal it was."""
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """One process to run.

    Example: ``RoleSpec(role="actor", arguments=("actor", "--output", "runs/a"), threads=1, restarts=5)``.
    """

    role: str
    index: int = 0
    arguments: tuple[str, ...]
    threads: int = 1
    restarts: int = 0
    """How often it is started again after it died."""
    awaited: bool = True
    """The stage ends when all awaited roles have ended with 0."""
    outlives: bool = False
    """Stopped only after all others have ended, because they hand it their last work."""

    @property
    def name(self) -> str:
        """Return "actor-0"."""
        return f"{self.role}-{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Deadlines and pauses of a supervisor, in seconds."""

    stop_s: float = 20.0
    """From SIGTERM to SIGKILL."""
    finish_s: float = 900.0
    """From the first awaited role's end to the last one's."""
    backoff_s: float = 1.0
    """Pause before the first restart; doubles with each."""


@dataclass(slots=True, kw_only=True)
class _Running:
    """A role with its process; `process` is None while a restart is due at `restart_at`."""

    spec: RoleSpec
    process: subprocess.Popen[bytes] | None
    deaths: int = 0
    restart_at: float = 0.0
    finished: bool = False


@dataclass(slots=True, kw_only=True)
class Supervisor:
    """Runs stages of role processes in one run folder, all started as `program` + arguments."""

    folder: Path
    program: Sequence[str]
    on_event: Callable[[str], None]
    """Told in one sentence what happened."""
    on_tick: Callable[[], None]
    """Called about ten times a second while roles run."""
    patience: Patience = field(default_factory=Patience)

    def supervise(self, specs: Sequence[RoleSpec]) -> None:
        """Run the roles until all awaited ones have ended with 0, then stop the others.

        Raises: UserError with a role's own sentence when it ended with 2; RoleError naming the role, its
        exit and its last lines when it died otherwise; StoppedBySignal; DeadlineError. On all of
        them every role has ended.
        """
        roles: list[_Running] = []
        with _signals() as received:
            try:
                for spec in specs:
                    roles.append(_Running(spec=spec, process=self._start(spec)))
                self._watch(roles, received)
            finally:
                for last in (False, True):
                    wave = [role.process for role in roles if role.spec.outlives is last]
                    self._stop([process for process in wave if process is not None])

    def _watch(self, roles: Sequence[_Running], received: Sequence[int]) -> None:
        finish_at: float | None = None
        while True:
            for role in roles:
                self._look_after(role)
            if received:
                raise StoppedBySignal(received[0])
            awaited = [role for role in roles if role.spec.awaited]
            waiting = [role.spec.name for role in awaited if not role.finished]
            if not waiting:
                return
            if finish_at is None and len(waiting) < len(awaited):
                finish_at = time.monotonic() + self.patience.finish_s
            if finish_at is not None and time.monotonic() > finish_at:
                raise DeadlineError(f"launcher: waited {self.patience.finish_s:g} s for {waiting[0]} to end")
            self.on_tick()
            time.sleep(POLL_S)

    def _look_after(self, role: _Running) -> None:
        """Note a role's end, start it again when that is due, or raise its failure."""
        if role.finished:
            return
        if role.process is None:
            if time.monotonic() >= role.restart_at:
                role.process = self._start(role.spec)
            return
        code = role.process.poll()
        if code is None:
            return
        role.finished = code == 0
        if role.finished:
            return
        role.process = None
        role.deaths += 1
        if code == UserError.exit_code or role.deaths > role.spec.restarts:
            raise self._failure(role, code)
        pause = self.patience.backoff_s * 2 ** (role.deaths - 1)
        role.restart_at = time.monotonic() + pause
        self.on_event(
            f"{role.spec.name} {_ending(code)}; restart {role.deaths} of {role.spec.restarts} in {pause:g} s"
        )

    def _start(self, spec: RoleSpec) -> subprocess.Popen[bytes]:
        threads = str(spec.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        log = self._log(spec)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            return subprocess.Popen(
                [*self.program, *spec.arguments, "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **dict.fromkeys(names, threads)},
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which stops roles in order
            )

    def _stop(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        alive = [process for process in processes if process.poll() is None]
        for process in alive:
            process.terminate()
        end = time.monotonic() + self.patience.stop_s
        for process in alive:
            try:
                process.wait(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self.on_event(f"process {process.pid} ignored SIGTERM for {self.patience.stop_s:g} s: killed")

    def _failure(self, role: _Running, code: int) -> UserError | RoleError:
        log = self._log(role.spec)
        lines = last_lines(log, 12)
        if code == UserError.exit_code:
            own = [line for line in lines if line.startswith(SENTENCE)]
            if own:
                return UserError(own[-1].removeprefix(SENTENCE))
        died = f"{role.spec.name} {_ending(code)}"
        died += f" {role.deaths} times" if role.deaths > 1 else ""
        return RoleError("\n  ".join([f"{died}; last lines of {log}:", *lines]))

    def _log(self, spec: RoleSpec) -> Path:
        return self.folder / "logs" / f"{spec.name}.log"


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last non-empty lines of a log, reading its end only."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16384))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-count:]


def _ending(code: int) -> str:
    """Say how a process ended: by a signal's name or an exit code."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of dying of them; those ignored stay ignored."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    wanted = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
