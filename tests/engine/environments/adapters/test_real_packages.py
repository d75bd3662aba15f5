"""The packages themselves, each in a virtual environment that a variable names; left out without it.

python -m venv V && V/bin/pip install mcp            SLIPSTREAM_MCP_PYTHON=V/bin/python
python -m venv V && V/bin/pip install skyrl-gym      SLIPSTREAM_SKYRL_PYTHON=V/bin/python
python -m venv V && V/bin/pip install openenv        SLIPSTREAM_OPENENV_PYTHON=V/bin/python
python -m venv V && V/bin/pip install verifiers      SLIPSTREAM_VERIFIERS_PYTHON=V/bin/python
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import worlds

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory, environment_factory
from slipstream.environments.factory import ORACLE
from slipstream.interfaces import Conversing, Transition
from slipstream.tools.hermes import format_call, parse_call
from slipstream.types import Score, Split, ToolStatus

pytestmark = pytest.mark.slow
REAL = Path(__file__).with_name("real")
GUESSES = [format_call("act", {"number": n}) for n in range(4)]


def interpreter(name: str) -> str:
    python = os.environ.get(f"SLIPSTREAM_{name}_PYTHON", "")
    if not python:
        pytest.skip(f"SLIPSTREAM_{name}_PYTHON names no interpreter")
    return python


def factory_of(name: str, **options: Any) -> EnvironmentFactory:
    config = EnvironmentConfig(
        name=name, tool_failure_rate=0.0, options={"start_timeout_s": 300.0, **options}
    )
    return environment_factory(config, RewardConfig())


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


async def episode(
    factory: EnvironmentFactory, messages: Sequence[str], index: int = 0
) -> tuple[list[Transition], dict[str, Score]]:
    environment = factory.make()
    await environment.reset(factory.tasks.task(Split.TRAIN, index), worlds.attempt(index))
    plain = isinstance(environment, Conversing) and environment.converses
    moves: list[Transition] = []
    for text in messages:
        moves.append(await environment.step(parse_call(text, environment.tools, plain=plain)))
        if moves[-1].done:
            break
    scores = await environment.score()
    await worlds.close(environment)
    return moves, {score.name: score for score in scores}


def test_mcp(capitals: Path) -> None:
    command = [interpreter("MCP"), str(REAL / "mcp_atlas.py")]
    factory = factory_of("mcp", command=command, tasks=str(capitals))
    try:
        assert [tool.name for tool in factory.make().tools] == ["capital", "add", "answer"]
        assert factory.versions["MCP server atlas"] == "7.1"
        assert worlds.success(factory, factory.scripts[ORACLE], 3) == 1.0
        calls = [format_call("add", {"a": 1, "b": 2}), format_call("capital", {"country": "Atlantis"})]
        (three, unknown), _ = asyncio.run(episode(factory, calls))
        assert three.observation == "3"
        assert unknown.observation.startswith("error: ")
        assert unknown.call is not None and unknown.call.status is ToolStatus.ERROR
    finally:
        factory.close()


@pytest.mark.parametrize("entry", ["gsm8k", "gsm8k_multi_turn"])
def test_skyrl_gym(sums: Path, entry: str) -> None:
    factory = factory_of("skyrl-gym", python=interpreter("SKYRL"), entry=entry, tasks=str(sums))
    try:
        _, right = asyncio.run(episode(factory, ["#### 2"], 1))
        _, wrong = asyncio.run(episode(factory, ["#### 3"], 1))
        assert (right["outcome"].value, wrong["outcome"].value) == (1.0, -1.0)
        if entry == "gsm8k_multi_turn":
            (asked, _), _ = asyncio.run(episode(factory, ["hm", "#### 2"], 1))
            assert asked.role == "user" and "#### ANSWER" in asked.observation
    finally:
        factory.close()


def test_openenv() -> None:
    arguments = {"action": "openenv_guess:Guess", "top": 4}
    factory = factory_of(
        "openenv",
        python=interpreter("OPENENV"),
        entry="openenv_guess:GuessEnvironment",
        path=[str(REAL)],
        arguments=arguments,
    )
    try:

        async def many() -> list[float | None]:
            played = await asyncio.gather(*(episode(factory, GUESSES, index) for index in range(40)))
            return [scores["outcome"].value for _, scores in played]

        assert asyncio.run(many()) == [1.0] * 40
    finally:
        factory.close()


def test_openenv_over_a_websocket() -> None:
    python = interpreter("OPENENV")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([python, str(REAL / "openenv_guess.py"), str(port)])
    try:
        deadline = time.monotonic() + 120
        while not _listens(port) and time.monotonic() < deadline:
            time.sleep(0.2)
        factory = factory_of("openenv", python=python, entry=f"ws://127.0.0.1:{port}")
        try:
            _, scores = asyncio.run(episode(factory, GUESSES))
            assert scores["outcome"].value == 1.0
        finally:
            factory.close()
    finally:
        server.kill()
        server.wait(10)


def test_verifiers() -> None:
    factory = factory_of(
        "verifiers", python=interpreter("VERIFIERS"), entry="verifiers_words:Words", path=[str(REAL)]
    )
    try:
        task = factory.tasks.task(Split.TRAIN, 0)
        word = task.question.split()[3]
        look = format_call("dictionary_look_up", {"word": word})
        missing = format_call("dictionary_look_up", {"word": "bird"})
        meaning = {"cat": "a small animal", "dog": "a loyal animal"}[word]
        moves, scores = asyncio.run(episode(factory, [missing, look, meaning]))
        assert moves[0].call is not None and moves[0].call.status is ToolStatus.ERROR
        assert (moves[1].observation, moves[2].done) == (meaning, True)
        assert (scores["outcome"].value, scores["looked"].value) == (1.0, 2.0)
        # Its own stop ends an episode, and no episode sees the state of another.
        moves, scores = asyncio.run(episode(factory, [look] * 5))
        assert (len(moves), moves[-1].done, scores["outcome"].value) == (3, True, -1.0)
    finally:
        factory.close()
