"""Tool time with and without the tool cache, at equal trajectories.

    slipstream bench tool_cache [-- --steps N --latency S --run FOLDER --output FILE key=value ...]

    off      every call is a real one
    cold     the cache begins empty and is the run's own
    warm     the file of a run before, as in a sweep of settings or a run that is repeated

First a run of the recipe's whole length, `--run` or a new one: its episodes are played again from what the
policy said, by as many processes as the run had actors, with as many live episodes each, in the order in
which they began; each must be equal to its record. That costs no policy, and counts what a whole run calls.

Then three short serial runs of the recipe from copies of that run's warm start, their tools with the same
latency. They must agree in every weight, and in every token, log-probability and score of what was trained
or evaluated.

Read from the trajectories of all episodes, held-out evaluations included: how many calls were real ones, and,
of the short runs, the seconds in which tools worked and those that episodes waited for calls. Of equal calls
at one time only the first is real, and the others wait for it: what tools work is less than what episodes
wait, and in a cold run, where the attempts of a group ask alike at one time, they wait no less. Seeded
failures take the same latency, whatever the cache holds; `without_failures` leaves them out on both sides,
since no tool is called for them. Each task is posed to one group only: a cold cache saves what the attempts
of a group have in common. Seconds last until the episode's next turn has the processor, which on a busy
machine is most of them: calls are exact.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from _parts import line_of, tell
from _training_runs import PROGRAM, Plan, RunError, command

from slipstream.checkpoint import load_latest
from slipstream.config import ActorConfig
from slipstream.errors import UserError
from slipstream.events import Trained
from slipstream.ingest import read_events
from slipstream.recorded import stored
from slipstream.run_folder import read_config, write_config
from slipstream.types import Trajectory
from slipstream.wire import decode_trajectory

AIM: Final = 5.0
PLAYER: Final = Path(__file__).with_name("_tool_calls.py")
SHORT: Final = ("evaluation.every=4", "evaluation.tasks=128", "evaluation.final_tasks=1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """The tool calls of one run; an answer looks nothing up and does not count."""

    arm: str
    episodes: int
    calls: int
    real: int
    """Calls that no cache answered, seeded failures included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(Calls):
    """What the calls of a run took beside."""

    tool_seconds: float
    """Seconds in which tools worked: the latencies of the real calls."""
    waited_seconds: float
    """Seconds that episodes waited for calls, cached or not."""


def main(arguments: Sequence[str]) -> int:
    """Run the comparison, print it, and write it where asked."""
    parser = argparse.ArgumentParser(prog="slipstream bench tool_cache", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--recipe", default="research")
    parser.add_argument("--steps", type=int, default=4, help="of the short runs")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of a real call")
    parser.add_argument("--run", type=Path, help="of whole length; without one it is trained here")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tool-cache-") as folder:
        work = Path(folder)
        run = chosen.run or whole_run(chosen.recipe, chosen.overrides, work)
        result = {
            "recipe": chosen.recipe,
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "whole": play_again(run, chosen.latency, work),
            "short": compare(chosen, run / "checkpoints" / "warmup", work),
            "aim": AIM,
        }
    sys.stdout.write(report(result))
    if chosen.output is not None:
        chosen.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(chosen: argparse.Namespace, warm: Path, work: Path) -> dict[str, Any]:
    """Train the three arms; raises RunError when they are not equal."""
    plan = Plan(
        recipe=chosen.recipe, overrides=(*SHORT, f"steps={chosen.steps}", *chosen.overrides),
        latency_s=chosen.latency, target=1.0, window=1, fresh_tasks=1, limit_s=3600.0, work=work,
    )  # fmt: skip
    shared = work / "shared.sqlite"
    arms = [train(plan, warm, "off", "off"), train(plan, warm, "cold", str(shared))]
    arms.append(train(plan, warm, "warm", str(shared)))
    digests = {digest for _, digest in arms}
    if len(digests) > 1:
        raise RunError("the runs are not equal: trajectories or weights differ")
    measured = [measured for measured, _ in arms]
    return {
        "overrides": [*plan.overrides],
        "latency_s": plan.latency_s,
        "equal": digests.pop(),
        **compared(measured),
    }


def whole_run(recipe: str, overrides: Sequence[str], work: Path) -> Path:
    """Train a recipe; return its folder."""
    folder = work / "whole"
    command([*PROGRAM, "train", recipe, *overrides, "--output", str(folder)])
    return folder


def play_again(folder: Path, latency_s: float, work: Path) -> dict[str, Any]:
    """Play all episodes of a run again, with each cache; raises RunError when one is not as it was."""
    config, shared = read_config(folder), str(work / "whole.sqlite")
    caches = {"off": "off", "cold": shared, "warm": shared}
    arms = [played(folder, arm, cache, latency_s, config.actor) for arm, cache in caches.items()]
    settings = {
        "latency_s": latency_s,
        "steps": config.steps,
        "actors": config.actor.count,
        "live": config.actor.concurrency,
    }
    return {**settings, **compared(arms)}


def played(folder: Path, arm: str, cache: str, latency_s: float, actor: ActorConfig) -> Calls:
    """Play the episodes of each actor in a process of its own, all at one time."""
    players = [
        subprocess.Popen(
            [sys.executable, str(PLAYER), str(folder), f"actor-{number}", cache, str(latency_s),
             str(actor.concurrency)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(actor.count)
    ]  # fmt: skip
    try:
        for player in players:
            if line_of(player) != "ready":
                raise RunError(f"{folder}: an actor's episodes cannot be played again")
        for player in players:
            tell(player)
        told = [json.loads(line_of(player) or "null") for player in players]
    finally:
        for player in players:
            player.kill()
            player.communicate()
    if None in told:
        raise RunError(f"{folder}: an episode is not as it was")
    return Calls(arm=arm, **{name: sum(each[name] for each in told) for name in told[0]})


def compared(arms: Sequence[Calls]) -> dict[str, Any]:
    """Return the arms and how many times less the caches took; what a warm one calls are the failures."""
    off, cold, warm = arms
    failures = warm.real

    def ratios(what: Callable[[Any], float]) -> dict[str, float]:
        return {each.arm: what(off) / what(each) for each in (cold, warm) if what(each)}

    told = {
        "arms": [asdict(each) for each in arms],
        "real_calls_ratio": ratios(lambda each: each.real),
        "without_failures_ratio": ratios(lambda each: each.real - failures),
    }
    if isinstance(off, Measured):
        told["tool_time_ratio"] = ratios(lambda each: each.tool_seconds)
        told["waited_ratio"] = ratios(lambda each: each.waited_seconds)
    return told


def train(plan: Plan, warm: Path, arm: str, cache: str) -> tuple[Measured, str]:
    """Train one arm; return what its tools did, and a digest of all that must be equal."""
    folder = plan.work / f"run-{arm}"
    latency = f"environment.tool_latency_s={plan.latency_s}"
    write_config(folder, plan.config(1, latency, f"environment.tool_cache={cache}"))
    shutil.copytree(warm, folder / "checkpoints" / "warmup")
    command([*PROGRAM, "train", "--output", str(folder), "--resume", "--serial"])
    episodes = used(folder)
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


def used(folder: Path) -> list[Trajectory]:
    """Return the episodes that were trained or evaluated; what else runs at the end is a matter of time."""
    log = folder / "trajectories"
    trained = {
        identity
        for entry in read_events(log)
        if isinstance(entry.event, Trained)
        for identity in entry.event.identities
    }
    episodes = [decode_trajectory(one.record) for one in stored(folder)]
    return [one for one in episodes if one.evaluation >= 0 or one.identity in trained]


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
    lines = []
    for part in ("whole", "short"):
        found = result[part]
        lines.append(f"{result['recipe']}, {part}, {found['latency_s']} s a real call")
        lines.append(f"{'cache':<6} {'episodes':>9} {'calls':>7} {'real':>7}")
        for each in found["arms"]:
            lines.append(f"{each['arm']:<6} {each['episodes']:>9,} {each['calls']:>7,} {each['real']:>7,}")
            if "tool_seconds" in each:
                worked, waited = each["tool_seconds"], each["waited_seconds"]
                lines[-1] += f"   tools worked {worked:,.1f} s, episodes waited {waited:,.1f} s"
        for what, key in (
            ("fewer real calls", "real_calls_ratio"),
            ("without seeded failures", "without_failures_ratio"),
            ("less tool time", "tool_time_ratio"),
            ("less waiting", "waited_ratio"),
        ):
            ratios = ", ".join(f"{arm} {ratio:.1f} times" for arm, ratio in found.get(key, {}).items())
            lines += [f"{what}: {ratios}"] if ratios else []
    lines.append(f"aim: {AIM:g} times; trajectories are equal, and weights of the short runs")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except (RunError, UserError) as error:
        sys.exit(f"bench tool_cache: {error}")
