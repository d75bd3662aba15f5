"""A sandboxed environment: the same episodes bit for bit, and tools that cost an episode at most a step."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "torture"))

import playground

from slipstream.chat import Chat
from slipstream.config import EnvironmentConfig, RewardConfig, RunConfig, SandboxConfig, load_config
from slipstream.demonstrations import demonstrations
from slipstream.environments import EnvironmentFactory, environment_factory
from slipstream.environments.research import ResearchEnvironment, ResearchOptions, ResearchTasks
from slipstream.environments.sandboxed import SandboxedEnvironment, sandboxed
from slipstream.episodes import EpisodeRunner
from slipstream.errors import ConfigurationError, InfrastructureError
from slipstream.interfaces import AssistantMessage, Resumable, Transition
from slipstream.tools.hermes import format_call
from slipstream.tools.sandbox import why_not_bubblewrap
from slipstream.types import Lease, Outcome, Split, TaskAttempt, ToolStatus, Trajectory

BACKENDS = ["process", "bubblewrap"]


def needs(backend: str) -> None:
    if backend == "bubblewrap" and (reason := why_not_bubblewrap()):
        pytest.skip(f"bubblewrap does not work here: {reason}")


@contextmanager
def runner_of(chat: Chat, config: RunConfig) -> Iterator[EpisodeRunner]:
    factory = environment_factory(config.environment, config.rewards)
    # Scripts of the author's own are spared the sandbox; here it is what is tried.
    factory = dataclasses.replace(factory, rehearse=None)
    try:
        yield EpisodeRunner(
            factory=factory, chat=chat, environment=config.environment, rewards=config.rewards
        )
    finally:
        factory.close()


def shown(chat: Chat, *overrides: str) -> list[Trajectory]:
    config = load_config("research", ["environment.tool_failure_rate=0.4", *overrides])
    with runner_of(chat, config) as runner:
        return asyncio.run(demonstrations(runner, config, range(8), chat))


@pytest.mark.parametrize("backend", BACKENDS)
def test_episodes_are_the_same_bit_for_bit(chat: Chat, backend: str) -> None:
    needs(backend)
    for plain, boxed in zip(shown(chat), shown(chat, f"environment.sandbox={backend}"), strict=True):
        np.testing.assert_array_equal(plain.token_ids, boxed.token_ids)
        np.testing.assert_array_equal(plain.loss_mask, boxed.loss_mask)
        np.testing.assert_array_equal(plain.turn_rewards, boxed.turn_rewards)
        assert (plain.outcome, plain.note) == (boxed.outcome, boxed.note)
        assert tuple(plain.scores) == tuple(boxed.scores)
        assert [(c.turn, c.name, c.arguments, c.status, c.cached) for c in plain.tool_calls] == [
            (c.turn, c.name, c.arguments, c.status, c.cached) for c in boxed.tool_calls
        ]


def test_research_goes_on_from_any_state_as_if_nothing_had_happened() -> None:
    """Each step in an environment of its own, through what a wire makes of the state."""
    config, rewards = EnvironmentConfig(tool_failure_rate=0.5), RewardConfig()
    tasks = ResearchTasks(ResearchOptions())
    task, attempt = tasks.task(Split.TRAIN, 3), TaskAttempt(task=3, seed=1, group=3, attempt=0)
    title = f"{task.data['person']} home"
    calls = [("search", {"query": title})] * 6 + [("open", {"document": f}) for f in task.data["facts"]] * 3
    messages = [
        *(AssistantMessage(text="", name=name, arguments=arguments) for name, arguments in calls),
        AssistantMessage(text="", error="no tool call"),
        AssistantMessage(text="", name="answer", arguments={"text": task.data["answer"]}),
    ]

    async def whole() -> tuple[list[Any], Any]:
        environment = ResearchEnvironment(tasks, config, rewards)
        await environment.reset(task, attempt)
        moves = [await environment.step(message) for message in messages]
        return [(m.observation, m.done, m.reward) for m in moves], await environment.score()

    async def pieces() -> tuple[list[Any], Any]:
        environment = ResearchEnvironment(tasks, config, rewards)
        await environment.reset(task, attempt)
        moves = []
        for message in messages:
            state = msgspec.msgpack.decode(msgspec.msgpack.encode(environment.state()))
            environment = ResearchEnvironment(tasks, config, rewards)
            await environment.restore(task, attempt, state)
            moves.append(await environment.step(message))
        return [(m.observation, m.done, m.reward) for m in moves], await environment.score()

    assert asyncio.run(whole()) == asyncio.run(pieces())
    assert isinstance(ResearchEnvironment(tasks, config, rewards), Resumable)


@pytest.fixture(scope="module", params=BACKENDS)
def factory(request: pytest.FixtureRequest) -> Iterator[EnvironmentFactory]:
    needs(request.param)
    config = EnvironmentConfig(
        sandbox=request.param, limits=SandboxConfig(call_timeout_s=1.0, observation_chars=64)
    )
    made = sandboxed("playground:factory", config, RewardConfig(), packages=("attacks",))
    yield made
    made.close()


def played(factory: EnvironmentFactory, *cheats: str) -> tuple[list[Transition], float | None]:
    async def episode() -> tuple[list[Transition], float | None]:
        environment = factory.make()
        assert isinstance(environment, SandboxedEnvironment)
        try:
            await environment.reset(
                factory.tasks.task(Split.TRAIN, 0), TaskAttempt(task=0, seed=1, group=0, attempt=0)
            )
            moves = [await environment.step(message_of(cheat)) for cheat in cheats]
            (score,) = await environment.score()
            return moves, score.value
        finally:
            await environment.close()

    return asyncio.run(episode())


def message_of(cheat: str) -> AssistantMessage:
    name = "answer" if cheat.isdigit() else "cheat"
    return AssistantMessage(text="", name=name, arguments={"what": cheat})


@pytest.mark.parametrize(
    ("cheat", "shown"),
    [
        ("die", "error: tool crashed"),
        ("hang", "error: tool did not answer within 1 s"),
        ("blunder", "error: tool failed with IndexError"),
    ],
)
def test_a_tool_that_falls_costs_one_step(factory: EnvironmentFactory, cheat: str, shown: str) -> None:
    moves, outcome = played(factory, "nothing", cheat, "count", "4711")
    # The step that fell has not happened; those before it have.
    assert [move.observation for move in moves] == ["done", shown, "2", ""]
    calls = [move.call for move in moves]
    assert [(call.turn, call.name, call.status) for call in calls if call is not None] == [
        (0, "cheat", ToolStatus.OK),
        (1, "cheat", ToolStatus.CRASHED),
        (2, "cheat", ToolStatus.OK),
        (3, "answer", ToolStatus.OK),
    ]
    assert [call.arguments for call in calls if call is not None][1] == {"what": cheat}
    assert outcome == 1.0


def test_an_episode_goes_on_in_another_object(factory: EnvironmentFactory) -> None:
    task, attempt = factory.tasks.task(Split.TRAIN, 0), TaskAttempt(task=0, seed=1, group=0, attempt=0)

    async def moved() -> tuple[str, float | None]:
        one, other = factory.make(), factory.make()
        assert isinstance(one, SandboxedEnvironment) and isinstance(other, SandboxedEnvironment)
        try:
            await one.reset(task, attempt)
            await one.step(message_of("nothing"))
            await other.restore(task, attempt, one.state())
            assert other.state() == one.state()
            counted = await other.step(message_of("count"))
            await other.step(message_of("4711"))
            (score,) = await other.score()
            return counted.observation, score.value
        finally:
            await one.close()
            await other.close()

    assert asyncio.run(moved()) == ("2", 1.0)


def test_a_long_observation_is_cut_and_says_so(factory: EnvironmentFactory) -> None:
    (move,), _ = played(factory, "talk")
    assert move.observation == "x" * 64 + "\n[cut at 64 characters]"


def test_the_answer_never_is_where_tools_run(factory: EnvironmentFactory) -> None:
    (move,), outcome = played(factory, "read_the_number")
    assert (move.observation, outcome) == ("", -1.0)


def test_failures_of_the_ground_pass_through(factory: EnvironmentFactory) -> None:
    with pytest.raises(InfrastructureError, match="backend down"):
        played(factory, "fail")


@pytest.mark.parametrize(("call_timeout_s", "outcome"), [(0.5, Outcome.COMPLETED), (60.0, Outcome.TIMED_OUT)])
def test_tools_that_hang_delay_nobody_else(chat: Chat, call_timeout_s: float, outcome: Outcome) -> None:
    """One in ten hangs: it is cut by the call's deadline, or else by the episode's, and the rest goes on."""
    config = EnvironmentConfig(
        sandbox="auto", timeout_s=10.0, limits=SandboxConfig(call_timeout_s=call_timeout_s)
    )
    factory = sandboxed("playground:factory", config, RewardConfig(), packages=("attacks",))
    factory = dataclasses.replace(factory, rehearse=None)
    runner = EpisodeRunner(factory=factory, chat=chat, environment=config, rewards=RewardConfig())

    async def episodes() -> list[Trajectory]:
        return await asyncio.gather(
            *(runner.scripted(lease_of(n), said("hang" if n % 10 == 7 else "nothing")) for n in range(10))
        )

    try:
        made = asyncio.run(episodes())
    finally:
        factory.close()
    assert [t.outcome for t in made] == [outcome if n % 10 == 7 else Outcome.COMPLETED for n in range(10)]
    quick = [t.timings.finished_s for n, t in enumerate(made) if n % 10 != 7]
    assert outcome is Outcome.COMPLETED or max(quick) < made[7].timings.finished_s
    assert all(t.success is False and t.scores for t in made)


def lease_of(number: int) -> Lease:
    return Lease(attempt=TaskAttempt(task=number, seed=1, group=number, attempt=0), split=Split.TRAIN)


def said(cheat: str) -> Generator[str, str, None]:
    yield format_call("cheat", {"what": cheat})
    yield format_call("answer", {"what": "7"})


def test_an_environment_that_cannot_go_on_elsewhere_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Forgetful:
        tools = ()

    def forgetful(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
        made: Any = Forgetful
        return EnvironmentFactory(tasks=playground.PlaygroundTasks(), make=made, corpus=lambda: iter(()))

    monkeypatch.setattr(playground, "forgetful", forgetful, raising=False)
    expected = (
        "expected playground:forgetful to make environments with secrets, state and restore, got Forgetful"
    )
    with pytest.raises(ConfigurationError, match=expected):
        sandboxed("playground:forgetful", EnvironmentConfig(sandbox="process"), RewardConfig())
