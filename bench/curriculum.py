"""Training with a curriculum against training without, to the same held-out success.

    slipstream bench curriculum [-- --seeds N --first SEED --target S --warm S --output FILE key=value ...]

For each seed one warm start is trained, and both arms start from copies of it: the recipe as it is, and the
recipe with `curriculum.enabled = false`. All else is equal, the learning-rate schedule among it. A run ends
when the mean of its last --window held-out evaluations reaches the target, or with its last step.

*Trajectories to target* are those that were made until the evaluated weights were: filtered, dropped and
failed ones count, for the actors have paid for them too. With `--warm S` the warm start stops at that
success, which may lie below `warmup.min_success`: the limit is lowered, so that both arms run.

Steps to target differ little between the arms: what a small group saves is trajectories per step. Fixed small
groups, `curriculum.enabled=false batch.group_size=2`, are the control that tells this from their growth.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from _training_runs import POLL_S, PROGRAM, RunError, _stop, command

from slipstream import config as configuration
from slipstream.errors import UserError
from slipstream.metrics import Row, read_rows, rows_of
from slipstream.run_folder import write_config

RATIO: Final = 0.7
ARMS: Final = {"curriculum": "curriculum.enabled=true", "plain": "curriculum.enabled=false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run."""

    arm: str
    seed: int
    warm_start: float
    """Held-out success of the warm start."""
    reached: bool
    step: int
    """Of the evaluation that reached the target, or the last one."""
    made: int
    """Trajectories made until then."""
    trained: int
    success: float
    """Mean of the last evaluations then."""
    stages: list[tuple[int, int]]
    """(step from which on, stage)."""
    curve: list[tuple[int, float]]
    """(step, held-out success)."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all runs share."""

    recipe: str
    overrides: tuple[str, ...]
    target: float
    window: int
    """Evaluations whose mean must reach it."""
    warm: float
    """Success at which the warm start stops; 0: as the recipe says."""
    limit_s: float
    work: Path

    def settings(self, seed: int) -> list[str]:
        """Return the overrides of every run of a seed."""
        warm = [f"warmup.target_success={self.warm}", "warmup.min_success=0.0", "warmup.min_steps=0",
                "warmup.check_every=10", "warmup.max_success=1.0"] if self.warm else []  # fmt: skip
        return [*self.overrides, *warm, f"seed={seed}"]


def compare(plan: Plan, seeds: Sequence[int], output: Path | None) -> dict[str, Any]:
    """Train both arms of each seed, print each run and return the figures, written after each seed."""
    runs: list[Measured] = []
    found = figures(plan, runs)
    for seed in seeds:
        runs += pair(plan, seed)
        found = figures(plan, runs)
        if output:
            output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def figures(plan: Plan, runs: Sequence[Measured]) -> dict[str, Any]:
    """Return what the runs of all seeds say."""
    arms = {arm: [run for run in runs if run.arm == arm] for arm in ARMS}
    ratios = [
        ours.made / other.made if ours.reached and other.reached else None
        for ours, other in zip(arms["curriculum"], arms["plain"], strict=True)
    ]
    known = [ratio for ratio in ratios if ratio is not None]
    return {
        "machine": {"cores": os.cpu_count(), "load_at_end": os.getloadavg()[0]},
        "recipe": plan.recipe,
        "overrides": plan.overrides,
        "target": plan.target,
        "window": plan.window,
        "warm": plan.warm,
        "reached": {arm: sum(run.reached for run in found) for arm, found in arms.items()},
        "ratio_of_seeds": ratios,
        "ratio": statistics.median(known) if known else None,
        "seeds_within": sum(ratio <= RATIO for ratio in known),
        "runs": [asdict(run) for run in runs],
    }


def pair(plan: Plan, seed: int) -> list[Measured]:
    """Train both arms of a seed from one warm start."""
    warm = plan.work / f"warm-{seed}"
    # The curriculum changes nothing in a warm start but whether a weak one may go on.
    write_config(warm, configuration.load_config(plan.recipe, [*plan.settings(seed), ARMS["curriculum"]]))
    command([*PROGRAM, "warmup", "--output", str(warm)])
    runs = [shown(measure(plan, warm, arm, seed)) for arm in ARMS]
    shutil.rmtree(warm)
    return runs


def measure(plan: Plan, warm: Path, arm: str, seed: int) -> Measured:
    """Train one arm from a copy of the warm start until the target is reached or its steps are over."""
    folder = plan.work / f"{arm}-{seed}"
    write_config(folder, configuration.load_config(plan.recipe, [*plan.settings(seed), ARMS[arm]]))
    shutil.copytree(warm / "checkpoints" / "warmup", folder / "checkpoints" / "warmup")
    shutil.copy(warm / "baselines.json", folder)
    began = time.monotonic()
    _train(plan, folder)
    rows = read_rows(folder)
    evaluations, train = rows_of(rows, "evaluation"), rows_of(rows, "train")
    at = reached(evaluations, plan) or evaluations
    if not at:
        raise RunError(
            f"{folder.name} ended without an evaluation: {(folder / 'train.txt').read_text()[-500:]}"
        )
    step = int(at[-1]["step"])
    made = [row for row in train if int(row["step"]) <= step]
    staged = [(int(row["step"]), int(row.get("curriculum/stage", -1))) for row in made]
    measured = Measured(
        arm=arm,
        seed=seed,
        warm_start=float(rows_of(read_rows(warm), "warmup")[-1]["success"]),
        reached=bool(reached(evaluations, plan)),
        step=step,
        made=int(made[-1]["hub/made"]) if made else 0,
        trained=int(sum(row["trajectories"] for row in made)),
        success=statistics.fmean(float(row["success"]) for row in at[-plan.window :]),
        stages=[now for before, now in zip([(0, -2), *staged], staged, strict=False) if before[1] != now[1]],
        curve=[(int(row["step"]), float(row["success"])) for row in evaluations],
        seconds=time.monotonic() - began,
    )
    shutil.rmtree(folder)
    return measured


def reached(evaluations: Sequence[Row], plan: Plan) -> list[Row]:
    """Return the evaluations up to the first window whose mean reaches the target, or []."""
    for count in range(plan.window, len(evaluations) + 1):
        window = evaluations[count - plan.window : count]
        if statistics.fmean(float(row["success"]) for row in window) >= plan.target:
            return list(evaluations[:count])
    return []


def _train(plan: Plan, folder: Path) -> None:
    with (folder / "train.txt").open("wb") as file:
        training = subprocess.Popen(
            [*PROGRAM, "train", "--output", str(folder), "--resume", "--parent", str(os.getpid())],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    end = time.monotonic() + plan.limit_s
    try:
        while training.poll() is None and time.monotonic() < end:
            if reached(rows_of(read_rows(folder), "evaluation"), plan):
                break
            time.sleep(POLL_S)
    finally:
        _stop(training)


def shown(run: Measured) -> Measured:
    """Print a run in one line."""
    what = "reached" if run.reached else "ended at"
    sys.stdout.write(
        f"seed {run.seed} {run.arm:<11} from {run.warm_start:.2f}: {what} {run.success:.3f} at step "
        f"{run.step}, {run.made} made, {run.trained} trained, stages {run.stages}, {run.seconds:.0f} s\n"
    )
    sys.stdout.flush()
    return run


def main() -> int:
    """Compare, print and write the figures; returns 1 when the aim is missed."""
    parser = argparse.ArgumentParser(description="Trajectories to target with a curriculum and without.")
    parser.add_argument("--recipe", default="research-curriculum")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--window", type=int, default=2, help="evaluations whose mean must reach it")
    parser.add_argument("--warm", type=float, default=0.0, help="success at which the warm start stops")
    parser.add_argument("--limit", type=float, default=1800.0, help="most seconds of one run")
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    chosen = parser.parse_args()
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    with tempfile.TemporaryDirectory() as work:
        plan = Plan(
            recipe=chosen.recipe, overrides=("evaluation.every=3", *chosen.overrides), target=chosen.target,
            window=chosen.window, warm=chosen.warm, limit_s=chosen.limit, work=Path(work),
        )  # fmt: skip
        try:
            found = compare(plan, seeds, chosen.output)
        except (RunError, UserError) as error:
            sys.stderr.write(f"{error}\n")
            return 2
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0 if found["seeds_within"] >= 0.8 * chosen.seeds else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
