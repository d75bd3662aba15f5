"""Floor 4. Starts role processes, watches them, restarts those that may be, and stops all at the end.

    loop            waits for                     released by
    supervise       awaited roles to end with 0   their exit, another role's failure, a signal, `finish_s`
    stop            roles to end after SIGTERM    their exit, or SIGKILL after `stop_s`

A role gets `--parent PID` and ends by itself when this process is gone (process.guard_parent).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from slipstream.errors import DeadlineError, RoleError, RunFolderError, UserError
from slipstream.flight_recorder import FOLDER, read_flight

POLL_S = 0.1
FULL_BYTES = 1 << 20
"""A disk with less than this left is called full."""
SENTENCE = "slipstream: "
"""How a role's last words begin on stderr; the command line writes them so."""


class StoppedBySignal(KeyboardInterrupt):
    """The user or the system asked this process to end; nothing on the way takes it for a failure."""

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
    """How often it is started again after it died, within `Patience.window_s`."""
    awaited: bool = True
    """The stage ends when all awaited roles have ended with 0."""
    outlives: bool = False
    """Stopped only after all others have ended, because they hand it their last work."""
    resends: bool = False
    """Keeps on disk what it could not hand over: killed at once when nobody is left to take it."""

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
    window_s: float = 3600.0
    """A death longer ago is forgotten: a long run may lose an actor now and then."""
    stall_s: float = 300.0
    """A role that records its flight and gave no sign of life for so long is killed."""


@dataclass(slots=True, kw_only=True)
class _Running:
    """A role with its process; `process` is None while a restart is due at `restart_at`."""

    spec: RoleSpec
    process: subprocess.Popen[bytes] | None
    died_at: list[float] = field(default_factory=list)
    """On the monotonic clock, those within the window."""
    log_start: int = 0
    """Where in its log this process began: what stands before is of earlier ones."""
    restart_at: float = 0.0
    finished: bool = False

    def count_death(self, window_s: float) -> int:
        """Note a death and return how many there were within the window."""
        now = time.monotonic()
        self.died_at = [*(at for at in self.died_at if now - at < window_s), now]
        return len(self.died_at)


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
    on_stall: Callable[[str], str] = str
    """Given the name of a stalled role before it is killed; returns what to tell of it."""
    _next_look: float = 0.0

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
                    roles.append(role := _Running(spec=spec, process=None))
                    self._start(role)
                self._watch(roles, received)
            finally:
                self._stop_all(roles)
            if received:  # while the others were stopped
                raise StoppedBySignal(received[0])

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
            self._end_stalls(roles)
            self.on_tick()
            time.sleep(POLL_S)

    def _end_stalls(self, roles: Sequence[_Running]) -> None:
        """Kill roles that are alive and do not get on: a restart, or an end with a reason, beats a hang."""
        now = time.monotonic()
        if now < self._next_look:
            return
        late = now - self._next_look > self.patience.stall_s
        self._next_look = now + self.patience.stall_s / 8
        if late:
            return  # this process itself stood still, as all do on a paused machine: let them speak first
        for role in roles:
            if role.process is None or role.process.poll() is not None:
                continue
            try:
                flight = read_flight(self.folder / FOLDER / f"{role.spec.name}.ring")
            except (OSError, RunFolderError):
                continue  # it records none, or has not begun
            silence = now - flight.heard
            if flight.pid == role.process.pid and silence > self.patience.stall_s:
                told = self.on_stall(role.spec.name)
                role.process.kill()
                self.on_event(f"{role.spec.name} gave no sign of life for {silence:.0f} s: killed; {told}")

    def _look_after(self, role: _Running) -> None:
        """Note a role's end, start it again when that is due, or raise its failure."""
        if role.finished:
            return
        if role.process is None:
            if time.monotonic() >= role.restart_at:
                self._start(role)
            return
        code = role.process.poll()
        if code is None:
            return
        role.finished = code == 0
        if role.finished:
            return
        role.process = None
        deaths = role.count_death(self.patience.window_s)
        if code == UserError.exit_code or deaths > role.spec.restarts:
            raise self._failure(role, code)
        pause = self.patience.backoff_s * 2 ** (deaths - 1)
        role.restart_at = time.monotonic() + pause
        self.on_event(
            f"{role.spec.name} {_ending(code)}; restart {deaths} of {role.spec.restarts} in {pause:g} s"
        )

    def _start(self, role: _Running) -> None:
        spec, threads = role.spec, str(role.spec.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        log = self._log(spec)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            role.log_start = file.tell()
            role.process = subprocess.Popen(
                [*self.program, *spec.arguments, "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **dict.fromkeys(names, threads)},
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which stops roles in order
            )

    def _stop_all(self, roles: Sequence[_Running]) -> None:
        """End every role, those that outlive others last."""
        takers = [role for role in roles if role.spec.outlives]
        orphaned = bool(takers) and not any(_alive(role) for role in takers)
        for role in roles:
            if orphaned and role.spec.resends and role.process is not None:
                role.process.kill()
        for last in (False, True):
            self._stop([role for role in roles if role.spec.outlives is last])

    def _stop(self, roles: Sequence[_Running]) -> None:
        stopping = [(role.spec.name, role.process) for role in roles if role.process is not None]
        for _, process in stopping:
            process.terminate()
        end = time.monotonic() + self.patience.stop_s
        for name, process in stopping:
            try:
                process.wait(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self.on_event(f"{name} ignored SIGTERM for {self.patience.stop_s:g} s: killed")

    def _failure(self, role: _Running, code: int) -> UserError | RoleError:
        log = self._log(role.spec)
        lines = last_lines(log, 12, start=role.log_start)
        if code == UserError.exit_code:
            own = [line for line in lines if line.startswith(SENTENCE)]
            if own:
                return UserError(own[-1].removeprefix(SENTENCE))
        died = f"{role.spec.name} {_ending(code)}"
        died += f" {len(role.died_at)} times" if len(role.died_at) > 1 else ""
        said = f"last lines of {log}:" if lines else f"it wrote nothing into {log}"
        if shutil.disk_usage(self.folder).free < FULL_BYTES:  # last words may be lost
            said = f"the disk of {self.folder} is full, free some space; {said}"
        return RoleError("\n  ".join([f"{died}; {said}", *lines]))

    def _log(self, spec: RoleSpec) -> Path:
        return self.folder / "logs" / f"{spec.name}.log"


def last_lines(path: Path, count: int, *, start: int = 0) -> list[str]:
    """Return the last non-empty lines of a log behind `start`, reading its end only."""
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - 16384))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-count:]


def _alive(role: _Running) -> bool:
    return role.process is not None and role.process.poll() is None


def _ending(code: int) -> str:
    """Say how a process ended: by a signal's name or an exit code."""
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL (by hand, or by the system for want of memory)"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


@contextmanager
def raising_signals() -> Iterator[None]:
    """Raise StoppedBySignal for SIGTERM and SIGHUP, as Python does KeyboardInterrupt for SIGINT."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal(number)

    with _handled((signal.SIGTERM, signal.SIGHUP), stop):
        yield


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of dying of them; those ignored stay ignored."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    with _handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), note):
        yield received


@contextmanager
def _handled(
    numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Handle signals that are not ignored with `handler`, and as before afterwards."""
    wanted = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
