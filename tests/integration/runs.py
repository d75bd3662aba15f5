"""Real runs in processes of their own: small settings, waits with deadlines, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from slipstream import run_folder
from slipstream.config import RunConfig, load_config
from slipstream.metrics import read_rows, rows_of

ROOT = Path(__file__).parents[2]
PATIENCE_S = 600.0
"""Far above what a run needs: it only ends tests that hang."""
TINY = (
    "model.hidden_size=32", "model.layers=1", "model.intermediate_size=64", "model.heads=2",
    "warmup.max_steps=40", "warmup.check_every=40", "warmup.min_success=0", "warmup.target_success=0.5",
    "warmup.batch=16", "warmup.learning_rate=0.01", "batch.groups=4", "batch.group_size=4", "steps=6",
    "evaluation.every=3", "evaluation.tasks=16", "evaluation.final_tasks=16", "checkpoint.every=2",
    "actor.count=1", "actor.concurrency=16", "optim.learning_rate=0.001",
)  # fmt: skip
UNHURRIED = ("steps=12", "environment.tool_latency_s=0.1")
"""Steps long enough that a signal sent in the middle of a run arrives there."""


def tiny_config(*settings: str) -> RunConfig:
    """Return the configuration of a small run."""
    return load_config("research", [*TINY, *settings])


def make_warm_start(folder: Path, *settings: str) -> Path:
    """Warm-start the small policy here, without the launcher and without baselines."""
    from slipstream.environments import environment_factory
    from slipstream.episodes import EpisodeRunner
    from slipstream.model import first_policy, publish_policy
    from slipstream.warmup import WarmStart

    config = tiny_config(*settings)
    factory = environment_factory(config.environment, config.rewards)
    policy = first_policy(config, factory.corpus())
    runner = EpisodeRunner(
        factory=factory, chat=policy.chat, environment=config.environment, rewards=config.rewards
    )
    success, step = WarmStart(policy, runner, config, folder).run()
    publish_policy(folder / "checkpoints" / "warmup", policy, {"step": step, "success": success})
    run_folder.write_json(folder / "baselines.json", {})
    return folder


def until(ready: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Poll a condition; fails naming `what` when it does not come true."""
    end = time.monotonic() + patience_s
    while not ready():
        assert time.monotonic() < end, f"waited {patience_s:g} s for {what} in vain"
        time.sleep(0.02)


class Ended:
    """How a process ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def sentence(self) -> str:
        """What the user reads: one line on stderr, without a traceback."""
        assert self.err.startswith("slipstream: "), self.err
        assert "Traceback" not in self.err, self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.strip().removeprefix("slipstream: ")


class Process:
    """One `slipstream` command."""

    def __init__(self, *arguments: str, log: Path) -> None:
        """Start it in a session of its own, so that signals of the terminal do not reach it."""
        self._paths = log.with_suffix(".out"), log.with_suffix(".err")
        source = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels"))
        with self._paths[0].open("wb") as out, self._paths[1].open("wb") as err:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "slipstream", *arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                # A shell's background job ignores Ctrl-C, and its children would too.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                env={**os.environ, "PYTHONPATH": source},
            )  # fmt: skip

    def end(self, patience_s: float = PATIENCE_S) -> Ended:
        """Wait for its end; a test that fails leaves it to be killed (tests/conftest.py)."""
        try:
            code = self.popen.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            said = "".join(path.read_text(errors="replace") for path in self._paths)
            raise AssertionError(f"no end within {patience_s:g} s:\n{said}") from None
        return Ended(code, *(path.read_text(errors="replace") for path in self._paths))

    def roles(self) -> dict[str, psutil.Process]:
        """Return the launcher's living role processes by role."""
        found = {}
        for child in psutil.Process(self.popen.pid).children():
            try:
                arguments = child.cmdline()
            except psutil.NoSuchProcess:  # it has just ended
                continue
            if "slipstream" in arguments:
                found[arguments[arguments.index("slipstream") + 1]] = child
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send the launcher a signal."""
        self.popen.send_signal(number)


class Run:
    """A run folder and the commands on it."""

    def __init__(self, folder: Path, settings: Sequence[str]) -> None:
        """Train `research` with small settings and these."""
        self.folder, self.settings = folder, (*TINY, *settings)
        self.config = load_config("research", self.settings)
        run_folder.write_config(folder, self.config)
        self._commands = 0

    def start(self, *options: str) -> Process:
        """Start `slipstream train`; the folder holds a warm start, so it is always resumed."""
        return self.command("train", "research", *self.settings, "--resume", *options)

    def resume(self, *options: str) -> Process:
        """Go on as the advice says."""
        return self.command("train", "--resume", *options)

    def command(self, name: str, *arguments: str) -> Process:
        """Start a command on this folder."""
        self._commands += 1
        log = self.folder.with_name(f"{self.folder.name}-{self._commands}.log")
        return Process(name, *arguments, "--output", str(self.folder), log=log)

    def train(self, *options: str) -> None:
        """Train to the end."""
        ended = self.start(*options).end()
        assert ended.code == 0, self.story(ended)

    def steps_done(self) -> int:
        """Return the last step in metrics.jsonl."""
        return max((int(row["step"]) for row in rows_of(read_rows(self.folder), "train")), default=0)

    def reach(self, step: int, process: Process) -> None:
        """Wait until a step is done."""

        def there() -> bool:
            if process.popen.poll() is not None:
                raise AssertionError(self.story(process.end()))
            return self.steps_done() >= step

        until(there, f"step {step} of {self.folder}")

    def story(self, ended: Ended) -> str:
        """Return all that tells why a run ended as it did."""
        logs = [f"{path.name}:\n{path.read_text()[-3000:]}" for path in self.folder.glob("logs/*.log")]
        return "\n".join([f"exit code {ended.code}", ended.out, ended.err, *logs])
