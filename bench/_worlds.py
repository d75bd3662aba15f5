"""Episodes per second of environments without a model: their own oracle plays, one process, no failures.

    python bench/_worlds.py --json FILE [NAME ...]

A row for each environment: the median over rounds, calls of tools per episode, success of oracle and of
doing nothing. Environments whose extra is not installed are a row that says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory, Script, environment_factory
from slipstream.errors import ConfigurationError
from slipstream.ground import Closable
from slipstream.tools.hermes import parse_call
from slipstream.types import Split, TaskAttempt

ROUNDS = 3
MOST_TURNS = 100


def sql() -> dict[str, Any]:
    """SQL, all kinds of questions."""
    return row("sql", episodes=200)


def sql_residence() -> dict[str, Any]:
    """SQL, the kind of its recipe."""
    return row("sql", episodes=200, questions=["residence"])


def python() -> dict[str, Any]:
    """The Python tool, all kinds of computations."""
    return row("python", episodes=200)


def python_arithmetic() -> dict[str, Any]:
    """The Python tool, the kind of its recipe."""
    return row("python", episodes=200, questions=["arithmetic"])


def reasoning_gym() -> dict[str, Any]:
    """A dataset of reasoning-gym."""
    return row("reasoning-gym:basic_arithmetic", episodes=200)


def textworld_coin() -> dict[str, Any]:
    """The coin game, three rooms."""
    return row("textworld:coin", episodes=40, parameters="numLocations=3,includeDoors=0")


ROWS: Mapping[str, Callable[[], dict[str, Any]]] = {
    function.__name__: function
    for function in (sql, sql_residence, python, python_arithmetic, reasoning_gym, textworld_coin)
}


def row(name: str, *, episodes: int, **options: Any) -> dict[str, Any]:
    """Return the figures of one environment."""
    config = EnvironmentConfig(name=name, tool_failure_rate=0.0, options=options)
    try:
        factory = environment_factory(config, RewardConfig())
    except ConfigurationError as error:
        return {"environment": name, "missing": str(error)}
    try:
        # The first round builds what tasks share; it is not counted.
        played(factory, factory.scripts["oracle"], episodes)
        rounds = [played(factory, factory.scripts["oracle"], episodes) for _ in range(ROUNDS)]
        nothing = played(factory, factory.scripts["do_nothing"], min(episodes, 20))
    finally:
        factory.close()
    return {
        "environment": name,
        "options": options,
        "episodes": episodes,
        "episodes_per_s": round(statistics.median(one["per_s"] for one in rounds), 1),
        "calls_per_episode": rounds[0]["calls"],
        "oracle": rounds[0]["success"],
        "do_nothing": nothing["success"],
        "versions": dict(factory.versions),
    }


def played(factory: EnvironmentFactory, script: Script, episodes: int) -> dict[str, float]:
    """Play held-out episodes one after another."""

    async def one(index: int) -> tuple[bool, int]:
        task = factory.tasks.task(Split.HELDOUT, index)
        environment = factory.make()
        await environment.reset(task, TaskAttempt(task=index, seed=1, group=index, attempt=0))
        play, calls = script.play(task), 0
        text = next(play)
        while calls < MOST_TURNS:
            move = await environment.step(parse_call(text, environment.tools))
            calls += 1
            if move.done:
                break
            text = play.send(move.observation)
        outcome = (await environment.score())[0].value
        if isinstance(environment, Closable):
            await environment.close()
        return outcome == 1.0, calls

    async def every() -> list[tuple[bool, int]]:
        return [await one(index) for index in range(episodes)]

    began = time.perf_counter()
    results = np.array(asyncio.run(every()), dtype=float)
    seconds = time.perf_counter() - began
    success, calls = results.mean(axis=0)
    return {"per_s": episodes / seconds, "success": float(success), "calls": round(float(calls), 2)}


def main() -> None:
    """Measure the named environments, or all, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *ROWS], default=[])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rows = []
    for name in chosen.names or ROWS:
        rows.append(ROWS[name]())
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
