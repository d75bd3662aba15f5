"""Training runs of a benchmark: started from a common warm start, watched, stopped at their target."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from slipstream import config as configuration
from slipstream.checkpoint import load_latest
from slipstream.config import RunConfig
from slipstream.metrics import Row, read_rows, rows_of
from slipstream.run_folder import read_json, write_config

PROGRAM: Final = (sys.executable, "-m", "slipstream")
GENERATION: Final = Path(__file__).with_name("_generation.py")
POLL_S: Final = 0.2
STOP_S: Final = 60.0


class RunError(Exception):
    """A run that failed, or did not reach its target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How one arm shares the machine."""

    arm: str
    max_slip: int
    actors: int
    actor_threads: int
    """Of each actor."""
    learner_threads: int
    concurrency: int
    """Live episodes of each actor; the staleness gate holds synchronous ones to a single batch."""

    @property
    def name(self) -> str:
        """Return "2x1+1 threads, 128 live": the actors', the learner's, all live episodes."""
        threads = f"{self.actors}x{self.actor_threads}+{self.learner_threads} threads"
        return f"{threads}, {self.actors * self.concurrency} live"

    def overrides(self) -> tuple[str, ...]:
        """Return the settings that make the split."""
        return (
            f"max_slip={self.max_slip}",
            f"actor.count={self.actors}",
            f"actor.threads={self.actor_threads}",
            f"learner.threads={self.learner_threads}",
            f"actor.concurrency={self.concurrency}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all runs of a comparison share."""

    recipe: str
    overrides: tuple[str, ...]
    latency_s: float
    """Added to every tool call."""
    target: float
    """Mean success of the training episodes of `window` steps at which a run ends."""
    window: int
    fresh_tasks: int
    """Fresh tasks the policy reached is evaluated on."""
    limit_s: float
    """Most seconds of one run."""
    work: Path
    """Folder of the runs; each is deleted when it has been read."""

    def config(self, seed: int, *more: str) -> RunConfig:
        """Return the configuration all runs share, with `more` laid over it."""
        return configuration.load_config(self.recipe, [*self.overrides, f"seed={seed}", *more])

    def split_config(self, seed: int, split: Split) -> RunConfig:
        """Return the configuration of a run."""
        return self.config(seed, f"environment.tool_latency_s={self.latency_s}", *split.overrides())


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run up to the target; seconds of a step are means over the steps after the second."""

    split: Split
    seed: int
    seconds: float
    """From the learner's start to the target."""
    steps: int
    step_s: float
    wait_s: float
    """The learner's wait for a batch."""
    train_s: float
    sync_s: float
    """The learner's time to publish weights."""
    tokens: float
    """Sampled tokens of a batch."""
    slip_mean: float
    slip_max: int
    success: float
    """Of the policy reached, on fresh tasks."""


def warm_start(plan: Plan, seed: int) -> Path:
    """Train the common warm start, its tools without latency, and return its policy folder."""
    folder = plan.work / "warm"
    write_config(folder, plan.config(seed))
    command([*PROGRAM, "warmup", "--output", str(folder)])
    return folder / "checkpoints" / "warmup"


def measure(plan: Plan, warm: Path, split: Split, seed: int) -> Measured:
    """Train from a copy of the warm start until the target is reached and return the run's figures."""
    folder = plan.work / f"{split.arm}-{time.time_ns()}"
    write_config(folder, plan.split_config(seed, split))
    shutil.copytree(warm, folder / "checkpoints" / "warmup")
    until = _train(folder, plan)
    # The first two steps wait for actors that load and fill their rows.
    steady = until[2:] or until
    step_s = mean(steady, "seconds/step")
    wait_s = statistics.fmean(row["seconds/step"] * row["wait/learner_starved"] for row in steady)
    sync_s = mean(steady, "sync/seconds")
    measured = Measured(
        split=split,
        seed=seed,
        seconds=sum(row["seconds/step"] for row in until),
        steps=len(until),
        step_s=step_s,
        wait_s=wait_s,
        train_s=step_s - wait_s - sync_s,
        sync_s=sync_s,
        tokens=mean(steady, "tokens/trained"),
        slip_mean=mean(until, "slip/mean"),
        slip_max=int(max(row["slip/max"] for row in until)),
        success=_success(folder, plan),
    )
    shutil.rmtree(folder)
    return measured


def generation_seconds(plan: Plan, warm: Path, split: Split, seed: int, tokens: float) -> float:
    """Return the seconds in which actors that are never short of episodes or cores sample `tokens` tokens.

    One is measured, alone on its threads.
    """
    folder = plan.work / "generation"
    configuration_file = folder / "config.toml"
    write_config(folder, plan.split_config(seed, split))
    rate = command([sys.executable, str(GENERATION), str(configuration_file), str(warm)])
    shutil.rmtree(folder)
    return tokens / (float(rate) * split.actors)


def mean(rows: Sequence[Row], name: str) -> float:
    """Return the mean of a metric over rows."""
    return statistics.fmean(float(row[name]) for row in rows)


def command(arguments: Sequence[str]) -> str:
    """Run a command to its end and return what it printed; raises RunError with its last words."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        name, last = " ".join(arguments[1:5]), done.stderr.strip()[-500:]
        raise RunError(f"{name} ended with {done.returncode}: {last}")
    return done.stdout


def _train(folder: Path, plan: Plan) -> list[Row]:
    """Train in a prepared folder; return the rows up to the one that reached the target."""
    output = folder / "train.txt"
    with output.open("wb") as file:
        training = subprocess.Popen(
            [*PROGRAM, "train", "--output", str(folder), "--resume", "--parent", str(os.getpid())],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    end = time.monotonic() + plan.limit_s
    try:
        while not (until := _until(folder, plan)) and training.poll() is None and time.monotonic() < end:
            time.sleep(POLL_S)
    finally:
        _stop(training)
    until = until or _until(folder, plan)
    if not until:
        rows = rows_of(read_rows(folder), "train")
        last = output.read_text(errors="replace").strip()[-500:]
        where = f"{len(rows)} steps of {folder.name}"
        raise RunError(f"success {plan.target} not reached in {where}; last words: {last}")
    return until


def _until(folder: Path, plan: Plan) -> list[Row]:
    """Return the rows up to the first whose window reaches the target, or [] when none does yet."""
    rows = rows_of(read_rows(folder), "train")
    for count in range(plan.window, len(rows) + 1):
        if mean(rows[count - plan.window : count], "success") >= plan.target:
            return rows[:count]
    return []


def _stop(training: subprocess.Popen[bytes]) -> None:
    """Ask the launcher to stop; it saves a checkpoint first."""
    if training.poll() is None:
        training.send_signal(signal.SIGTERM)
    try:
        training.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        training.kill()
        training.wait()


def _success(folder: Path, plan: Plan) -> float:
    """Return the success of the last checkpoint on fresh tasks, its tools without latency."""
    result = folder / "fresh.json"
    checkpoint = load_latest(folder / "checkpoints").path
    overrides = [f"actor.threads={os.cpu_count()}", "environment.tool_latency_s=0.0"]
    recipe = ["--recipe", str(folder / "config.toml")]
    tasks = ["--split", "fresh", "--tasks", str(plan.fresh_tasks)]
    command([*PROGRAM, "eval", str(checkpoint), *overrides, *recipe, *tasks, "--output", str(result)])
    return float(read_json(result)["success"])
