"""Floor 4. Starts role processes, watches them, restarts those that end too early, and stops all at the end.

    loop            waits for                     released by
    supervise       awaited roles to end with 0   their exit, a failure that no restart mends, a signal,
                                                  `finish_s`
    a dead role     its next start                its back-off (restarts.py)
    stop            roles to end after SIGTERM    their exit, or SIGKILL within `stop_s`

What an end of a role means:

    0                        its work is done
    2, 3                     no restart would mend it: the run ends with the role's own sentence
    75, SIGTERM              it was asked to stop: it is started again, and that counts for nothing
    anything else            it failed: it is started again while its budget lasts

A role gets `--parent PID` and ends by itself when this process is gone (process.guard_parent).
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from slipstream.errors import DeadlineError, NumericsError, RoleError, RunFolderError, UserError
from slipstream.flight_recorder import FOLDER, read_flight
from slipstream.restarts import RestartBudget
from slipstream.stop_signals import STOPPED, StoppedBySignal, collected_signals

POLL_S: Final = 0.1
FULL_BYTES: Final = 1 << 20
"""A disk with less than this left is called full."""
SENTENCE: Final = "slipstream: "
"""How a role's last words begin on stderr; the command line writes them so."""
_REAP_S: Final = 10.0
"""From SIGKILL to the end; only a process that waits for a broken disk takes longer."""
_FINAL: Final[dict[int, type[UserError | NumericsError]]] = {
    UserError.exit_code: UserError,
    NumericsError.exit_code: NumericsError,
}
"""Exit codes after which a restart would only fail again."""


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
    """All others need it. It has no end of its own and is stopped only after they have ended."""
    resends: bool = False
    """Keeps on disk what it could not hand over: killed at once when nobody is left to take it."""

    @property
    def name(self) -> str:
        """Return "actor-0"."""
        return f"{self.role}-{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Deadlines and pauses of a supervisor, in seconds."""

    stop_s: float = 30.0
    """From the first SIGTERM to the last SIGKILL."""
    renew_s: float = 5.0
    """The same for a role that is stopped only to be started again."""
    finish_s: float = 900.0
    """From the first awaited role's end to the last one's."""
    backoff_s: float = 0.5
    """Pause before a first restart (restarts.RestartBudget)."""
    window_s: float = 3600.0
    """A death longer ago is forgotten: a long run may lose a process now and then."""
    stall_s: float = 600.0
    """A role that gave no sign of life for so long is killed."""
    start_s: float = 120.0
    """The same, at least, for one that has given none since its start: large libraries load slowly."""
    blame_s: float = 20.0
    """What a role died of that failed by itself, if one it needs gave no sign of life for so long."""


@dataclass(slots=True, kw_only=True)
class _Running:
    """A role with its process; `process` is None while a start is due at `start_at`."""

    spec: RoleSpec
    budget: RestartBudget
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    log_start: int = 0
    """Where in its log this process began: what stands before is of earlier ones."""
    start_at: float = 0.0
    renewing: bool = False
    """It was stopped by this supervisor, to be started again."""
    kill_at: float = math.inf
    """When it gets SIGKILL unless it has ended."""
    finished: bool = False

    @property
    def alive(self) -> bool:
        """True while its process runs."""
        return self.process is not None and self.process.poll() is None


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
    on_restart: Callable[[str], object] = str
    """Told the role, such as "actor", whenever a process is started again."""
    progress: Callable[[], object] = object
    """Returns what differs once the run has got on; failures without any progress are not forgotten."""
    _roles: list[_Running] = field(default_factory=list)
    _next_look: float = 0.0
    _called_at: float = 0.0
    """When an awaited role was last started again: it may have work for others that have ended with 0."""

    def supervise(self, specs: Sequence[RoleSpec]) -> None:
        """Run the roles until all awaited ones have ended with 0, then stop the others.

        Raises: UserError or NumericsError with a role's own sentence when it ended so; RoleError naming
        the role, its exit and its last lines when it died too often; StoppedBySignal; DeadlineError. On
        all of them every role has ended.
        """
        self._roles = [self._prepare(spec) for spec in specs]
        with collected_signals() as received:
            try:
                self._watch(received)
            finally:
                self._stop_all()
            if received:  # while the others were stopped
                raise StoppedBySignal(received[0])

    def renew(self, role: str, why: str) -> None:
        """Stop all processes of a role that run, and start them again; that counts for nothing."""
        for running in self._roles:
            if running.spec.role == role and running.process is not None and not running.renewing:
                running.renewing, running.kill_at = True, time.monotonic() + self.patience.renew_s
                running.process.terminate()
                self.on_event(f"{running.spec.name} is started again: {why}")

    def _prepare(self, spec: RoleSpec) -> _Running:
        patience = self.patience
        budget = RestartBudget(
            restarts=spec.restarts, window_s=patience.window_s, backoff_s=patience.backoff_s
        )
        return _Running(spec=spec, budget=budget)

    def _watch(self, received: Sequence[int]) -> None:
        finish_at = math.inf
        while True:
            for role in self._roles:
                self._look_after(role)
            if received:
                raise StoppedBySignal(received[0])
            awaited = [role for role in self._roles if role.spec.awaited]
            waiting = [role.spec.name for role in awaited if not role.finished]
            if not waiting:
                return
            if len(waiting) < len(awaited):
                finish_at = min(finish_at, time.monotonic() + self.patience.finish_s)
            if time.monotonic() > finish_at:
                raise DeadlineError(f"launcher: waited {self.patience.finish_s:g} s for {waiting[0]} to end")
            self._end_stalls()
            self.on_tick()
            time.sleep(POLL_S)

    def _look_after(self, role: _Running) -> None:
        """Start a role when that is due; note its end, plan its restart or raise its failure."""
        if role.finished:
            if role.spec.awaited or role.started > self._called_at:
                return
            role.finished, role.process, role.start_at = False, None, 0.0
        if role.process is None:
            if time.monotonic() >= role.start_at:
                self._start(role)
            return
        code = role.process.poll()
        if code is None:
            if time.monotonic() > role.kill_at:
                role.process.kill()
            return
        # Nobody else may go on without a role that outlives them, whatever it says of itself.
        role.finished = code == 0 and not role.spec.outlives
        if not role.finished:
            self._plan_restart(role, code)

    def _plan_restart(self, role: _Running, code: int) -> None:
        role.process = None
        if code in _FINAL:
            raise self._failure(role, code)
        uncounted = role.renewing or self._is_innocent(role, code)
        pause = role.budget.backoff_s
        if not uncounted:
            budgeted = role.budget.spend(now=time.monotonic(), progress=self.progress())
            if budgeted is None:
                raise self._failure(role, code)
            pause = budgeted
        role.start_at = time.monotonic() + pause
        if not role.renewing:
            number = "" if uncounted else f" {role.budget.deaths} of {role.spec.restarts}"
            self.on_event(f"{role.spec.name} {_ending(code)}; restart{number} in {pause:.2g} s")
        self.on_restart(role.spec.role)

    def _is_innocent(self, role: _Running, code: int) -> bool:
        """Return whether a role was asked to stop, or failed for want of another that it needs."""
        if code in (0, STOPPED, -signal.SIGTERM):
            return True
        if code < 0 or role.spec.outlives:
            return False
        for needed in self._roles:
            if not needed.spec.outlives:
                continue
            silence, _ = self._silence(needed, time.monotonic())
            if silence > self.patience.blame_s:
                self._kill_silent(needed, silence)
            if not needed.alive or silence > self.patience.blame_s:
                return True
        return False

    def _end_stalls(self) -> None:
        """Kill roles that are alive and do not get on: a restart, or an end with a reason, beats a hang."""
        now = time.monotonic()
        if now < self._next_look:
            return
        late = now - self._next_look > self.patience.stall_s
        self._next_look = now + self.patience.stall_s / 8
        if late:
            return  # this process itself stood still, as all do on a paused machine: let them speak first
        for role in self._roles:
            silence, spoke = self._silence(role, now)
            if silence > (
                self.patience.stall_s if spoke else max(self.patience.start_s, self.patience.stall_s)
            ):
                self._kill_silent(role, silence)

    def _kill_silent(self, role: _Running, silence: float) -> None:
        if role.process is None:
            return
        told = self.on_stall(role.spec.name)
        role.process.kill()
        self.on_event(f"{role.spec.name} gave no sign of life for {silence:.0f} s: killed; {told}")

    def _silence(self, role: _Running, now: float) -> tuple[float, bool]:
        """Return the seconds since a living role's last sign of life, or since its start without any."""
        if role.process is None or role.process.poll() is not None:
            return 0.0, False
        try:
            flight = read_flight(self.folder / FOLDER / f"{role.spec.name}.ring")
        except (OSError, RunFolderError):
            return now - role.started, False
        spoke = flight.pid == role.process.pid
        return now - (flight.heard if spoke else role.started), spoke

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
                # Threads that spin at a barrier would keep other roles, and other work, from the cores.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **dict.fromkeys(names, threads)},
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which stops roles in order
            )
        role.renewing, role.kill_at, again = False, math.inf, role.started > 0.0
        role.started = time.monotonic()
        if again and spec.awaited:
            self._called_at = role.started

    def _stop_all(self) -> None:
        """End every role within `stop_s`, those that outlive others last and with a fifth of it to go."""
        takers = [role for role in self._roles if role.spec.outlives]
        if takers and not any(role.alive for role in takers):
            for role in self._roles:
                if role.spec.resends and role.process is not None:
                    role.process.kill()
        end = time.monotonic() + self.patience.stop_s
        self._stop([role for role in self._roles if not role.spec.outlives], end - self.patience.stop_s / 5)
        self._stop(takers, end)

    def _stop(self, roles: Sequence[_Running], end: float) -> None:
        stopping = [(role.spec.name, role.process) for role in roles if role.process is not None]
        for _, process in stopping:
            process.terminate()
            process.send_signal(signal.SIGCONT)  # whoever was stopped by hand hears it, too
        began = time.monotonic()
        for name, process in stopping:
            try:
                process.wait(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                self.on_event(f"{name} ignored SIGTERM for {time.monotonic() - began:.2g} s: killed")
                self._reap(name, process)

    def _reap(self, name: str, process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(timeout=_REAP_S)
        except subprocess.TimeoutExpired:
            self.on_event(f"{name} (pid {process.pid}) does not even end by SIGKILL: is its disk broken?")

    def _failure(self, role: _Running, code: int) -> UserError | NumericsError | RoleError:
        log = self._log(role.spec)
        lines = last_lines(log, 12, start=role.log_start)
        own = [line for line in lines if line.startswith(SENTENCE)]
        if code in _FINAL and own:
            return _FINAL[code](own[-1].removeprefix(SENTENCE))
        died = f"{role.spec.name} {_ending(code)}"
        died += f" {role.budget.deaths} times" if role.budget.deaths > 1 else ""
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


def _ending(code: int) -> str:
    """Say how a process ended: by a signal's name or an exit code."""
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL (by hand, or by the system for want of memory)"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if code in (0, STOPPED):
        return "was asked to stop"
    return f"ended with exit code {code}"
