"""Episodes of τ²: gold actions, doing nothing, criteria one by one, states, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory, environment_factory
from slipstream.errors import ConfigurationError
from slipstream.interfaces import AssistantMessage, Resumable
from slipstream.tools.hermes import parse_call
from slipstream.types import Score, Split, Task, TaskAttempt, succeeded

pytest.importorskip("tau2")
pytest.importorskip("loguru")

ATTEMPT = TaskAttempt(task=0, seed=1, group=0, attempt=0)


def factory(name: str, **options: Any) -> EnvironmentFactory:
    config = EnvironmentConfig(name=f"tau2:{name}", tool_failure_rate=0.0, options=options)
    return environment_factory(config, RewardConfig(shaping=0.1))


def tasks(made: EnvironmentFactory, split: Split = Split.HELDOUT) -> list[Task]:
    source: Any = made.tasks
    return [source.task(split, index) for index in range(source.size(split))]


async def played(
    made: EnvironmentFactory, task: Task, script: str, *, pieces: bool = False
) -> tuple[list[str], tuple[Score, ...]]:
    environment = made.make()
    await environment.reset(task, ATTEMPT)
    player, heard = made.scripts[script].play(task), list[str]()
    text = next(player)
    while True:
        message = parse_call(text, environment.tools, plain=getattr(environment, "converses", False))
        assert not message.error, (task.data["id"], message.error, text)
        if pieces:
            assert isinstance(environment, Resumable)
            state = msgspec.msgpack.decode(msgspec.msgpack.encode(environment.state()))
            environment = made.make()
            await environment.restore(task, ATTEMPT, state)  # type: ignore[attr-defined]
        moved = await environment.step(message)
        heard.append(moved.observation)
        if moved.done:
            return heard, tuple(await environment.score())
        text = player.send(moved.observation)


@pytest.mark.parametrize("name", ["retail", "telecom"])
def test_the_gold_actions_solve_every_task_and_nothing_none(name: str) -> None:
    made = factory(name)
    assert len(tasks(made)) + len(tasks(made, Split.FRESH)) + len(tasks(made, Split.TRAIN)) > 100
    for task in tasks(made):
        assert succeeded(asyncio.run(played(made, task, "oracle"))[1]), task.data["id"]
        assert not succeeded(asyncio.run(played(made, task, "do_nothing"))[1]), task.data["id"]


def test_tasks_that_are_done_when_nothing_is_are_left_out_or_not() -> None:
    kept = {task.data["id"] for split in Split for task in tasks(factory("retail"), split)}
    every = {task.data["id"] for split in Split for task in tasks(factory("retail", idle=True), split)}
    assert (len(kept), len(every)) == (107, 114)
    assert every - kept == {"10", "12", "25", "50", "57", "65", "105"}


@pytest.mark.parametrize("name", ["retail", "telecom"])
def test_an_episode_goes_on_from_any_state(name: str) -> None:
    made = factory(name)
    for task in tasks(made)[:3]:
        whole = asyncio.run(played(made, task, "oracle"))
        assert whole == asyncio.run(played(made, task, "oracle", pieces=True))


def test_each_criterion_counts() -> None:
    made = factory("retail")
    task = next(task for task in tasks(made) if task.data["criteria"]["communicate_info"])
    *told, last = task.data["criteria"]["communicate_info"]

    async def said(text: str, *, acts: bool) -> dict[str, float]:
        environment = made.make()
        await environment.reset(task, ATTEMPT)
        for action in task.data["criteria"]["actions"] if acts else []:
            await environment.step(
                AssistantMessage(text="", name=action["name"], arguments=action["arguments"])
            )
        await environment.step(AssistantMessage(text=text))
        return {score.name: score.value or 0.0 for score in await environment.score()}

    everything = " ".join([*told, f"x{last}x"])
    assert asyncio.run(said(everything, acts=True))["outcome"] == 1.0
    assert asyncio.run(said(everything.upper(), acts=True))["outcome"] == 1.0
    silent = asyncio.run(said("Done.", acts=True))
    assert (silent["outcome"], silent["criteria"]) == (-1.0, 0.5)
    assert asyncio.run(said(f"{everything}?", acts=True))["outcome"] == -1.0, "the episode has not ended"
    idle = asyncio.run(said(everything, acts=False))
    assert (idle["outcome"], idle["criteria"]) == (-1.0, 0.5)


def test_actions_count_where_a_task_says_so() -> None:
    made = factory("telecom")
    task = next(
        task for task in tasks(made, Split.TRAIN) if "ACTION" in task.data["criteria"]["reward_basis"]
    )

    async def without(name: str) -> float | None:
        environment = made.make()
        await environment.reset(task, ATTEMPT)
        for action in task.data["criteria"]["actions"]:
            if action["name"] != name:
                await environment.step(
                    AssistantMessage(text="", name=action["name"], arguments=action["arguments"])
                )
        await environment.step(AssistantMessage(text="", name="done", arguments={}))
        return (await environment.score())[0].value

    assert asyncio.run(without("")) == 1.0
    assert asyncio.run(without("transfer_to_human_agents")) == -1.0


def test_a_customer_who_is_transferred_hangs_up() -> None:
    made = factory("retail")

    async def ends() -> list[bool]:
        environment = made.make()
        await environment.reset(tasks(made)[0], ATTEMPT)
        transfer = AssistantMessage(text="", name="transfer_to_human_agents", arguments={"summary": "x"})
        steps = [AssistantMessage(text="Anything else?"), transfer, AssistantMessage(text="Anything else?")]
        return [(await environment.step(step)).done for step in steps]

    assert asyncio.run(ends()) == [False, False, True]


def test_other_variants_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="tau2 has the variants retail, telecom, got tau2:airline"):
        factory("airline")
    assert environment_factory(EnvironmentConfig(name="tau2"), RewardConfig()).tasks.task(Split.TRAIN, 0)


def test_the_corpus_shows_what_episodes_hold() -> None:
    text = "\n".join(factory("telecom").corpus())
    for part in ("Telecom Agent Policy", "toggle_airplane_mode", "call done", "Customer name: John Smith"):
        assert part in text
