"""What tests of environments share: scripts, constant answers and messages played without a tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory, Script, environment_factory
from slipstream.interfaces import Environment, Resumable, Transition
from slipstream.tools.hermes import format_call, parse_call
from slipstream.types import Score, Split, Task, TaskAttempt

MOST_TURNS = 200


def factory_of(name: str, *, tool_failure_rate: float = 0.0, **options: Any) -> EnvironmentFactory:
    config = EnvironmentConfig(name=name, tool_failure_rate=tool_failure_rate, options=options)
    return environment_factory(config, RewardConfig())


def attempt(task: int = 0, number: int = 0) -> TaskAttempt:
    return TaskAttempt(task=task, seed=1, group=task, attempt=number)


async def step(environment: Environment, text: str) -> Transition:
    return await environment.step(parse_call(text, environment.tools))


async def close(environment: Environment) -> None:
    if hasattr(environment, "close"):
        await environment.close()


def success(factory: EnvironmentFactory, script: Script | None, tasks: int) -> float:
    """The share of held-out tasks that a script solves."""
    assert script is not None

    async def one(index: int) -> bool:
        task = factory.tasks.task(Split.HELDOUT, index)
        environment = factory.make()
        await environment.reset(task, attempt(index))
        play = script.play(task)
        text = next(play)
        for _ in range(MOST_TURNS):
            move = await step(environment, text)
            if move.done:
                break
            text = play.send(move.observation)
        scores = await environment.score()
        await close(environment)
        return scores[0].value == 1.0

    async def every() -> float:
        return sum([await one(index) for index in range(tasks)]) / tasks

    return asyncio.run(every())


def constant(factory: EnvironmentFactory, answer: str, tasks: int) -> float:
    """The share of held-out tasks that one answer solves."""

    def play(task: Task) -> Any:
        yield format_call("answer", {"text": answer})

    return success(factory, Script(play=play, about="says the same"), tasks)


def played(
    factory: EnvironmentFactory, task: Task, texts: Sequence[str]
) -> tuple[list[Transition], Sequence[Score]]:
    async def episode() -> tuple[list[Transition], Sequence[Score]]:
        environment = factory.make()
        await environment.reset(task, attempt(task.index))
        moves = [await step(environment, text) for text in texts]
        scores = await environment.score()
        await close(environment)
        return moves, scores

    return asyncio.run(episode())


def equal_in_pieces(factory: EnvironmentFactory, task: Task, of: TaskAttempt, texts: Sequence[str]) -> bool:
    """Whether an episode is the same when each step is played in an environment of its own."""

    async def begun() -> Resumable:
        environment = factory.make()
        assert isinstance(environment, Resumable)
        await environment.reset(task, of)
        return environment

    async def whole(environment: Resumable) -> Resumable:
        return environment

    async def moved(environment: Resumable) -> Resumable:
        state = msgspec.msgpack.decode(msgspec.msgpack.encode(environment.state()))
        await close(environment)
        fresh = factory.make()
        assert isinstance(fresh, Resumable)
        await fresh.restore(task, of, state)
        return fresh

    async def story(between: Callable[[Resumable], Awaitable[Resumable]]) -> Any:
        environment, moves = await begun(), []
        for text in texts:
            environment = await between(environment)
            move = await step(environment, text)
            moves.append((move.observation, move.done, move.reward, move.call and move.call.status))
        scores = list(await environment.score())
        await close(environment)
        return moves, scores

    async def both() -> bool:
        return bool(await story(whole) == await story(moved))

    return asyncio.run(both())
