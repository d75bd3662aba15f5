"""Floor 6. Runs a training run from its start to its summary on one machine.

1 warm start    warmup                       skipped when checkpoints/warmup verifies
2 training      hub, actors, learner         or everything in this process with `serial`
3 final         eval best, eval last         both at once, on fresh tasks
4 summary       summary.json, learning_curve.png

Whichever of its processes dies, the run goes on (supervisor.py). Exit codes: 0 done, 1 failed, 2 a mistake
of the user, 3 numbers that stay non-finite, 130 stopped by a signal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slipstream import doctor, fork, run_folder, summary, versions
from slipstream import hub as hub_role
from slipstream.audit import audit
from slipstream.checkpoint import load_latest, verify
from slipstream.config import RunConfig
from slipstream.environments import environment_factory
from slipstream.errors import CheckpointError, ConfigurationError, RoleError, StorageError, disk_failure
from slipstream.flight_recorder import FOLDER
from slipstream.fork import Fork
from slipstream.inference.vllm.serving import check_installed
from slipstream.metrics import FILE as METRICS
from slipstream.programs import check_program
from slipstream.rendezvous import expect_hub, known_address
from slipstream.restarts import count_restart
from slipstream.stop_signals import StoppedBySignal, raising_signals
from slipstream.supervisor import Patience, RoleSpec, Supervisor
from slipstream.tools.cache import in_folder
from slipstream.tracking.keeper import Tracking
from slipstream.types import Split

if TYPE_CHECKING:
    from slipstream.display import Screen

PROGRAM = (sys.executable, "-m", "slipstream")
BOOK_S = 5.0
"""Seconds between two bookings of a stage's time."""
INTERRUPTED = 130
"""Exit code after a signal, as shells have it for SIGINT."""


def train(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool,
    serial: bool,
    screen: Screen,
    other_versions: bool = False,
    program: Sequence[str] = PROGRAM,
    patience: Patience | None = None,
    forked: Fork | None = None,
) -> int:
    """Run all stages in `folder` and return the exit code.

    `forked` is what another run gives it for a warm start; `program` is the command that understands `hub`,
    `actor`, `learner`, `warmup` and `eval`; `other_versions` goes on with other packages or data than the run
    began with.

    Raises: RunFolderError when the folder cannot be used or was begun with other versions; UserError,
    NumericsError or RoleError when a role ended the run, the latter saying how to go on.
    """
    factory = environment_factory(config.environment, config.rewards)
    factory.close()
    if config.agent.program:
        check_program(config.agent.program)
    if config.inference.backend == "vllm":
        check_installed()
        if serial:
            raise ConfigurationError(
                "--serial samples in its own process; leave inference.backend=vllm or --serial out"
            )
    with (
        raising_signals(),
        run_folder.opened(folder, config, resume=resume),
        screen,
        Tracking(config.tracking, folder, on_event=screen.event) as tracking,
    ):
        for difference in versions.hold(folder, versions.present(factory.versions), accept=other_versions):
            screen.event(f"going on with another version: {difference}")
        if forked is not None:
            fork.begin(forked, folder)
            screen.event(f"begins with the policy of {forked.run}, {forked.source.name}")
        run = _Run(config, folder, screen, tracking)
        run.supervisor = Supervisor(
            folder=folder,
            program=program,
            on_event=screen.event,
            on_tick=run.tick,
            on_stall=run.examine_stall,
            on_restart=lambda role: count_restart(folder, role),
            progress=run.progress,
            patience=patience or patience_of(config),
        )
        try:
            run.stages(serial=serial)
        except StoppedBySignal as stop:
            screen.event(f"stopped by {stop}; {_advice(folder)}")
            return INTERRUPTED
        except KeyboardInterrupt:  # no roles run: serial mode, or between two stages
            screen.event(f"stopped by SIGINT; {_advice(folder)}")
            return INTERRUPTED
        except (RoleError, StorageError) as error:
            raise type(error)(f"{error}\n{_advice(folder)}") from None
        except OSError as error:
            raise StorageError(f"{disk_failure(error)}\n{_advice(folder)}") from None
    return 0


def patience_of(config: RunConfig) -> Patience:
    """Return the deadlines and pauses that a configuration asks for."""
    return Patience(
        stall_s=config.stall_timeout_s,
        stop_s=config.supervision.grace_s,
        backoff_s=config.supervision.backoff_s,
    )


class _Run:
    """The stages of one run, with the seconds each has taken over all resumes."""

    supervisor: Supervisor

    def __init__(self, config: RunConfig, folder: Path, screen: Screen, tracking: Tracking) -> None:
        self._config, self._folder, self._screen, self._tracking = config, folder, screen, tracking
        self._name, self._since = "", 0.0
        self._hub = ""
        """Where the hub listened when its clients were last started."""

    def stages(self, *, serial: bool) -> None:
        """Run what is still to be done."""
        with self._stage("warm start"):
            self._warm_start()
        self._check_checkpoints()
        with self._stage("training"):
            self._train_serially() if serial else self._train()
        with self._stage("final evaluation"):
            self._evaluate()
        with self._stage("learning curve"):
            audited = audit(self._folder)
            for finding in audited.findings:
                self._screen.event(
                    f"the books do not balance: {finding}; keep the run folder and report this"
                )
            summary.write_summary(self._config, self._folder, audited)
            from slipstream.plots import learning_curve

            learning_curve(self._folder)
        result = summary.write_summary(self._config, self._folder, audited)
        self._screen.finish(result)

    def _warm_start(self) -> None:
        warm = self._folder / "checkpoints" / "warmup"
        try:
            verify(warm)
        except CheckpointError as error:
            if (self._folder / "trajectories").exists():
                raise CheckpointError(
                    f"the warm start that this run began with is damaged: {error}; restore "
                    f"{warm} from a copy, or choose another --output"
                ) from None
            fork.check_begun(self._folder)
            if warm.exists():
                self._screen.event(f"the warm start is made again: {error}")
            threads = self._config.actor.threads + self._config.learner.threads
            self.supervisor.supervise([self._spec("warmup", threads=threads)])
            verify(warm)

    def _check_checkpoints(self) -> None:
        """Refuse to go on when every checkpoint is damaged; say so when only the newest are."""
        checkpoints = self._folder / "checkpoints"
        newest = max(checkpoints.glob("step-*"), default=None)
        if newest is None:
            return
        found = load_latest(checkpoints).path
        if found != newest:
            self._screen.event(f"{newest} is damaged; going on from {found.name}")

    def _train(self) -> None:
        expect_hub(self._folder)  # an old address would find nobody
        config, self._hub = self._config, ""
        actors = [
            self._spec(
                "actor", "--name", f"actor-{index}", index=index, threads=config.actor.threads,
                restarts=config.supervision.actor_restarts, awaited=False, resends=True,
            )
            for index in range(config.actor.count)
        ]  # fmt: skip
        hub = self._spec("hub", awaited=False, outlives=True)
        learner = self._spec("learner", threads=config.learner.threads)
        servers = [self._spec("serve", awaited=False)] if config.inference.backend == "vllm" else []
        self.supervisor.supervise([hub, *servers, *actors, learner])
        if known_address(self._folder):  # the hub died behind the learner's end: its status is not its last
            hub_role.settle(config, self._folder)

    def _train_serially(self) -> None:
        from slipstream import serial

        serial.run(self._config, self._folder)

    def _evaluate(self) -> None:
        checkpoints, config = self._folder / "checkpoints", self._config
        targets = [(load_latest(checkpoints).path, summary.FINAL_LAST, config.learner.threads)]
        best = checkpoints / "best"
        if best.exists():
            verify(best)
            targets.append((best, summary.FINAL_BEST, config.actor.threads))
        specs = [
            RoleSpec(
                role="eval",
                index=index,
                threads=threads,
                restarts=config.supervision.restarts,
                arguments=(
                    "eval", str(path),
                    "--recipe", str(self._folder / run_folder.CONFIG),
                    "--split", Split.FRESH.value,
                    "--tasks", str(config.evaluation.final_tasks),
                    "--temperature", str(config.evaluation.temperature),
                    "--output", str(self._folder / file),
                    "--flight", str(self._folder / FOLDER / f"eval-{index}.ring"),
                    f"environment.tool_cache={in_folder(config.environment, self._folder).tool_cache}",
                ),
            )
            for index, (path, file, threads) in enumerate(targets)
        ]  # fmt: skip
        self.supervisor.supervise(specs)

    def _spec(
        self,
        role: str,
        *more: str,
        index: int = 0,
        threads: int = 1,
        restarts: int | None = None,
        awaited: bool = True,
        outlives: bool = False,
        resends: bool = False,
    ) -> RoleSpec:
        return RoleSpec(
            role=role,
            index=index,
            arguments=(role, "--output", str(self._folder), *more),
            threads=threads,
            restarts=self._config.supervision.restarts if restarts is None else restarts,
            awaited=awaited,
            outlives=outlives,
            resends=resends,
        )

    def examine_stall(self, name: str) -> str:
        """Keep the doctor's report on a role that is about to be killed for its silence."""
        path = self._folder / FOLDER / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.stall"
        report, _ = doctor.examine(self._folder, stalled=name)
        path.write_text(report, encoding="utf-8")
        return f"what it was doing: {path}"

    def progress(self) -> tuple[str, object, int]:
        """Return what differs once the run has got on: stage, optimizer steps, rows of metrics."""
        rows = self._folder / METRICS
        version = run_folder.read_json(self._folder / "status.json").get("version")
        return self._name, version, rows.stat().st_size if rows.exists() else 0

    def tick(self) -> None:
        """Refresh the screen, look after the hub's clients; book the seconds, so that kill -9 loses few."""
        self._screen.refresh()
        self._tracking.look()
        self._follow_hub()
        if time.monotonic() - self._since > BOOK_S:
            self._book_seconds()

    def _follow_hub(self) -> None:
        """Start the hub's clients again when it came back elsewhere: they would ask a dead address."""
        address = known_address(self._folder)
        if address and self._hub and address != self._hub:
            for role in ("actor", "learner", "serve"):
                self.supervisor.renew(role, f"the hub has moved to {address}")
        self._hub = address or self._hub

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Show a stage and add its seconds to times.json, however it ends."""
        self._screen.stage(name)
        self._name, self._since = name, time.monotonic()
        try:
            yield
        finally:
            self._book_seconds()

    def _book_seconds(self) -> None:
        path = self._folder / summary.TIMES
        times, now = run_folder.read_json(path), time.monotonic()
        times[self._name] = times.get(self._name, 0.0) + now - self._since
        try:
            run_folder.write_json(path, times)
        except OSError as error:
            disk_failure(error)
            return  # booked next time; a role that needs the disk says that it is full
        self._since = now


def _advice(folder: Path) -> str:
    return f"continue with: slipstream train --output {folder} --resume"
