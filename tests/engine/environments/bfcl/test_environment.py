"""Episodes of BFCL: scripts, a user who goes on, withheld tools, states, sandboxes, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("bfcl_eval")

from slipstream.chat import Chat
from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory, environment_factory
from slipstream.environments.bfcl import DONE, IDLE
from slipstream.episodes import EpisodeRunner
from slipstream.interfaces import AssistantMessage, Conversing, Resumable, Transition
from slipstream.tools.hermes import format_call
from slipstream.types import Lease, Outcome, Split, Task, TaskAttempt, ToolStatus, Trajectory, succeeded


def configured(**keys: Any) -> EnvironmentConfig:
    roomy = {"max_tokens": 200_000, "max_turns": 99, "tool_failure_rate": 0.0, **keys}
    return EnvironmentConfig(name="bfcl", **roomy)


def factory(**keys: Any) -> EnvironmentFactory:
    return environment_factory(configured(**keys), RewardConfig())


def rollout(chat: Chat, config: EnvironmentConfig, index: int, script: str) -> Trajectory:
    made = environment_factory(config, RewardConfig())
    # Scripts are spared the sandbox; here it is what is tried.
    made = dataclasses.replace(made, rehearse=made.make) if config.sandbox != "none" else made
    runner = EpisodeRunner(factory=made, chat=chat, environment=config, rewards=RewardConfig())
    lease = Lease(attempt=TaskAttempt(task=index, seed=1, group=index, attempt=0), split=Split.HELDOUT)
    try:
        return asyncio.run(
            runner.scripted(lease, made.scripts[script].play(made.tasks.task(Split.HELDOUT, index)))
        )
    finally:
        made.close()


@pytest.mark.parametrize("index", range(0, 80, 4))
def test_the_gold_calls_solve_a_task(chat: Chat, index: int) -> None:
    trajectory = rollout(chat, configured(tool_schemas=index % 8 == 0), index, "oracle")
    assert trajectory.outcome is Outcome.COMPLETED
    assert trajectory.success
    assert all(call.status is ToolStatus.OK for call in trajectory.tool_calls)


def test_doing_nothing_solves_none() -> None:
    made = factory()

    async def won() -> int:
        count = 0
        for index in range(80):
            environment, task = made.make(), made.tasks.task(Split.HELDOUT, index)
            await environment.reset(task, attempt(index))
            for text in made.scripts["do_nothing"].play(task):
                last = await environment.step(AssistantMessage(text=text))
            assert last.done
            count += succeeded(await environment.score())
        return count

    assert asyncio.run(won()) == 0


def attempt(index: int) -> TaskAttempt:
    return TaskAttempt(task=index, seed=1, group=index, attempt=0)


def withheld(made: EnvironmentFactory) -> Task:
    """A task in which a tool is withheld."""
    return next(
        task
        for task in (made.tasks.task(Split.HELDOUT, index) for index in range(80))
        if task.data["given"] and task.data["calls"][0]
    )


def test_a_withheld_tool_is_unknown_until_the_user_gives_it() -> None:
    made = factory(tool_schemas=True)
    task = withheld(made)
    ((turn, (name, *_)),) = task.data["given"].items()

    async def episode() -> list[Transition]:
        environment = made.make()
        opening = await environment.reset(task, attempt(0))
        assert opening.user == task.question
        assert name not in {tool.name for tool in environment.tools}
        said = [await environment.step(AssistantMessage(text="", name=name, arguments={}))]
        said += [await environment.step(AssistantMessage(text=DONE)) for _ in range(int(turn))]
        assert [tool.name for tool in environment.tools][-1] == task.data["given"][turn][-1]
        return said

    refused, *answers = asyncio.run(episode())
    assert refused.observation == "error: unknown tool"
    assert [answer.role for answer in answers] == ["user"] * int(turn)
    assert answers[-1].observation.startswith(f'{{"name": "{task.data["given"][turn][0]}", "description": "')
    assert answers[-1].observation.endswith("These tools are new. Can you do it now?")


def test_calls_beyond_the_limit_of_a_turn_end_the_episode_as_a_failure() -> None:
    made = factory(options={"calls_per_turn": 2})
    task = made.tasks.task(Split.HELDOUT, 0)
    nothing = AssistantMessage(text="", error="no tool call")

    async def episode() -> tuple[list[bool], float | None]:
        environment = made.make()
        await environment.reset(task, attempt(0))
        done = [(await environment.step(nothing)).done for _ in range(2)]
        done.append((await environment.step(AssistantMessage(text=IDLE))).done)
        done += [(await environment.step(nothing)).done for _ in range(3)]
        return done, (await environment.score())[0].value

    assert asyncio.run(episode()) == ([False] * 5 + [True], -1.0)


def test_scores_count_turns_and_penalties() -> None:
    made = environment_factory(configured(), RewardConfig(shaping=0.2))
    task = next(
        task
        for task in (made.tasks.task(Split.HELDOUT, index) for index in range(80))
        if len(task.data["calls"]) == 4 and all(task.data["calls"]) and not task.data["given"]
    )

    async def episode() -> dict[str, float]:
        environment = made.make()
        await environment.reset(task, attempt(0))
        await environment.step(AssistantMessage(text="", error="no tool call"))
        for turn in task.data["calls"][:2]:
            for name, arguments in turn:
                await environment.step(AssistantMessage(text="", name=name, arguments=dict(arguments)))
            await environment.step(AssistantMessage(text=DONE))
        return {score.name: score.weight * (score.value or 0.0) for score in await environment.score()}

    messages = 1 + sum(len(turn) + 1 for turn in task.data["calls"][:2])
    assert asyncio.run(episode()) == pytest.approx(
        {"outcome": -1.0, "step": -0.05 * messages, "invalid": -0.2, "turns": 0.1}
    )


def test_an_episode_goes_on_from_any_state() -> None:
    """Each step in an environment of its own, through what a wire makes of the state."""
    made = factory(tool_failure_rate=0.3)
    task = withheld(made)

    async def episode(*, pieces: bool) -> tuple[list[Any], Any]:
        environment = made.make()
        assert isinstance(environment, Resumable) and isinstance(environment, Conversing)
        await environment.reset(task, attempt(1))
        moves = []
        for turn in task.data["calls"]:
            for name, arguments in [*turn, ("", None)]:
                if pieces:
                    state = msgspec.msgpack.decode(msgspec.msgpack.encode(environment.state()))
                    environment = made.make()
                    await environment.restore(task, attempt(1), state)
                message = AssistantMessage(
                    text=DONE, name=name, arguments=None if arguments is None else dict(arguments)
                )
                moved = await environment.step(message)
                names = [tool.name for tool in environment.tools]
                moves.append((moved.observation, moved.done, moved.reward, moved.role, names))
        return moves, await environment.score()

    assert asyncio.run(episode(pieces=False)) == asyncio.run(episode(pieces=True))


def test_a_sandbox_plays_the_same_episode(chat: Chat) -> None:
    """Tools differ from task to task there too, and are given in the middle."""
    plain = factory()
    index = next(index for index in range(80) if plain.tasks.task(Split.HELDOUT, index).data["given"])
    here = rollout(chat, configured(), index, "oracle")
    there = rollout(chat, configured(sandbox="process"), index, "oracle")
    assert there.success, there.note
    np.testing.assert_array_equal(here.token_ids, there.token_ids)
    assert tuple(here.scores) == tuple(there.scores)


def test_the_solution_is_kept_from_whoever_plays() -> None:
    made = factory()
    assert "calls" in made.make().secrets  # type: ignore[attr-defined]
    blind = {key: value for key, value in withheld(made).data.items() if key != "calls"}

    async def opening() -> str:
        task = withheld(made)
        environment = made.make()
        return (
            await environment.reset(
                Task(split=task.split, index=task.index, question=task.question, data=blind), attempt(0)
            )
        ).user

    assert asyncio.run(opening()) == withheld(made).question


def test_the_corpus_and_the_careless_script_are_made_of_episodes() -> None:
    made = factory(options={"categories": ["base"]})
    text = "\n".join(made.corpus())
    assert "Move 'final_report.pdf' within document directory" in text
    assert format_call("sort", {"file_name": "final_report.pdf"}) in text
    assert made.careless is not None
    task = made.tasks.task(Split.TRAIN, 0)
    said = list(made.careless.play(task))
    assert len(said) <= 2 * len(task.data["calls"])
    assert made.versions["bfcl-eval"]
