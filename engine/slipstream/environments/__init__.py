"""Floor 4. Environments by name.

A name stands for a function that takes `EnvironmentConfig` and `RewardConfig` and returns an
`EnvironmentFactory`. Those that are shipped are listed here; one of a user is `module:attribute` or
`path.py:attribute`, and is that function, or a factory that needs no configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.config_sentences import hint
from slipstream.environments.factory import EnvironmentFactory, Play, Script
from slipstream.errors import ConfigurationError
from slipstream.interfaces import Checked
from slipstream.programs import attribute_at

__all__ = [
    "EnvironmentFactory",
    "Play",
    "Script",
    "Shipped",
    "environment_factory",
    "in_process",
    "variant_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """An environment that comes with Slipstream."""

    about: str
    factory: str
    """module:function."""
    extra: str = ""
    """What `pip install 'slipstream[...]'` it needs; empty: nothing."""
    variants: bool = False
    """Whether its name takes one, as in `name:variant`."""


SHIPPED: Final[Mapping[str, Shipped]] = MappingProxyType(
    {
        "deep-research": Shipped(
            about="Chains of words through real text, Python's own: search, open, check, note, answer.",
            factory="slipstream.environments.deep_research:factory",
        ),
        "research": Shipped(
            about="Who lives where: search, open and answer over a small library with near misses.",
            factory="slipstream.environments.research:factory",
        ),
        "bfcl": Shipped(
            about="BFCL multi-turn: a user's requests over eight stateful tool APIs, 800 tasks.",
            factory="slipstream.environments.bfcl:factory",
            extra="bfcl",
        ),
        "tau2": Shipped(
            about="τ²: a service agent, its policy and its database; tau2:retail or tau2:telecom.",
            factory="slipstream.environments.tau2:factory",
            extra="tau2",
            variants=True,
        ),
        "python": Shipped(
            about="Computations too long for the head: run Python, answer.",
            factory="slipstream.environments.python:factory",
            extra="python",
        ),
        "reasoning-gym": Shipped(
            about="Puzzles of one dataset, as in reasoning-gym:basic_arithmetic: a calculator, an answer.",
            factory="slipstream.environments.reasoning_gym:factory",
            extra="reasoning-gym",
            variants=True,
        ),
        "sql": Shipped(
            about="Questions over a shop's SQLite database: look at its schema, query, answer.",
            factory="slipstream.environments.sql:factory",
        ),
        "textworld": Shipped(
            about="Text games, as in textworld:coin: commands until the game is won or lost (needs Java).",
            factory="slipstream.environments.textworld:factory",
            extra="textworld",
            variants=True,
        ),
        "mcp": Shipped(
            about="Questions of your own over the tools of an MCP server; options.command, options.tasks.",
            factory="slipstream.environments.adapters.mcp:factory",
        ),
        "skyrl-gym": Shipped(
            about="An environment of SkyRL-gym in an interpreter of its own; options.python, options.entry.",
            factory="slipstream.environments.adapters.bridged:factory",
        ),
        "openenv": Shipped(
            about="An environment of OpenEnv, in an interpreter of its own or at a server; options.entry.",
            factory="slipstream.environments.adapters.bridged:factory",
        ),
        "verifiers": Shipped(
            about="A taskset of verifiers in an interpreter of its own; options.python, options.entry.",
            factory="slipstream.environments.adapters.bridged:factory",
        ),
    }
)


def environment_factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return the factory of the configured environment, in the sandbox that the configuration asks for.

    Raises ConfigurationError when there is no such environment, when its options are wrong, when what it
    needs is not installed, or when that sandbox does not work on this machine.
    """
    if config.sandbox == "none":
        factory = in_process(config, rewards)
    else:
        from slipstream.environments.sandboxed import sandboxed

        in_process(config, rewards)  # loads what the name stands for: the sandbox is shown its file
        config, packages = _inside(config)
        factory = sandboxed(f"{__name__}:{in_process.__name__}", config, rewards, packages=packages)
    if isinstance(factory.tasks, Checked):
        factory.tasks.check()
    return factory


def in_process(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return the factory of environments whose tools run where they are called."""
    name, _, variant = config.name.partition(":")
    shipped = SHIPPED.get(name)
    if shipped is not None:
        if variant and not shipped.variants:
            raise ConfigurationError(
                f"environment.name: {name} has no variants, got {config.name}; give {name}"
            )
        return _made(shipped.factory, config, rewards)
    if not variant:
        near = hint(name, list(SHIPPED)) or f"; shipped are {', '.join(SHIPPED)}"
        raise ConfigurationError(
            f"environment.name: there is no environment {name}{near}; one of your own is given as "
            "module:attribute or path.py:attribute"
        )
    return _made(config.name, config, rewards)


def variant_of(config: EnvironmentConfig) -> str:
    """Return what stands behind the colon of a shipped environment's name, or ""."""
    return config.name.partition(":")[2]


def _inside(config: EnvironmentConfig) -> tuple[EnvironmentConfig, tuple[str, ...]]:
    """Return a configuration for a sandbox, which knows files by their modules' names, and those names."""
    where, _, attribute = config.name.rpartition(":")
    if config.name.partition(":")[0] in SHIPPED:
        return config, ()
    module = Path(where).stem if where.endswith(".py") else where
    return config.model_copy(update={"name": f"{module}:{attribute}"}), (module.partition(".")[0],)


def _made(path: str, config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    found = attribute_at(path, key="environment.name")
    if callable(found) and not isinstance(found, EnvironmentFactory):
        found = found(config, rewards)
    if not isinstance(found, EnvironmentFactory):
        raise ConfigurationError(
            f"environment.name: expected {path} to be an EnvironmentFactory, or a function of "
            f"EnvironmentConfig and RewardConfig that returns one, got {type(found).__name__}"
        )
    return found
