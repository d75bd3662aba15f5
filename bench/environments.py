"""How fast shipped environments are without a model, what their scripts reach, and what they agree with.

    slipstream bench environments [-- NAME ... --json FILE]

One process, one episode after another. Each environment has a function below, which says what it measured;
one whose packages are missing is passed over. Seconds are medians over rounds, which take every task of a
finite environment once.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory, environment_factory
from slipstream.errors import ConfigurationError
from slipstream.ground import Closable
from slipstream.tools.hermes import parse_call
from slipstream.types import Split, Task, TaskAttempt, succeeded

ROUNDS: Final = 3


def made(name: str, **options: Any) -> EnvironmentFactory:
    """Return an environment's factory, its tools never failing by chance."""
    config = EnvironmentConfig(name=name, tool_failure_rate=0.0, options=options)
    return environment_factory(config, RewardConfig())


def every_task(factory: EnvironmentFactory) -> list[Task]:
    """Return each task of a finite environment once."""
    tasks: Any = factory.tasks
    return [tasks.task(split, index) for split in Split for index in range(tasks.size(split))]


async def played(factory: EnvironmentFactory, task: Task, script: str, *, score: bool = True) -> bool:
    """Play one episode with a script; return whether it succeeded."""
    environment = factory.make()
    await environment.reset(task, TaskAttempt(task=task.index, seed=1, group=0, attempt=0))
    player = factory.scripts[script].play(task)
    text = next(player)
    try:
        while True:
            message = parse_call(text, environment.tools, plain=getattr(environment, "converses", False))
            transition = await environment.step(message)
            if transition.done:
                return succeeded(await environment.score()) if score else False
            text = player.send(transition.observation)
    finally:
        if isinstance(environment, Closable):
            await environment.close()


def reached(factory: EnvironmentFactory, script: str, kind: Callable[[Task], str]) -> dict[str, str]:
    """Return a script's successes by kind of task, as "200/200"."""
    won, all_tasks = Counter[str](), Counter[str]()
    for task in every_task(factory):
        all_tasks[kind(task)] += 1
        won[kind(task)] += asyncio.run(played(factory, task, script))
    return {name: f"{won[name]}/{total}" for name, total in sorted(all_tasks.items())}


def episodes_per_s(factory: EnvironmentFactory, script: str, *, score: bool) -> float:
    """Return the median over rounds of episodes per second."""
    tasks = every_task(factory)

    async def round_of() -> float:
        started = time.perf_counter()
        for task in tasks:
            await played(factory, task, script, score=score)
        return len(tasks) / (time.perf_counter() - started)

    return round(statistics.median(asyncio.run(round_of()) for _ in range(ROUNDS)), 1)


def milliseconds(action: Callable[[], object], *, times: int = 200) -> float:
    """Return the median time of an action."""

    def one() -> float:
        started = time.perf_counter()
        action()
        return 1e3 * (time.perf_counter() - started)

    return round(statistics.median(one() for _ in range(times)), 3)


def speeds(factory: EnvironmentFactory) -> dict[str, float]:
    """Return the speed of the oracle's episodes, without and with their score."""
    return {
        "oracle_episodes_per_s": episodes_per_s(factory, "oracle", score=False),
        "oracle_episodes_per_s_scored": episodes_per_s(factory, "oracle", score=True),
    }


def bfcl() -> dict[str, Any]:
    """Gold replay, doing nothing, speed, and the package's own verdicts on gold and damaged replays."""
    factory = made("bfcl")

    def category(task: Task) -> str:
        return str(task.data["id"]).rpartition("_")[0].removeprefix("multi_turn_")

    return {
        "versions": dict(factory.versions),
        "oracle": reached(factory, "oracle", category),
        "do_nothing": reached(factory, "do_nothing", category),
        **speeds(factory),
        "verdicts_against_the_package": _bfcl_verdicts(factory),
    }


def _bfcl_verdicts(factory: EnvironmentFactory) -> dict[str, int]:
    """Count replays on which our judge and the package's checker agree, and on which they differ."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/engine/environments/bfcl"))
    import replays

    agreed = Counter[str]()
    tasks: Any = factory.tasks
    for task in every_task(factory):
        for replay in replays.replays(task):
            ours, theirs = replays.verdicts(tasks.entry(task), replay, task)
            agreed["agree" if ours == theirs else "differ"] += 1
            agreed["valid"] += theirs
    return dict(agreed)


def tau2() -> dict[str, Any]:
    """Both domains: gold replay, doing nothing, speed, a fresh world, and digests against the package's."""
    from slipstream.environments.tau2.domains import domain_of

    found: dict[str, Any] = {}
    for name in ("retail", "telecom"):
        factory, domain = made(f"tau2:{name}", idle=True), domain_of(name)
        found["versions"] = dict(factory.versions)
        found[name] = {
            "oracle": reached(factory, "oracle", lambda _: "all"),
            "do_nothing": reached(factory, "do_nothing", lambda _: "all"),
            "do_nothing_without_idle_tasks": reached(made(f"tau2:{name}"), "do_nothing", lambda _: "all"),
            **speeds(factory),
            "fresh_ms": milliseconds(domain.fresh),
            "digest_ms": milliseconds(domain.fresh().digest, times=50),
        }
    found["retail"]["digests_against_the_package"] = dict(
        Counter(_tau2_digests(made("tau2:retail", idle=True)))
    )
    return found


def _tau2_digests(factory: EnvironmentFactory) -> Iterator[str]:
    """Yield for each task whether the gold actions lead to the package's own database hash."""
    from tau2.data_model.message import ToolCall
    from tau2.domains.retail.environment import get_environment

    from slipstream.environments.tau2.domains import domain_of

    for task in every_task(factory):
        ours, theirs = domain_of("retail").fresh(), get_environment()
        for action in task.data["criteria"]["actions"]:
            ours.call(action["name"], action["arguments"])
            theirs.get_response(ToolCall(name=action["name"], arguments=action["arguments"]))
        yield "agree" if ours.digest() == theirs.get_db_hash() else "differ"


def drawn(name: str, *, episodes: int = 200, **options: Any) -> dict[str, Any]:
    """An environment that draws tasks without end: scripts on held-out ones, and the oracle's speed."""
    factory = made(name, **options)

    async def round_of(script: str, count: int) -> list[bool]:
        tasks = [factory.tasks.task(Split.HELDOUT, index) for index in range(count)]
        return [await played(factory, task, script) for task in tasks]

    def speed() -> float:
        started = time.perf_counter()
        asyncio.run(round_of("oracle", episodes))
        return episodes / (time.perf_counter() - started)

    try:
        # The first round builds what tasks share; it is not counted.
        won = {script: sum(asyncio.run(round_of(script, episodes))) for script in ("oracle", "do_nothing")}
        return {
            "versions": dict(factory.versions),
            "options": options,
            **{script: f"{count}/{episodes}" for script, count in won.items()},
            "oracle_episodes_per_s_scored": round(statistics.median(speed() for _ in range(ROUNDS)), 1),
        }
    finally:
        factory.close()


MEASURED: Final[dict[str, Callable[[], dict[str, Any]]]] = {
    "bfcl": bfcl,
    "tau2": tau2,
    "research": lambda: drawn("research"),
    "deep-research": lambda: drawn("deep-research"),
    "sql": lambda: drawn("sql"),
    "python": lambda: drawn("python"),
    "reasoning-gym": lambda: drawn("reasoning-gym:basic_arithmetic"),
    "textworld": lambda: drawn("textworld:coin", episodes=40, parameters="numLocations=3,includeDoors=0"),
}


def main() -> int:
    """Measure the named environments, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASURED)}; default: all")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="results of what was measured are put into it"
    )
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(MEASURED):
        parser.error(f"unknown environment {min(unknown)}; there are {', '.join(MEASURED)}")
    results: dict[str, Any] = {}
    if chosen.json and chosen.json.exists():
        results = json.loads(chosen.json.read_text())
    for name in chosen.names or MEASURED:
        try:
            measured = MEASURED[name]()
        except ConfigurationError as error:
            sys.stdout.write(f"{name}: passed over: {error}\n")
            continue
        machine = f"{os.cpu_count()} cores, {platform.machine()}"
        results[name] = {"date": str(datetime.date.today()), "machine": machine, **measured}
        sys.stdout.write(f"{name}: {json.dumps(results[name], indent=1)}\n")
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
