"""Asynchronous against synchronous training to the same success, with slow tools, on this machine.

    slipstream bench asynchrony [-- --rounds N --target S --output FILE key=value ...]

Both arms start from copies of one warm start and share every setting but max_slip, threads and live
episodes. A sweep trains every split of threads once to the target; then the best split of each arm is
trained again, in alternation, once per round and with the round's seed in both arms. The figures are
medians over these rounds alone: the sweep only chooses.

*Time to target* runs from the learner's start, while the actor still loads, to the end of the first step
at which the mean success of the training episodes of the last --window steps reaches the target. Training
episodes and not held-out ones, because each task is posed to one group only and sampled like the held-out
ones: every step measures success on tasks never trained on, at no cost, where an evaluation every k steps
would set the resolution of the clock. An asynchronous arm's episodes are up to max_slip versions old, so
its success is seen late, to its disadvantage. The policies reached are evaluated on fresh tasks, to show
that both arms reached the same success.

Closed form of one step, with T_gen and T_train the seconds in which a batch is generated and trained and
t_sync those of a weight publication:

    synchronous step   =  T_gen + T_train + t_sync        T_gen with the wait for the longest episode
    asynchronous step >=  max(T_gen, T_train) + t_sync    T_gen of an actor never short of episodes,
                                                          key-value caches never rebuilt

T_gen is measured with the warm start, whose episodes are not those of the policies after it: a step may
well be shorter than this closed form.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from _training_runs import Measured, Plan, RunError, Split, generation_seconds, measure, warm_start

from slipstream.errors import UserError

AIM: Final = 0.7
SHARED: Final = (
    # At the recipe's own learning rate a dozen steps reach the target: too few to time.
    "optim.learning_rate=3e-5",
    # Held-out evaluations would take time from both arms and decide nothing here.
    "evaluation.tasks=1",
)
SPLITS: Final = (
    Split(arm="sync", max_slip=0, actors=1, actor_threads=1, learner_threads=2, concurrency=128),
    Split(arm="async", max_slip=4, actors=1, actor_threads=1, learner_threads=1, concurrency=192),
    Split(arm="sync", max_slip=0, actors=2, actor_threads=1, learner_threads=2, concurrency=64),
    Split(arm="async", max_slip=4, actors=2, actor_threads=1, learner_threads=1, concurrency=64),
    Split(arm="sync", max_slip=0, actors=1, actor_threads=2, learner_threads=2, concurrency=128),
    Split(arm="async", max_slip=4, actors=2, actor_threads=1, learner_threads=1, concurrency=96),
    Split(arm="sync", max_slip=0, actors=2, actor_threads=1, learner_threads=1, concurrency=64),
    Split(arm="async", max_slip=4, actors=2, actor_threads=1, learner_threads=1, concurrency=128),
)
"""What the sweep tries. Synchronous roles alternate, so each may use both cores. More live episodes hide
tool calls better and cost more: each one's key-value cache is rebuilt after every weight update."""


def compare(plan: Plan, warm: Path, *, splits: Sequence[Split], rounds: int, seed: int) -> dict[str, Any]:
    """Sweep the splits, then alternate the best of each arm; print each run and return the figures."""
    _say(HEADER)
    sweep = [_shown("sweep", measure(plan, warm, split, seed)) for split in splits]
    best = {arm: min((run for run in sweep if run.split.arm == arm), key=lambda run: run.seconds).split
            for arm in ("sync", "async")}  # fmt: skip
    pairs = [_pair(plan, warm, best, number, seed + number) for number in range(1, rounds + 1)]
    runs = {arm: [pair[arm] for pair in pairs] for arm in best}
    seconds = {arm: statistics.median(run.seconds for run in runs[arm]) for arm in best}
    return {
        "machine": {"cores": os.cpu_count(), "load_at_end": os.getloadavg()[0]},
        "latency_s": plan.latency_s,
        "target": plan.target,
        "window": plan.window,
        "overrides": plan.overrides,
        "best": {arm: split.name for arm, split in best.items()},
        "seconds": seconds,
        "ratio": seconds["async"] / seconds["sync"],
        "ratio_of_rounds": [pair["async"].seconds / pair["sync"].seconds for pair in pairs],
        "fresh_success": {arm: statistics.median(run.success for run in runs[arm]) for arm in best},
        "closed_form": closed_form(plan, warm, sweep, runs, seed),
        "rounds": [asdict(run) for pair in pairs for run in pair.values()],
        "sweep": [asdict(run) for run in sweep],
    }


def closed_form(
    plan: Plan, warm: Path, sweep: Sequence[Measured], runs: dict[str, list[Measured]], seed: int
) -> dict[str, float]:
    """Return the bound of the asynchronous step and the measured steps of both arms, in seconds."""
    split = runs["async"][0].split
    tokens = _median(runs["async"], "tokens")
    # The synchronous learner trains while nothing else runs: T_train, if it has as many threads.
    alone = [run for run in (*sweep, *runs["sync"])
             if run.split.arm == "sync" and run.split.learner_threads == split.learner_threads]  # fmt: skip
    train_s = _median(alone or runs["sync"], "train_s")
    generate_s = generation_seconds(plan, warm, split, seed, tokens)
    sync_s = _median(runs["async"], "sync_s")
    bound_s = max(generate_s, train_s) + sync_s
    sync_step_s, async_step_s = (_median(runs[arm], "step_s") for arm in ("sync", "async"))
    return {
        "T_gen_s": generate_s,
        "T_train_s": train_s,
        "t_sync_s": sync_s,
        "async_bound_s": bound_s,
        "async_step_s": async_step_s,
        "sync_step_s": sync_step_s,
        "step_ratio_bound": bound_s / sync_step_s,
        "step_ratio": async_step_s / sync_step_s,
    }


def _pair(plan: Plan, warm: Path, best: dict[str, Split], number: int, seed: int) -> dict[str, Measured]:
    """Train both arms, the one that begins changing from round to round."""
    order = ("sync", "async") if number % 2 else ("async", "sync")
    return {arm: _shown(f"round {number}", measure(plan, warm, best[arm], seed)) for arm in order}


def _median(runs: Sequence[Measured], name: str) -> float:
    return statistics.median(float(getattr(run, name)) for run in runs)


HEADER: Final = (
    f"{'':<9}{'arm':<7}{'actors+learner':<28}{'to target':>10}{'steps':>7}{'step':>9}"
    f"{'waiting':>9}{'training':>10}{'sync':>9}{'slip':>6}{'fresh':>8}"
)


def _shown(label: str, run: Measured) -> Measured:
    _say(
        f"{label:<9}{run.split.arm:<7}{run.split.name:<28}{run.seconds:>8.1f} s{run.steps:>7}"
        f"{run.step_s:>7.3f} s{run.wait_s:>7.3f} s{run.train_s:>8.3f} s{run.sync_s:>7.3f} s"
        f"{run.slip_mean:>6.2f}{run.success:>8.3f}"
    )
    return run


def _report(figures: dict[str, Any]) -> None:
    form, rounds = figures["closed_form"], len(figures["ratio_of_rounds"])
    tools = f"tools of {figures['latency_s'] * 1000:.0f} ms"
    _say(f"\nmedians of {rounds} rounds, {tools}, success {figures['target']}:")
    for arm in ("sync", "async"):
        seconds, fresh = figures["seconds"][arm], figures["fresh_success"][arm]
        _say(f"  {arm:<6}{seconds:>7.1f} s to target at {figures['best'][arm]}; {fresh:.3f} on fresh tasks")
    _say(f"  ratio {figures['ratio']:.2f}   aim at most {AIM}")
    _say(
        f"a step: sync {form['sync_step_s']:.3f} s; async {form['async_step_s']:.3f} s, closed form "
        f"max(T_gen {form['T_gen_s']:.3f}, T_train {form['T_train_s']:.3f}) + "
        f"t_sync {form['t_sync_s']:.3f} = {form['async_bound_s']:.3f} s\n"
        f"  ratio of steps {form['step_ratio']:.2f}, closed form {form['step_ratio_bound']:.2f}"
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    about = "Asynchronous against synchronous training."
    parser = argparse.ArgumentParser(prog="slipstream bench asynchrony --", description=about)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    parser.add_argument("--recipe", default="research")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--target", type=float, default=0.85, help="success that ends a run")
    parser.add_argument("--window", type=int, default=8, help="steps success is averaged over")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds added to each tool call")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fresh-tasks", type=int, default=1024)
    parser.add_argument("--limit", type=float, default=900.0, help="most seconds of one run")
    parser.add_argument("--first-splits", type=int, default=len(SPLITS), help="splits to sweep, at least 2")
    parser.add_argument("--warm-start", type=Path, help="policy folder, such as RUN/checkpoints/warmup")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the figures; 1 when a run failed or did not reach the target."""
    chosen = _parser().parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory(prefix="asynchrony-") as work:
        plan = Plan(
            recipe=chosen.recipe,
            overrides=(*SHARED, *chosen.overrides),
            latency_s=chosen.latency,
            target=chosen.target,
            window=chosen.window,
            fresh_tasks=chosen.fresh_tasks,
            limit_s=chosen.limit,
            work=Path(work),
        )
        try:
            warm = chosen.warm_start or warm_start(plan, chosen.seed)
            splits = SPLITS[: max(2, chosen.first_splits)]
            figures = compare(plan, warm, splits=splits, rounds=chosen.rounds, seed=chosen.seed)
        except (RunError, UserError) as error:
            sys.stderr.write(f"asynchrony: {error}\n")
            return UserError.exit_code if isinstance(error, UserError) else 1
    _report(figures)
    if chosen.output is not None:
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
