"""The torture rig: a run of real processes, faults at seeded times, and the books afterwards.

Roles are forked from this process, which has imported everything and holds no thread. A fault is drawn
several times a second: SIGKILL at any time, SIGKILL at a system call (shim.py), a torn write, an error of the
disk, SIGSTOP and SIGCONT, and what proxy.py does. Afterwards the faults end, the run must come to its own
end in time, and check.py compares the books. The seed decides which faults come in which order; when a
process is hit by them is the machine's affair.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import check
import proxy
import roles
import shim

from slipstream.config import (
    BatchConfig,
    CheckpointConfig,
    EnvironmentConfig,
    EvaluationConfig,
    HubConfig,
    RunConfig,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do to a run."""

    seed: int
    seconds: float
    bug: str = ""
    patience: float = 1.0
    """Scales all deadlines; a run must end by itself within twice the longest after the last fault."""
    actors: int = 3
    kill_every_s: float = 0.07
    """Mean time between two signals, in the two thirds of the time when there are any."""
    network_rate: float = 25.0
    """Faults of the network per second."""
    network_faults: tuple[str, ...] = proxy.FAULTS
    armed_share: float = 0.35
    """Share of starts that end at a chosen call of the disk."""
    armed_calls: float = 10.0
    """Mean number of that call."""
    armed_roles: tuple[str, ...] = ("hub", "learner", "actor")
    weights: tuple[int, int, int] = (2, 2, 6)
    """How often hub, learner and actors are hit."""
    odd_share: float = 0.03
    """As in roles.Setting."""
    exits: tuple[int, ...] = (10, 11, 12, 13)
    """Exit codes that the faults may bring about."""
    least: int = 60
    """Trajectories that must be made: on a slow machine a run goes on for up to eight times as long."""
    faults: int = 0
    """Faults of all kinds that must be done, in the same way."""
    races: int = 0
    """Pairs of clones that compete for a name (scenarios.py)."""
    durability: str = "process"
    keep: bool = False
    """Keep the folder also when nothing is wrong."""
    disk: Path | None = None
    """A folder to put the run in."""
    fill: bool = False
    """Fill its disk up now and then."""


@dataclass(slots=True, kw_only=True)
class Role:
    """One role and its present process."""

    name: str
    work: Callable[[], int]
    folder: Path
    """What the shim watches."""
    pid: int = 0
    started: float = 0.0
    again_at: float = 0.0
    stopped_until: float = 0.0
    killed: bool = False
    """It was sent SIGKILL."""
    armed: bool = False
    """It may end at a call of the disk."""
    ended: bool = False
    """It has come to its own end."""


@dataclass(kw_only=True)
class Outcome:
    """What a run of the rig came to."""

    seed: int
    bug: str
    faults: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    books: dict[str, int] = field(default_factory=dict)
    hangs: int = 0
    seconds: float = 0.0
    settle_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**self.__dict__, "faults": dict(self.faults), "exits": dict(self.exits)}


def configuration(durability: str, seed: int) -> RunConfig:
    """Return a run of tiny batches in tiny segments."""
    return RunConfig(
        seed=seed % 1000,
        steps=1_000_000,
        max_slip=2,
        batch=BatchConfig(groups=2, group_size=2),
        evaluation=EvaluationConfig(every=20, tasks=3),
        environment=EnvironmentConfig(timeout_s=1.0),
        checkpoint=CheckpointConfig(every=2, keep=2),
        hub=HubConfig(
            lease_timeout_s=2.0,
            credit_bytes=1 << 17,
            segment_bytes=1 << 16,
            retain_bytes=0,
            reserve_bytes=0,
            durability="power" if durability == "power" else "process",
        ),
    )


class Rig:
    """One run under fire."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        """Start the proxy and all roles in an empty folder."""
        self.plan, self.folder = plan, folder
        self.random = random.Random(plan.seed)
        self.outcome = Outcome(seed=plan.seed, bug=plan.bug)
        for name in ("spool", "trajectories", "checkpoints", "log"):
            (folder / name).mkdir(parents=True)
        self.aside = Path(tempfile.mkdtemp(prefix="slipstream-aside-")) if plan.disk else folder
        (self.aside / "oracle").mkdir()
        self.board = proxy.Board()
        listener, address = proxy.listen()
        config = configuration(plan.durability, plan.seed)
        self.setting = setting = roles.Setting(
            folder=folder, aside=self.aside, config=config, address=address, bug=plan.bug,
            patience=plan.patience, odd_share=plan.odd_share,
        )  # fmt: skip
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        seed, rate, faults = self.random.getrandbits(32), plan.network_rate, plan.network_faults
        self.proxy = self._fork(
            "proxy", lambda: proxy.proxy_role(folder, self.board, listener, seed, rate, faults)
        )
        listener.close()
        self.roles = [
            Role(name="hub", folder=folder / "trajectories", work=lambda: roles.hub_role(setting)),
            Role(name="learner", folder=folder / "checkpoints", work=lambda: roles.learner_role(setting)),
        ]
        self.roles += [self.actor(f"a{n}", f"a{n}") for n in range(plan.actors)]
        self.late: list[Role] = []
        """Started when the others have come to their end."""
        self.healing = False
        self.settle_s = 2 * plan.patience * roles.LONGEST_S

    def actor(self, name: str, spool: str) -> Role:
        """Return an actor."""
        setting = self.setting
        return Role(
            name=f"actor-{spool}",
            folder=self.folder / "spool",
            work=lambda: roles.actor_role(setting, name, spool),
        )

    def run(self) -> Outcome:
        """Torture, let settle, check."""
        started = time.monotonic()
        try:
            self.play(started + self.plan.seconds)
            self._settle()
        finally:
            self._end_all()
        self.outcome.seconds = time.monotonic() - started
        self.outcome.faults.update({f"network_{name}": n for name, n in self.board.counts().items()})
        self._check()
        return self.outcome

    def _check(self) -> None:
        roles.keep_log(self.folder / "trajectories", self.folder / "log")
        try:
            verdict = check.check(self.folder, self.aside, drained=not self.outcome.hangs)
        except AssertionError as error:
            self.outcome.wrong.append(str(error))
            return
        self.outcome.wrong += verdict.wrong
        self.outcome.books = verdict.counts

    def play(self, until: float) -> None:
        """Do harm until a moment."""
        self.board["faulty"] = 1
        started = time.monotonic()
        next_fault = started + self.random.expovariate(1 / self.plan.kill_every_s)
        while (now := time.monotonic()) < until or (
            now < until + 7 * self.plan.seconds and self._too_little()
        ):
            self.turn(now)
            if now >= next_fault:
                next_fault = now + self.random.expovariate(1 / self.plan.kill_every_s)
                # A third of the time nobody is hit, so that there is something to lose.
                if (now - started) % 1.8 < 1.2:
                    self._harm(now)
            self.rest(next_fault)
        self.board["faulty"] = 0

    def _too_little(self) -> bool:
        written = sum(path.stat().st_size for path in (self.aside / "oracle").iterdir())
        done = sum(self.outcome.faults.values()) + sum(self.board.counts().values())
        return done < self.plan.faults or written < self.plan.least * 2 * len(f"> {'0' * 20}\n")

    def _harm(self, now: float) -> None:
        hub, learner, actors = self.plan.weights
        role = self.random.choices(
            self.roles, [hub, learner, *[actors / self.plan.actors] * self.plan.actors]
        )[0]
        kind = self.random.choices(["kill", "stop", "fill"], [7, 3, 4 if self.plan.fill else 0])[0]
        pause = self.random.uniform(0.01, 0.4)
        if kind == "fill":
            self._fill()
        elif role.pid and kind == "kill":
            # Also one that stands still: what the others sent it meanwhile is on the way.
            self._kill(role)
        elif role.pid and not role.stopped_until:
            role.stopped_until = now + pause
            os.kill(role.pid, signal.SIGSTOP)
            self.outcome.faults["sigstop"] += 1

    def _kill(self, role: Role) -> None:
        if not role.killed:
            role.killed = True
            os.kill(role.pid, signal.SIGKILL)
            self.outcome.faults["sigkill"] += 1

    def _fill(self) -> None:
        """Fill the disk, or make room again."""
        ballast = self.folder / "ballast"
        if ballast.exists():
            ballast.unlink()
            return
        self.outcome.faults["disk_full"] += 1
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def turn(self, now: float) -> None:
        """Take in who died, start who is due, let go on who was stopped."""
        for role in self.roles:
            if role.pid:
                self._reap(role, now)
            if role.stopped_until and now >= role.stopped_until:
                role.stopped_until = 0.0
                if role.pid:
                    os.kill(role.pid, signal.SIGCONT)
            if not role.pid and not role.ended and now >= role.again_at:
                self._start(role, now)

    def rest(self, until: float) -> None:
        """Sleep, or be woken by a death."""
        signal.sigtimedwait([signal.SIGCHLD], max(0.0, min(until - time.monotonic(), 0.05)))

    def _start(self, role: Role, now: float) -> None:
        arm = self._armed(role) if not self.healing and self.random.random() < self.plan.armed_share else None
        role.killed, role.armed, role.started = False, arm is not None, now

        def work() -> int:
            if arm is not None:
                arm()
            return role.work()

        role.pid = self._fork(role.name, work)

    def _armed(self, role: Role) -> Callable[[], None] | None:
        if not shim.loaded() or role.name.split("-")[0] not in self.plan.armed_roles:
            return None
        what = self.random.choices(["kill_before", "kill_after", "torn", "fail", "short"], [3, 3, 3, 1, 1])[0]
        when = int(self.random.expovariate(1 / self.plan.armed_calls)) + 1
        error = self.random.choice([errno.EIO, errno.ENOSPC])
        return lambda: shim.arm(role.folder, when=when, what=what, error=error)

    def _reap(self, role: Role, now: float) -> None:
        pid, status = os.waitpid(role.pid, os.WNOHANG)
        if not pid:
            return
        role.pid, role.stopped_until = 0, 0.0
        role.again_at = now + self.random.uniform(0.0, 0.03)
        code = os.waitstatus_to_exitcode(status)
        self.outcome.exits[f"{role.name.split('-')[0]} {code}"] += 1
        if code == -signal.SIGKILL and (role.killed or role.armed):
            self.outcome.faults["syscall_kill"] += not role.killed
        elif code == 0 and self.setting.finishing.exists():
            role.ended = True
        elif code not in self.plan.exits:
            self.outcome.wrong.append(f"{role.name} ended with {code}: {self._last_words(role.name)}")
        if code > 0:
            role.again_at = now + self.random.uniform(0.05, 0.2)

    def _last_words(self, name: str) -> str:
        path = self.aside / f"{name}.err"
        return path.read_text()[-2500:] if path.exists() else ""

    def _settle(self) -> None:
        """End all faults; the run must come to its own end in time."""
        started = time.monotonic()
        self.healing = True
        (self.folder / "ballast").unlink(missing_ok=True)
        for role in self.roles:
            role.stopped_until = min(role.stopped_until, started)
            # Whoever is armed still would die during the settling.
            if role.pid and role.armed:
                self._kill(role)
        if self.plan.network_rate:
            self.board["heals"] += 1
        self.setting.finishing.touch()
        while waiting := [role for role in self.roles[1:] if not role.ended] or self._next_late():
            now = time.monotonic()
            self.turn(now)
            self.rest(now + 0.05)
            if now - started > self.settle_s:
                self._hung(waiting)
                return
        self.outcome.settle_s = time.monotonic() - started
        hub = self.roles[0]
        hub.ended = True
        if hub.pid:
            os.kill(hub.pid, signal.SIGTERM)
            os.waitpid(hub.pid, 0)
            hub.pid = 0

    def _next_late(self) -> list[Role]:
        role = [self.late.pop(0)] if self.late else []
        self.roles += role
        return role

    def _hung(self, who: list[Role]) -> None:
        self.outcome.hangs += len(who)
        for role in self.roles:
            if role.pid:
                os.kill(role.pid, signal.SIGUSR1)
        time.sleep(0.2)
        names = ", ".join(role.name for role in who)
        words = "\n".join(f"{role.name}: {self._last_words(role.name)}" for role in self.roles)
        self.outcome.wrong.append(
            f"hang: {names} did not end within {self.settle_s:g} s after the last fault\n{words}"
        )

    def _end_all(self) -> None:
        for pid in [self.proxy, *(role.pid for role in self.roles)]:
            if pid:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _fork(self, name: str, work: Callable[[], int]) -> int:
        pid = os.fork()
        if pid == 0:
            roles.run_role(self.setting, name, work)
        return pid


def torture(plan: Plan, kind: type[Rig] = Rig) -> Outcome:
    """Run one plan in a folder of its own, which is kept when something is wrong."""
    home = plan.disk or (Path("/dev/shm") if Path("/dev/shm").is_dir() else None)
    folder = Path(tempfile.mkdtemp(prefix="slipstream-torture-", dir=home))
    os.environ["SLIPSTREAM_TORTURE_MARK"] = str(folder / "mark")
    outcome = kind(plan, folder).run()
    if outcome.wrong or plan.keep:
        outcome.wrong.insert(0, f"seed {plan.seed}, folder {folder}")
    else:
        shutil.rmtree(folder)
    return outcome
