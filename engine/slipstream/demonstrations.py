"""Floor 4. Scripted episodes: demonstrations for the warm start, baselines, previews."""

from __future__ import annotations

import random
from collections.abc import Sequence

from slipstream.config import RunConfig
from slipstream.environments import Script
from slipstream.environments.factory import ORACLE
from slipstream.episodes import EpisodeRunner
from slipstream.types import Lease, Split, TaskAttempt, Trajectory

FIRST_DEMONSTRATION = 1 << 24
"""Task index of the first demonstration: far from the tasks that reinforcement learning starts with."""


async def play(
    runner: EpisodeRunner, config: RunConfig, split: Split, index: int, script: Script
) -> Trajectory:
    """Play one task with a script."""
    attempt = TaskAttempt(task=index, seed=config.seed, group=index, attempt=0)
    messages = script.play(runner.factory.tasks.task(split, index))
    return await runner.scripted(Lease(attempt=attempt, split=split), messages)


async def demonstrations(
    runner: EpisodeRunner, config: RunConfig, numbers: Sequence[int]
) -> list[Trajectory]:
    """Play demonstrations by number; a number always gives the same one."""
    oracle = runner.factory.scripts[ORACLE]
    careless = runner.factory.careless or oracle
    shown = []
    for number in numbers:
        careful = random.Random(f"habits {config.seed} {number}").random() < config.warmup.careful_share
        script = oracle if careful else careless
        shown.append(await play(runner, config, Split.TRAIN, FIRST_DEMONSTRATION + number, script))
    return shown
