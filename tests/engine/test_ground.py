"""What an episode stands on: tools that change on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from slipstream.chat import Chat
from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory
from slipstream.environments.tool_episode import tool
from slipstream.episodes import EpisodeRunner
from slipstream.interfaces import AssistantMessage, Observation, ToolSpec, Transition
from slipstream.tools.hermes import format_call
from slipstream.types import Lease, Outcome, Score, ScoreKind, Split, Task, TaskAttempt

KNOCK, ENTER = tool("knock", "Knock"), tool("enter", "Enter")


class House:
    """Whoever has knocked may enter."""

    def __init__(self) -> None:
        self.tools: Sequence[ToolSpec] = ()

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        self.tools = (KNOCK,)
        return Observation(system="", user="Enter!")

    async def step(self, message: AssistantMessage) -> Transition:
        if message.error:
            return Transition(observation=f"error: {message.error}", done=False)
        self.tools = (KNOCK, ENTER)
        return Transition(observation="Come in.", done=message.name == "enter")

    async def score(self) -> Sequence[Score]:
        return [Score(name="outcome", kind=ScoreKind.OUTCOME, weight=1.0, value=1.0)]


class Streets:
    def task(self, split: Split, index: int) -> Task:
        return Task(split=split, index=index, question="Enter!", data={})


def test_tools_may_change_with_a_reset_and_with_a_step(chat: Chat) -> None:
    config = EnvironmentConfig(max_tokens=2048)
    runner = EpisodeRunner(
        factory=EnvironmentFactory(tasks=Streets(), make=House),
        chat=chat,
        environment=config,
        rewards=RewardConfig(),
    )
    heard: list[str] = []

    def visitor() -> Any:
        for name in ("enter", "knock", "enter"):
            heard.append((yield format_call(name, {})))

    attempt = TaskAttempt(task=0, seed=1, group=0, attempt=0)
    trajectory = asyncio.run(runner.scripted(Lease(attempt=attempt, split=Split.TRAIN), visitor()))
    assert trajectory.outcome is Outcome.COMPLETED
    assert heard == ["error: unknown tool", "Come in."]
    assert "Tools: knock()" in chat.decode(trajectory.token_ids)
