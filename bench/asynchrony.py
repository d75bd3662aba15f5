"""Asynchronous against synchronous training to the same success, with slow tools, on this machine.

    slipstream bench asynchrony [-- --rounds N --target S --output FILE key=value ...]

Both arms start from copies of one warm start and share every setting but max_slip, threads and live episodes. A sweep first
trains every split of threads once to the target; then the best split of each arm is trained again, in alternation, once per
round and with the round's seed in both arms. Reported are medians over these rounds alone, so that choosing the best split
favours neither arm.

*Time to target* runs from the learner's start, actors still loading, to the end of the first step at which the mean success
of the training episodes of the last WINDOW steps reaches the target. Training episodes, not held-out ones: every task is
posed once and the temperatures are equal, so each step is a held-out measurement of 128 episodes that costs neither arm
anything, while evaluations every few steps would set the resolution of the clock. The asynchronous arm's episodes are up to
max_slip versions old: its success is seen late, to its disadvantage. The policies reached are then evaluated on fresh tasks.

Closed form, for one step: T_gen and T_train are the seconds one batch takes to generate and to train, t_sync those of a
weight publication.

    synchronous step   =  T_gen + T_train + t_sync          T_gen with the wait for the batch's longest episode
    asynchronous step >=  max(T_gen, T_train) + t_sync      T_gen of an actor that is never short of episodes
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from slipstream import config as configuration
from slipstream.checkpoint import load_latest
from slipstream.config import RunConfig
from slipstream.metrics import read_rows, rows_of
from slipstream.run_folder import read_json, write_config, write_json

PROGRAM: Final = (sys.executable, "-m", "slipstream")
TARGET_RATIO: Final = 0.7
POLL_S: Final = 0.1
STOP_S: Final = 60.0
COMMON: Final = (
    # At the recipe's learning rate a dozen steps reach the target: too few to time.
    "optim.learning_rate=2e-4",
    # Held-out evaluations would take time from both arms and decide nothing here.
    "evaluation.tasks=1",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How one arm shares the machine."""

    arm: str
    max_slip: int
    actor_threads: int
    learner_threads: int
    concurrency: int
    """Live episodes of the actor. A synchronous actor never has more than one batch of them."""

    @property
    def name(self) -> str:
        """Return "async 1+1 threads, 256 live"."""
        return f"{self.arm} {self.actor_threads}+{self.learner_threads} threads, {self.concurrency} live"

    def overrides(self) -> tuple[str, ...]:
        """Return the settings that make the split."""
        return (
            f"max_slip={self.max_slip}",
            f"actor.threads={self.actor_threads}",
            f"learner.threads={self.learner_threads}",
            f"actor.concurrency={self.concurrency}",
        )


SPLITS: Final = (
    Split(arm="sync", max_slip=0, actor_threads=1, learner_threads=1, concurrency=128),
    Split(arm="async", max_slip=4, actor_threads=1, learner_threads=1, concurrency=128),
    Split(arm="sync", max_slip=0, actor_threads=2, learner_threads=2, concurrency=128),
    Split(arm="async", max_slip=4, actor_threads=1, learner_threads=1, concurrency=256),
    Split(arm="sync", max_slip=0, actor_threads=1, learner_threads=2, concurrency=128),
    Split(arm="async", max_slip=4, actor_threads=1, learner_threads=2, concurrency=256),
)
"""Every split the sweep tries: three of each arm, in alternation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One training run up to the target."""

    split: Split
    seed: int
    seconds: float
    """Learner's start to target."""
    steps: int
    step_s: float
    """Mean over the steps after the second, as are the next four."""
    wait_s: float
    """The learner's wait for a batch."""
    train_s: float
    sync_s: float
    tokens: float
    """Sampled tokens of a batch."""
    slip_mean: float
    slip_max: int
    fresh_success: float | None = None
    """Success of the policy reached, on fresh tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is compared and how often."""

    recipe: str
    overrides: tuple[str, ...]
    latency_s: float
    target: float
    window: int
    rounds: int
    seed: int
    fresh_tasks: int
    limit_s: float
    """Most seconds of one training run."""
    splits: tuple[Split, ...] = SPLITS
    work: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="asynchrony-")))

    def config(self, *more: str) -> RunConfig:
        """Return the configuration all runs share, with `more` laid over it."""
        return configuration.load_config(self.recipe, [*COMMON, *self.overrides, f"seed={self.seed}", *more])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write the figures; 1 when a run does not reach the target."""
    plan, warm, output = _parsed(arguments)
    try:
        figures = compare(plan, warm or warm_start(plan))
    except RunError as error:
        sys.stderr.write(f"asynchrony: {error}\n")
        return 1
    finally:
        shutil.rmtree(plan.work, ignore_errors=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


class RunError(Exception):
    """A run that failed or did not reach the target."""


def compare(plan: Plan, warm: Path) -> dict[str, Any]:
    """Sweep the splits, then alternate the best of each arm; print as results come and return the figures."""
    _say(f"tools of {plan.latency_s * 1000:.0f} ms, to training success {plan.target} over {plan.window} steps, "
         f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")  # fmt: skip
    sweep = [_shown(measure(plan, warm, split, plan.seed), "sweep") for split in plan.splits]
    best = {arm: min((run for run in sweep if run.split.arm == arm), key=lambda run: run.seconds)
            for arm in ("sync", "async")}  # fmt: skip
    runs = [_shown(measure(plan, warm, best[arm].split, plan.seed + number), f"round {number}")
            for number in range(1, plan.rounds + 1) for arm in _order(number)]  # fmt: skip
    arms = {arm: [run for run in runs if run.split.arm == arm] for arm in best}
    bound = closed_form(plan, sweep, arms)
    ratios = [ours.seconds / theirs.seconds for ours, theirs in zip(arms["async"], arms["sync"], strict=True)]
    seconds = {arm: statistics.median(run.seconds for run in those) for arm, those in arms.items()}
    figures = {
        "latency_s": plan.latency_s,
        "target": plan.target,
        "window": plan.window,
        "settings": [*COMMON, *plan.overrides],
        "cores": os.cpu_count(),
        "best": {arm: run.split.name for arm, run in best.items()},
        "seconds": seconds,
        "ratio": seconds["async"] / seconds["sync"],
        "ratio_of_rounds": statistics.median(ratios),
        "closed_form": bound,
        "rounds": [asdict(run) for run in runs],
        "sweep": [asdict(run) for run in sweep],
    }
    _report(figures, arms)
    return figures


def warm_start(plan: Plan) -> Path:
    """Train the common warm start, without latency, and return its run folder."""
    folder = plan.work / "warm"
    config = plan.config()
    write_config(folder, config)
    _say("warm start ...\n")
    _run([*PROGRAM, "warmup", "--output", str(folder)])
    return folder


def measure(plan: Plan, warm: Path, split: Split, seed: int) -> Measured:
    """Train from the warm start until the target is reached and return the figures of the run."""
    config = plan.config(f"seed={seed}", f"environment.tool_latency_s={plan.latency_s}", *split.overrides())
    folder = Path(tempfile.mkdtemp(prefix=f"{split.arm}-", dir=plan.work))
    write_config(folder, config)
    shutil.copytree(warm / "checkpoints" / "warmup", folder / "checkpoints" / "warmup")
    _train(folder, plan)
    rows = rows_of(read_rows(folder), "train")
    reached = _reached(rows, plan)
    if reached is None:
        raise RunError(f"{split.name}: success {plan.target} not reached in {len(rows)} steps; lower --target")
    until = rows[: reached + 1]
    # The first two steps wait for actors that load and fill their rows.
    steady = until[2:] or until
    step_s = _mean(steady, "seconds/step")
    wait_s = statistics.fmean(row["seconds/step"] * row["wait/learner_starved"] for row in steady)
    sync_s = _mean(steady, "sync/seconds")
    result = Measured(
        split=split,
        seed=seed,
        seconds=until[-1]["time"] - until[0]["time"] + until[0]["seconds/step"],
        steps=len(until),
        step_s=step_s,
        wait_s=wait_s,
        train_s=step_s - wait_s - sync_s,
        sync_s=sync_s,
        tokens=_mean(steady, "tokens/trained"),
        slip_mean=_mean(until, "slip/mean"),
        slip_max=int(max(row["slip/max"] for row in until)),
        fresh_success=_fresh_success(folder, plan),
    )
    shutil.rmtree(folder)
    return result


def generation_seconds(plan: Plan, split: Split, warm: Path, tokens: float) -> float:
    """Return T_gen: seconds in which an actor alone on its threads, always full, samples `tokens` tokens."""
    config = plan.config(f"environment.tool_latency_s={plan.latency_s}", *split.overrides())
    folder = Path(tempfile.mkdtemp(prefix="generation-", dir=plan.work))
    write_config(folder, config)
    out = _run([sys.executable, __file__, "--generate", str(folder), str(warm / "checkpoints" / "warmup")])
    return tokens / float(out)


def closed_form(plan: Plan, sweep: Sequence[Measured], arms: dict[str, list[Measured]]) -> dict[str, float]:
    """Return the bound of the asynchronous step beside the measured steps of both arms, in seconds."""
    split = arms["async"][0].split
    tokens = statistics.median(run.tokens for run in arms["async"])
    # Training undisturbed by generation is what the synchronous arm does, if on the same threads.
    alone = [run for run in sweep if run.split.arm == "sync" and run.split.learner_threads == split.learner_threads]
    train_s = min(run.train_s for run in alone or arms["sync"])
    sync_s = statistics.median(run.sync_s for run in arms["async"])
    generate_s = generation_seconds(plan, split, plan.work / "warm" if plan.work else plan.work, tokens)
    sync_step = statistics.median(run.step_s for run in arms["sync"])
    bound = max(generate_s, train_s) + sync_s
    async_step = statistics.median(run.step_s for run in arms["async"])
    return {
        "T_gen_s": generate_s,
        "T_train_s": train_s,
        "t_sync_s": sync_s,
        "async_step_bound_s": bound,
        "async_step_s": async_step,
        "sync_step_s": sync_step,
        "ratio_bound": bound / sync_step,
        "ratio_of_steps": async_step / sync_step,
    }
