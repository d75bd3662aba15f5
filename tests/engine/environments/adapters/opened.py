"""Factories that end with the block in which they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory, environment_factory


@contextmanager
def made(config: EnvironmentConfig) -> Iterator[EnvironmentFactory]:
    factory = environment_factory(config, RewardConfig())
    try:
        yield factory
    finally:
        factory.close()
