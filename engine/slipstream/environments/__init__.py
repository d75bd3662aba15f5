"""Floor 4. Environments by name."""

from __future__ import annotations

from typing import assert_never

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments.factory import EnvironmentFactory

__all__ = ["EnvironmentFactory", "environment_factory", "in_process"]


def environment_factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return the factory of the configured environment, in the sandbox that the configuration asks for.

    Raises ConfigurationError when that sandbox does not work on this machine.
    """
    if config.sandbox == "none":
        return in_process(config, rewards)
    from slipstream.environments.sandboxed import sandboxed

    return sandboxed(f"{__name__}:{in_process.__name__}", config, rewards)


def in_process(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return the factory of environments whose tools run where they are called."""
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
