"""Tool time with and without the tool cache, at equal trajectories.

    slipstream bench tool_cache [-- --steps N --latency S --output FILE key=value ...]

Three serial runs of one recipe from copies of one warm start, their tools with the same latency:

    off      every call is a real one
    cold     the cache begins empty and is the run's own
    warm     the file of a run before, as in a sweep of settings or a run that is repeated

Read from the trajectories of all episodes, held-out evaluations included: how many calls were real ones,
the seconds in which tools worked, and the seconds that episodes waited for calls. Of equal calls at one time
only the first is real, and the others wait for it: what tools work is less than what episodes wait. Seeded
failures are real calls, whatever the cache holds, and each task is posed to one group only: a cold cache can
save little more than what the attempts of a group have in common. On a busy machine a latency is longer than
the tool took, since the episode's next turn waits for the processor. The runs must agree in every token,
log-probability, score and weight; the benchmark fails when they do not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from _training_runs import PROGRAM, Plan, RunError, command, warm_start

from slipstream.checkpoint import load_latest
from slipstream.errors import UserError
from slipstream.recorded import stored
from slipstream.run_folder import write_config
from slipstream.types import Trajectory
from slipstream.wire import decode_trajectory

AIM: Final = 5.0
SHORT: Final = ("evaluation.every=4", "evaluation.tasks=128", "evaluation.final_tasks=1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The tool calls of one run; an answer looks nothing up and does not count."""

    arm: str
    episodes: int
    calls: int
    real: int
    """Calls that no cache answered, seeded failures included."""
    tool_seconds: float
    """Seconds in which tools worked: the latencies of the real calls."""
    waited_seconds: float
    """Seconds that episodes waited for calls, cached or not."""


def main(arguments: Sequence[str]) -> int:
    """Run the comparison, print it, and write it where asked."""
    parser = argparse.ArgumentParser(prog="slipstream bench tool_cache", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--recipe", default="research")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of a real call")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tool-cache-") as folder:
        result = compare(chosen, Path(folder))
    sys.stdout.write(report(result))
    if chosen.output is not None:
        chosen.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(chosen: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Train the three arms; raises RunError when they are not equal."""
    plan = Plan(
        recipe=chosen.recipe, overrides=(*SHORT, f"steps={chosen.steps}", *chosen.overrides),
        latency_s=chosen.latency, target=1.0, window=1, fresh_tasks=1, limit_s=3600.0, work=work,
    )  # fmt: skip
    warm, shared = warm_start(plan, 1), work / "shared.sqlite"
    arms = [train(plan, warm, "off", "off"), train(plan, warm, "cold", str(shared))]
    arms.append(train(plan, warm, "warm", str(shared)))
    digests = {digest for _, digest in arms}
    if len(digests) > 1:
        raise RunError("the runs are not equal: trajectories or weights differ")
    off, cold, again = (measured for measured, _ in arms)
    return {
        "recipe": chosen.recipe,
        "overrides": [*plan.overrides],
        "latency_s": chosen.latency,
        "cores": os.cpu_count(),
        "arms": [asdict(measured) for measured in (off, cold, again)],
        "equal": digests.pop(),
        "real_calls_ratio": {each.arm: off.real / each.real for each in (cold, again) if each.real},
        "tool_time_ratio": {
            each.arm: off.tool_seconds / each.tool_seconds for each in (cold, again) if each.tool_seconds
        },
        "waited_ratio": {
            each.arm: off.waited_seconds / each.waited_seconds
            for each in (cold, again)
            if each.waited_seconds
        },
        "aim": AIM,
    }


def train(plan: Plan, warm: Path, arm: str, cache: str) -> tuple[Measured, str]:
    """Train one arm; return what its tools did, and a digest of all that must be equal."""
    folder = plan.work / f"run-{arm}"
    latency = f"environment.tool_latency_s={plan.latency_s}"
    write_config(folder, plan.config(1, latency, f"environment.tool_cache={cache}"))
    shutil.copytree(warm, folder / "checkpoints" / "warmup")
    command([*PROGRAM, "train", "--output", str(folder), "--resume", "--serial"])
    episodes = [decode_trajectory(one.record) for one in stored(folder)]
    calls = [call for one in episodes for call in one.tool_calls if call.name != "answer"]
    real = [call for call in calls if not call.cached]
    measured = Measured(
        arm=arm,
        episodes=len(episodes),
        calls=len(calls),
        real=len(real),
        tool_seconds=sum(call.latency_s for call in real),
        waited_seconds=sum(call.latency_s for call in calls),
    )
    return measured, digest(episodes, load_latest(folder / "checkpoints").path / "model.safetensors")


def digest(episodes: Sequence[Trajectory], weights: Path) -> str:
    """Return what stands for the tokens, log-probabilities, calls and scores of all episodes, and weights."""
    hashed = hashlib.sha256(weights.read_bytes())
    for one in sorted(episodes, key=lambda one: (one.evaluation, one.split, *asdict(one.attempt).values())):
        for array in (one.token_ids, one.loss_mask, one.behavior_logprobs, one.turns, one.turn_rewards):
            hashed.update(array.tobytes())
        calls = [(call.turn, call.name, dict(call.arguments), str(call.status)) for call in one.tool_calls]
        scores = [(score.name, score.value, score.invalid) for score in one.scores]
        hashed.update(repr((one.attempt, str(one.outcome), calls, scores)).encode())
    return hashed.hexdigest()


def report(result: dict[str, Any]) -> str:
    """Return the comparison as text."""
    head = f"{'cache':<6} {'episodes':>9} {'calls':>7} {'real':>7} {'tools worked':>13} {'waited':>9}"
    lines = [f"{result['recipe']}, {result['latency_s']} s a real call", head]
    lines += [
        f"{each['arm']:<6} {each['episodes']:>9,} {each['calls']:>7,} {each['real']:>7,} "
        f"{each['tool_seconds']:>11.1f} s {each['waited_seconds']:>7.1f} s"
        for each in result["arms"]
    ]
    for what, key in (("fewer real calls", "real_calls_ratio"), ("less tool time", "tool_time_ratio")):
        ratios = ", ".join(f"{arm} {ratio:.1f} times" for arm, ratio in result[key].items())
        lines.append(f"{what}: {ratios}")
    lines.append(f"aim: {AIM:g} times; trajectories and weights are equal")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except (RunError, UserError) as error:
        sys.exit(f"bench tool_cache: {error}")
