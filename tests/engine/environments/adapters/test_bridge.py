"""Foreign environments in workers of their own: stand-ins with the documented interfaces, real processes."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import worlds
from groups import alive, gone
from opened import made

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory, environment_factory
from slipstream.environments.adapters import bridge
from slipstream.environments.adapters.bridged import BridgedEnvironment
from slipstream.environments.adapters.foreign import there
from slipstream.environments.factory import ORACLE
from slipstream.errors import ConfigurationError, InfrastructureError
from slipstream.ground import Ground
from slipstream.interfaces import Transition
from slipstream.rewards import reward
from slipstream.tools.hermes import format_call, parse_call
from slipstream.types import Score, Split, ToolStatus

FOREIGN = str(Path(__file__).with_name("foreign"))
TOGETHER = 8
NO_TASKS = "skyrl-gym brings no tasks; give a JSONL file"


def config_of(name: str, *, call_timeout_s: float = 20.0, **options: Any) -> EnvironmentConfig:
    return EnvironmentConfig(
        name=name,
        tool_failure_rate=0.0,
        backoff_s=0.0,
        options={"path": [FOREIGN], **options},
        limits={"call_timeout_s": call_timeout_s},
    )


def sums_of(tasks: Path, **given: Any) -> EnvironmentConfig:
    return config_of("skyrl-gym", entry="sums", tasks=str(tasks), **given)


def guess_of(**given: Any) -> EnvironmentConfig:
    action = {"action": "guess:Guess", "top": 4}
    return config_of("openenv", **{"entry": "guess:GuessEnvironment", "arguments": action, **given})


async def began(factory: EnvironmentFactory, number: int = 0) -> BridgedEnvironment:
    environment = factory.make()
    assert isinstance(environment, BridgedEnvironment)
    await environment.reset(factory.tasks.task(Split.TRAIN, 1), worlds.attempt(1, number))
    return environment


async def say(environment: BridgedEnvironment, text: str) -> Transition:
    return await environment.step(parse_call(text, environment.tools, plain=environment.converses))


async def pids(environment: BridgedEnvironment) -> list[int]:
    async def found() -> list[int]:
        return environment._bridge.pids()

    return await there(found())


def played(factory: EnvironmentFactory, *messages: str) -> tuple[list[Transition], dict[str, Score]]:
    async def play() -> tuple[list[Transition], dict[str, Score]]:
        environment = await began(factory)
        moves = [await say(environment, message) for message in messages]
        scores = await environment.score()
        await environment.close()
        return moves, {score.name: score for score in scores}

    return asyncio.run(play())


def test_an_episode_of_text_is_judged_by_the_environments_own_rewards(sums: Path) -> None:
    with made(sums_of(sums)) as factory:
        environment = factory.make()
        assert not environment.tools
        assert factory.versions == {
            "skyrl-gym": "0.0.1",
            "python of skyrl-gym": ".".join(map(str, sys.version_info[:3])),
        }

        async def opened() -> tuple[str, str]:
            opening = await environment.reset(factory.tasks.task(Split.TRAIN, 1), worlds.attempt(1))
            return opening.system, opening.user

        assert asyncio.run(opened()) == ("Add.", "train: 1 + 1?")
        moves, scores = played(factory, "3", "print", "2")
        assert [(move.observation, move.role, move.done, move.call) for move in moves] == [
            ("Wrong.", "user", False, None),
            ("Wrong.", "user", False, None),
            ("", "tool", True, None),
        ]
        assert (scores["outcome"].value, scores["reward"].value, scores["step"].value) == (1.0, 1.0, 3.0)
        assert reward(list(scores.values()), RewardConfig()) == pytest.approx(1.0 - 3 * 0.05)
        _, scores = played(factory, "3")
        assert (scores["outcome"].value, scores["reward"].value) == (-1.0, 0.0)


def test_an_episode_of_actions_and_seeds(caplog: pytest.LogCaptureFixture) -> None:
    with made(guess_of(system="Find it.")) as factory:
        (warning,) = [record.message for record in caplog.records]
        assert "does not say that it supports concurrent sessions" in warning
        (act,) = factory.make().tools
        assert (act.name, act.description, list(act.parameters["properties"])) == (
            "act",
            "Guess the number.",
            ["number"],
        )
        seeds = {factory.tasks.task(split, index).data["seed"] for split in Split for index in range(20)}
        assert len(seeds) == 60
        moves, scores = played(factory, *(format_call("act", {"number": n}) for n in (9, 0, 1, 2, 3)))
        assert moves[0].observation == "lower"
        assert moves[0].call is not None and moves[0].call.status is ToolStatus.OK
        assert any(move.done for move in moves) and scores["outcome"].value == 1.0
        # What the schema would not let through, and what the action itself refuses.
        (unread, refused), scores = played(
            factory, format_call("act", {"number": "one"}), format_call("act", {"number": 2.5})
        )
        assert unread.observation == "error: argument number: 'one' is not of type 'integer'"
        assert refused.observation == "error: argument number: 2.5 is not of type 'integer'"
        assert (scores["outcome"].value, scores["invalid"].value) == (-1.0, 2.0)


def test_the_expert_of_the_lines_solves_every_task(sums: Path) -> None:
    with made(sums_of(sums)) as factory:
        assert worlds.success(factory, factory.scripts[ORACLE], 6) == 1.0
        assert worlds.success(factory, factory.scripts["do_nothing"], 6) == 0.0
        assert {"train: 0 + 0?", "hm", "4"} <= {*factory.corpus()}
    with made(guess_of()) as factory:
        assert list(factory.scripts) == ["do_nothing"]


@pytest.mark.parametrize(
    ("message", "observation"),
    [
        ("raise", "error: environment failed with ValueError: cannot read that"),
        ("huge", "error: environment answered too much"),
    ],
)
def test_a_bad_answer_is_an_error_that_the_policy_reads(sums: Path, message: str, observation: str) -> None:
    with made(sums_of(sums)) as factory:
        moves, scores = played(factory, message, "2")
        assert [(move.observation, move.done) for move in moves] == [(observation, False), ("", True)]
        assert scores["outcome"].value == 1.0


def test_a_reward_that_is_no_number_leaves_the_baseline(sums: Path) -> None:
    with made(sums_of(sums)) as factory:
        _, scores = played(factory, "nan", "2")
        assert scores["outcome"].value is None
        assert scores["outcome"].invalid == "expected a finite reward, got nan"
        assert reward(list(scores.values()), RewardConfig()) is None


def test_many_episodes_run_in_one_worker_at_once(sums: Path) -> None:
    """Each waits in its step until all others are in theirs."""

    async def play(factory: EnvironmentFactory) -> None:
        environments = [await began(factory, number) for number in range(TOGETHER)]
        moves = await asyncio.gather(*(say(each, "meet") for each in environments))
        assert [move.observation for move in moves] == ["met"] * TOGETHER
        assert len(await pids(environments[0])) == 1

    with made(sums_of(sums)) as factory:
        asyncio.run(play(factory))


def test_so_many_episodes_to_a_worker(sums: Path) -> None:
    async def play(factory: EnvironmentFactory) -> None:
        first, second = await began(factory, 0), await began(factory, 1)
        assert len(await pids(first)) == 2
        await first.close()
        third = await began(factory, 2)
        assert len(await pids(second)) == len(await pids(third)) == 2

    with made(sums_of(sums, episodes_per_worker=1)) as factory:
        asyncio.run(play(factory))


def test_a_worker_that_dies_fails_the_episodes_it_held_and_no_other(sums: Path) -> None:
    async def play(factory: EnvironmentFactory, config: EnvironmentConfig) -> None:
        held, guilty = Ground(factory.make(), config), Ground(factory.make(), config)
        for ground in (held, guilty):
            await ground.reset(factory.tasks.task(Split.TRAIN, 1), worlds.attempt(1))
        for ground, text in ((guilty, "exit"), (held, "2")):
            with pytest.raises(InfrastructureError, match="skyrl-gym worker ended with status 3"):
                await ground.step(parse_call(text, (), plain=True), 0)
            with pytest.raises(InfrastructureError, match="skyrl-gym worker ended with status 3"):
                await ground.score()
            await ground.close()
        later, *_ = await asyncio.gather(*(began(factory, number) for number in range(4)))
        assert len(await pids(later)) == 1
        assert (await say(later, "2")).done and (await later.score())[0].value == 1.0

    config = sums_of(sums)
    with made(config) as factory:
        asyncio.run(play(factory, config))


def test_a_step_that_hangs_fails_its_episode_and_retires_its_worker(sums: Path) -> None:
    async def play(factory: EnvironmentFactory) -> None:
        hung, beside = await began(factory, 0), await began(factory, 1)
        (old,) = await pids(hung)
        move = await say(hung, "hang")
        assert (move.done, (await hung.score())[0].value) == (True, -1.0)
        # New episodes begin elsewhere; those it holds go on, and with the last of them it ends.
        fresh = await began(factory, 2)
        assert len(await pids(fresh)) == 2
        await hung.close()
        assert alive(old) and (await say(beside, "3")).observation == "Wrong."
        await beside.close()
        assert await gone(old)
        assert (await say(fresh, "2")).done

    with made(sums_of(sums, call_timeout_s=1.5)) as factory:
        asyncio.run(play(factory))


def test_an_episode_whose_time_is_over_in_mid_step_has_failed(sums: Path) -> None:
    """The environment is not asked to judge while it still steps."""

    async def play(factory: EnvironmentFactory) -> None:
        environment = await began(factory)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await say(environment, "hang")
        assert (await environment.score())[0].value == -1.0
        await environment.close()
        assert (await say(await began(factory, 1), "2")).done

    with made(sums_of(sums)) as factory:
        asyncio.run(play(factory))


def test_a_factory_that_nobody_closes_ends_with_the_last_who_knows_of_it(sums: Path) -> None:
    async def play(factory: EnvironmentFactory) -> int:
        (group,) = await pids(await began(factory))
        return group

    group = asyncio.run(play(environment_factory(sums_of(sums), RewardConfig())))
    gc.collect()
    assert asyncio.run(gone(group))


def test_a_worker_that_answers_nothing_is_killed(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "PONG_S", 1.0)

    async def play(factory: EnvironmentFactory) -> None:
        stuck = await began(factory)
        (old,) = await pids(stuck)
        with pytest.raises(InfrastructureError, match=r"answered nothing for 1 s and was killed"):
            await say(stuck, "freeze")
        assert await gone(old)
        await stuck.close()
        assert (await say(await began(factory), "2")).done

    with made(sums_of(sums, call_timeout_s=1.0)) as factory:
        asyncio.run(play(factory))


def test_closing_kills_the_worker_with_all_it_started(sums: Path) -> None:
    async def play(factory: EnvironmentFactory) -> tuple[int, int]:
        environment = await began(factory)
        child = int((await say(environment, "spawn")).observation)
        (group,) = await pids(environment)
        assert os.getpgid(child) == group
        return group, child

    with made(sums_of(sums)) as factory:
        group, _ = asyncio.run(play(factory))
        assert alive(group)
    assert asyncio.run(gone(group))


def test_a_worker_ends_with_whoever_reads_it(sums: Path) -> None:
    """The kernel closes its pipe when an actor is killed; nothing of ours runs then."""

    async def play(factory: EnvironmentFactory) -> None:
        environment = await began(factory)
        await say(environment, "spawn")
        (group,) = await pids(environment)

        async def hang_up() -> None:
            stdin = environment._bridge._hosts[0].life._process.stdin
            assert stdin is not None
            stdin.close()

        await there(hang_up())
        assert await gone(group)

    with made(sums_of(sums)) as factory:
        asyncio.run(play(factory))


def test_what_changes_in_mid_run_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changed = tmp_path / "changed"

    async def play(factory: EnvironmentFactory) -> None:
        for _ in range(3):
            environment = await began(factory)
            await there(environment._bridge.end())
            changed.touch()
            await environment.close()

    with made(guess_of(env={"CHANGED": str(changed)})) as factory:
        before = factory.make().tools
        asyncio.run(play(factory))
        assert factory.make().tools == before
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [text for text in said if "in mid-run" in text] == [
        "openenv guess:GuessEnvironment: in mid-run it changed its tools; the run keeps those it began with"
    ]


def test_a_start_that_fails_is_an_infrastructure_failure() -> None:
    async def play(factory: EnvironmentFactory) -> None:
        with pytest.raises(InfrastructureError, match="reset: environment failed with OSError: no display"):
            await began(factory)

    with made(guess_of(entry="guess:Broken", arguments={"action": "guess:Guess"})) as factory:
        asyncio.run(play(factory))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("skyrl-gym", {"entry": "products"}, "environment.options.entry: products: no environment products"),
        ("skyrl-gym", {"entry": "skyrl_gym:Products"}, "skyrl_gym has no Products"),
        ("skyrl-gym", {"entry": "gone.py:Sums"}, "there is no file gone.py"),
        ("skyrl-gym", {"entry": "sums", "python": "/no/python"}, "there is no interpreter /no/python"),
        (
            "skyrl-gym",
            {"entry": "sums", "path": []},
            f"has no package skyrl_gym; run {sys.executable} -m pip install skyrl-gym",
        ),
        (
            "skyrl-gym",
            {"entry": "sums", "python": "/bin/true"},
            "sums does not start: skyrl-gym worker ended",
        ),
        ("skyrl-gym", {"entry": "sums"}, NO_TASKS),
        ("skyrl-gym", {}, "environment.options: environment skyrl-gym needs the option entry"),
        ("openenv", {"entry": "guess:GuessEnvironment"}, "give arguments.action = module:Action"),
        (
            "openenv",
            {
                "entry": "guess:GuessEnvironment",
                "arguments": {"action": "guess:Guess"},
                "env": {"RAISE": "x y"},
            },
            "guess:GuessEnvironment does not start: openenv worker ended with status 1: RuntimeError: x y",
        ),
        ("openenv", {"entry": "ws://127.0.0.1:9"}, "no server there tells its schema"),
    ],
)
def test_mistakes_are_one_sentence(sums: Path, name: str, options: dict[str, Any], sentence: str) -> None:
    if "entry" in options and name == "skyrl-gym" and sentence != NO_TASKS:
        options = {"tasks": str(sums), **options}
    with pytest.raises(ConfigurationError) as refused:
        environment_factory(config_of(name, **options), RewardConfig())
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_sandbox_is_refused(sums: Path) -> None:
    config = sums_of(sums).model_copy(update={"sandbox": "process"})
    with pytest.raises(ConfigurationError, match='expected "none" for skyrl-gym'):
        environment_factory(config, RewardConfig())
