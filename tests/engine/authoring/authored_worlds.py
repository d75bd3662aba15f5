"""What these tests share: a small environment, and an episode played by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from slipstream.authoring.environment import Authored, environment
from slipstream.authoring.episode import Episode
from slipstream.authoring.rewards import reward
from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.interfaces import AssistantMessage, Environment, Transition
from slipstream.tools.hermes import parse_call
from slipstream.types import Score, Split, TaskAttempt

ATTEMPT = TaskAttempt(task=0, seed=1, group=0, attempt=0)
QUIET = EnvironmentConfig(name="own", tool_failure_rate=0.0)


def capitals(split: str, index: int) -> dict[str, Any]:
    return {"question": f"Capital {index} of {split}?", "answer": f"City {index}", "hint": "north"}


@reward(1.0)
def right(episode: Episode) -> bool:
    return bool(episode.answer == episode.task.data["answer"])


def world(tools: Sequence[Any] = (), rewards: Sequence[Any] = (right,), **more: Any) -> Authored:
    return environment(tasks=capitals, tools=tools, rewards=rewards, **more)


def opened(authored: Authored, config: EnvironmentConfig = QUIET, **weights: float) -> Environment:
    """Return an environment at the beginning of held-out task 0."""
    factory = authored(config, RewardConfig(**weights))
    made = factory.make()
    asyncio.run(made.reset(factory.tasks.task(Split.HELDOUT, 0), ATTEMPT))
    return made


def say(made: Environment, text: str) -> Transition:
    return asyncio.run(made.step(parse_call(text, made.tools)))


def scores(made: Environment) -> dict[str, Score]:
    return {score.name: score for score in asyncio.run(made.score())}


def answered(authored: Authored, text: str = "City 0", **weights: float) -> dict[str, Score]:
    """Return the scores of an episode in which the policy only answers."""
    made = opened(authored, **weights)
    asyncio.run(made.step(AssistantMessage(text=text, name="answer", arguments={"text": text})))
    return scores(made)


Judging = Callable[[Episode], Any]
