"""Episodes per second of foreign environments over their adapters, one after another and 64 at once.

    slipstream bench adapters --json FILE

Real packages where a variable names an interpreter that has them, as the tests of the adapters say
(test_real_packages.py); rows without one say so. Start is that of the first worker or server, with its
imports. An episode is reset, its messages, score and close: at most as many trips as its row says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory, environment_factory
from slipstream.ground import Closable
from slipstream.interfaces import Conversing
from slipstream.tools.hermes import format_call, parse_call
from slipstream.types import Split, TaskAttempt

ROUNDS = 3
AT_ONCE = 64
TESTS = Path(__file__).resolve().parents[1] / "tests/engine/environments/adapters"
ACT = [format_call("act", {"number": n}) for n in range(4)]
LOOK = format_call("dictionary_look_up", {"word": "cat"})
CAPITAL = format_call("capital", {"country": "Norway"})
ANSWER = format_call("answer", {"text": "Oslo"})


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the figures of every adapter."""
    tasks = folder / "tasks.jsonl"
    lines = [
        {"question": f"{split} {n}", "answer": "Oslo", "split": split, "reward_spec": {"ground_truth": "2"}}
        for split in ("train", "heldout", "fresh")
        for n in range(64)
    ]
    tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"tasks": str(tasks)}
    guess = {"action": "openenv_guess:Guess"}
    real = {"path": [str(TESTS / "real")]}
    plain = {"command": [sys.executable, str(TESTS / "mcp_server.py")], "env": {"STATE": str(folder)}}
    calls = [CAPITAL, CAPITAL, ANSWER]
    return [
        row("mcp", "", calls, 2, **plain, **given),
        row("mcp", "MCP", calls, 2, server=str(TESTS / "real/mcp_atlas.py"), **given),
        row("skyrl-gym", "SKYRL", ["#### 2"], 4, entry="gsm8k", **given),
        row("openenv", "OPENENV", ACT, 7, entry="openenv_guess:GuessEnvironment", arguments=guess, **real),
        row("verifiers", "VERIFIERS", [LOOK, "no"], 5, entry="verifiers_words:Words", **real),
    ]


def row(name: str, variable: str, messages: Sequence[str], trips: int, **options: Any) -> dict[str, Any]:
    """Return the figures of one adapter."""
    about = {"environment": name, "package": "real" if variable else "stdlib", "trips": trips}
    if variable:
        python = os.environ.get(f"SLIPSTREAM_{variable}_PYTHON")
        if not python:
            return {**about, "missing": f"SLIPSTREAM_{variable}_PYTHON"}
        server = options.pop("server", "")
        options |= {"command": [python, server]} if server else {"python": python}
    config = EnvironmentConfig(
        name=name, tool_failure_rate=0.0, options={**options, "start_timeout_s": 300.0}
    )
    began = time.perf_counter()
    factory = environment_factory(config, RewardConfig())
    start_s = time.perf_counter() - began
    try:
        alone = [played(factory, messages, 64, 1) for _ in range(1 + ROUNDS)][1:]
        together = [played(factory, messages, 256, AT_ONCE) for _ in range(1 + ROUNDS)][1:]
    finally:
        factory.close()
    return {
        **about,
        "start_s": round(start_s, 2),
        "ms_per_episode_alone": round(1e3 / statistics.median(alone), 2),
        f"episodes_per_s_{AT_ONCE}_at_once": round(statistics.median(together), 1),
        "versions": dict(factory.versions),
    }


def played(factory: EnvironmentFactory, messages: Sequence[str], episodes: int, at_once: int) -> float:
    """Return episodes per second."""

    async def one(index: int) -> None:
        environment = factory.make()
        task = factory.tasks.task(Split.HELDOUT, index)
        await environment.reset(task, TaskAttempt(task=index, seed=1, group=index, attempt=0))
        plain = isinstance(environment, Conversing) and environment.converses
        for text in messages:
            if (await environment.step(parse_call(text, environment.tools, plain=plain))).done:
                break
        await environment.score()
        if isinstance(environment, Closable):
            await environment.close()

    async def every() -> None:
        for first in range(0, episodes, at_once):
            await asyncio.gather(*map(one, range(first, first + at_once)))

    began = time.perf_counter()
    asyncio.run(every())
    return episodes / (time.perf_counter() - began)


def main() -> None:
    """Print or write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {"load": os.getloadavg()[0], "cores": os.cpu_count(), "rows": rows(Path(folder))}
    text = json.dumps(result, indent=1) + "\n"
    sys.stdout.write(text)
    if chosen.json:
        chosen.json.write_text(text)


if __name__ == "__main__":
    main()
