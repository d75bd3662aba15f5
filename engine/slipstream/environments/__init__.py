"""Floor 4. Environments by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import assert_never

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.interfaces import Environment, TaskSource


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentFactory:
    """Makes one environment object per episode, and the tasks they pose."""

    tasks: TaskSource
    make: Callable[[], Environment]
    corpus: Callable[[], Iterator[str]]
    """Yields text as its episodes hold it, to train a tokenizer on."""


def environment_factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return the factory of the configured environment."""
    match config.name:
        case "research":
            from slipstream.environments.research import ResearchEnvironment, ResearchTasks, corpus

            tasks = ResearchTasks(config)
            return EnvironmentFactory(
                tasks=tasks,
                make=lambda: ResearchEnvironment(tasks, config, rewards),
                corpus=lambda: corpus(config),
            )
        case _:
            assert_never(config.name)
