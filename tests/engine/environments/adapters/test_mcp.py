"""An MCP server's tools over tasks of one's own: a real server, and each way in which one misbehaves."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import worlds
from groups import alive, gone
from opened import made

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory, environment_factory
from slipstream.environments.adapters import protocol
from slipstream.environments.adapters.mcp import McpEnvironment
from slipstream.environments.factory import ORACLE
from slipstream.errors import ConfigurationError, InfrastructureError
from slipstream.ground import Ground
from slipstream.interfaces import Transition
from slipstream.tools.hermes import format_call, parse_call
from slipstream.types import Split, ToolStatus

SERVER = Path(__file__).with_name("mcp_server.py")


def config_of(capitals: Path, *, call_timeout_s: float = 10.0, **options: Any) -> EnvironmentConfig:
    given = {
        "command": [sys.executable, str(SERVER)],
        "tasks": str(capitals),
        "env": {"STATE": str(capitals.parent)},
        **options,
    }
    return EnvironmentConfig(
        name="mcp",
        tool_failure_rate=0.0,
        backoff_s=0.0,
        options=given,
        limits={"call_timeout_s": call_timeout_s},
    )


async def began(factory: EnvironmentFactory, number: int = 0) -> McpEnvironment:
    environment = factory.make()
    assert isinstance(environment, McpEnvironment)
    await environment.reset(factory.tasks.task(Split.TRAIN, 0), worlds.attempt(0, number))
    return environment


def said(factory: EnvironmentFactory, *calls: str) -> list[Transition]:
    """What calls of tools without arguments lead to, in one episode."""

    async def play() -> list[Transition]:
        environment = await began(factory)
        return [await worlds.step(environment, format_call(name, {})) for name in calls]

    return asyncio.run(play())


def lives(tasks: Path) -> list[int]:
    return [int(line) for line in (tasks.parent / "lives").read_text().split()]


def test_the_servers_tools_are_the_policys_and_answers_are_checked(capitals: Path) -> None:
    with made(config_of(capitals, tools=["capital", "raises"])) as factory:
        capital, raises, answer = factory.make().tools
        assert (capital.name, capital.description) == ("capital", "capital it")
        assert capital.parameters == {
            "type": "object",
            "properties": {"country": {"type": "string"}},
            "required": ["country"],
        }
        assert (raises.name, answer.name) == ("raises", "answer")
        assert factory.versions["MCP server atlas"] == "7.1"
        assert len(factory.versions["tools of atlas"]) == 12
        assert worlds.success(factory, factory.scripts[ORACLE], 6) == 1.0
        assert worlds.success(factory, factory.scripts["do_nothing"], 6) == 0.0
        # All those episodes shared one server, and what it asked of us was refused.
        assert len(lives(capitals)) == 1
        told = [json.loads(line) for line in (capitals.parent / "told").read_text().splitlines()]
        assert [each["error"]["code"] for each in told if "error" in each] == [-32601]


@pytest.mark.parametrize(
    ("name", "observation"),
    [
        ("raises", "error: no such country"),
        ("refuses", "error: Unknown tool: refuses"),
        ("odd", "error: tool broke its protocol"),
        ("huge", "error: tool answered too much"),
        ("never", "error: tool did not answer within 0.5 s"),
    ],
)
def test_a_bad_answer_is_an_error_that_the_policy_reads(capitals: Path, name: str, observation: str) -> None:
    with made(config_of(capitals, call_timeout_s=0.5 if name == "never" else 20.0)) as factory:
        first, second = said(factory, name, "babbles")
        assert (first.observation, first.done) == (observation, False)
        assert first.call is not None and first.call.status is ToolStatus.ERROR
        assert second.observation == "well"
        assert len(lives(capitals)) == 1


def test_a_long_answer_is_cut(capitals: Path) -> None:
    config = config_of(capitals)
    limits = config.limits.model_copy(update={"answer_bytes": 8 << 20, "observation_chars": 64})
    with made(config.model_copy(update={"limits": limits})) as factory:
        (move,) = said(factory, "huge")
        assert move.observation == "x" * 64 + "\n[cut at 64 characters]"


def test_what_is_no_json_is_left_out_and_said_once(capitals: Path, caplog: pytest.LogCaptureFixture) -> None:
    with made(config_of(capitals)) as factory:
        assert [move.observation for move in said(factory, "babbles", "babbles")] == ["well", "well"]
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "expected JSON on its standard output, got 'Loading model ...'" in warning


def test_tools_that_change_in_mid_run_are_said_once_and_stay(
    capitals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with made(config_of(capitals)) as factory:
        before = factory.make().tools
        said(factory, "changes", "babbles", "changes", "babbles")
        assert factory.make().tools == before
    changed = [record.message for record in caplog.records if "changed" in record.message]
    assert len(changed) == 1 and "in mid-run it changed its tools (capital)" in changed[0]


def test_a_slow_call_holds_up_no_other_episode(capitals: Path) -> None:
    async def play(factory: EnvironmentFactory) -> None:
        slow, quick = await began(factory, 0), await began(factory, 1)
        never = asyncio.create_task(worlds.step(slow, format_call("never", {})))
        norway = format_call("capital", {"country": "Norway"})
        assert [(await worlds.step(quick, norway)).observation for _ in range(20)] == ["Oslo"] * 20
        assert not never.done()
        never.cancel()
        await asyncio.gather(never, return_exceptions=True)
        assert (await worlds.step(slow, norway)).observation == "Oslo"

    with made(config_of(capitals)) as factory:
        asyncio.run(play(factory))
        assert len(lives(capitals)) == 1


def test_a_server_that_dies_is_no_reward_and_is_started_again(capitals: Path) -> None:
    async def play(factory: EnvironmentFactory, config: EnvironmentConfig) -> None:
        ground = Ground(factory.make(), config)
        await ground.reset(factory.tasks.task(Split.TRAIN, 0), worlds.attempt())
        once = parse_call(format_call("dies_once", {}), ground.tools)
        assert (await ground.step(once, 0)).observation == "back"
        assert len(lives(capitals)) == 2
        always = parse_call(format_call("dies", {}), ground.tools)
        with pytest.raises(InfrastructureError, match=r"mcp_server.py ended with status 1: out of memory"):
            await ground.step(always, 1)
        assert len(lives(capitals)) == 2 + config.retries
        assert all([await gone(pid) for pid in lives(capitals)])

    config = config_of(capitals)
    with made(config) as factory:
        asyncio.run(play(factory, config))


def test_a_server_that_answers_nothing_is_killed(capitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "PONG_S", 0.3)

    async def play(factory: EnvironmentFactory) -> None:
        stuck, other = await began(factory, 0), await began(factory, 1)
        with pytest.raises(InfrastructureError, match=r"answered nothing for 0\.3 s and was killed"):
            await worlds.step(stuck, format_call("freezes", {}))
        assert await gone(lives(capitals)[0])
        assert (await worlds.step(other, format_call("babbles", {}))).observation == "well"

    with made(config_of(capitals, call_timeout_s=0.2)) as factory:
        asyncio.run(play(factory))
        assert len(lives(capitals)) == 2


def test_closing_kills_the_server_with_all_it_started(capitals: Path) -> None:
    with made(config_of(capitals)) as factory:
        said(factory, "spawns")
        (pid,) = lives(capitals)
        assert alive(pid)
    assert asyncio.run(gone(pid))


def test_a_factory_that_nobody_closes_ends_with_the_last_who_knows_of_it(capitals: Path) -> None:
    said(environment_factory(config_of(capitals), RewardConfig()), "babbles")
    gc.collect()
    assert asyncio.run(gone(lives(capitals)[0]))


def _broken(tmp_path: Path) -> dict[str, Any]:
    return {"command": [sys.executable, "-c", "raise SystemExit('no licence')"]}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (lambda _: {"command": ["no-such-server"]}, "cannot run no-such-server: No such file or directory"),
        (_broken, "ended with status 1: no licence; run it by hand"),
        (lambda _: {"tools": ["capitol"]}, "has no tool capitol; did you mean capital?"),
        (lambda _: {"comand": []}, "environment mcp has no option comand; did you mean command?"),
        (lambda tmp: {"tasks": str(tmp / "gone.jsonl")}, "gone.jsonl cannot be read: No such file"),
        (lambda tmp: {"question": "answer"}, 'expected text, or a list of texts, under "answer"'),
    ],
)
def test_mistakes_are_one_sentence(
    capitals: Path, options: Callable[[Path], dict[str, Any]], sentence: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        environment_factory(config_of(capitals, **options(capitals.parent)), RewardConfig())
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_sandbox_is_refused(capitals: Path) -> None:
    config = config_of(capitals).model_copy(update={"sandbox": "process"})
    with pytest.raises(ConfigurationError, match='expected "none" for mcp'):
        environment_factory(config, RewardConfig())
