"""Floor 4. Scripted episodes: demonstrations for the warm start, baselines, previews."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from slipstream.chat import Chat
from slipstream.config import RunConfig
from slipstream.environments import Script
from slipstream.environments.factory import ORACLE
from slipstream.episodes import EpisodeRunner
from slipstream.types import Lease, Split, TaskAttempt, ToolStatus, Trajectory

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
    runner: EpisodeRunner, config: RunConfig, numbers: Sequence[int], chat: Chat
) -> list[Trajectory]:
    """Play demonstrations by number, in the runner's chat format; a number always gives the same one."""
    oracle = runner.factory.scripts[ORACLE]
    careless = runner.factory.careless or oracle
    shown = []
    for number in numbers:
        careful = random.Random(f"habits {config.seed} {number}").random() < config.warmup.careful_share
        script = oracle if careful else careless
        played = await play(runner, config, Split.TRAIN, FIRST_DEMONSTRATION + number, script)
        hidden = careful and not config.warmup.careful_recovery
        shown.append(without_recovery(played, chat) if hidden else played)
    return shown


def without_recovery(trajectory: Trajectory, chat: Chat) -> Trajectory:
    """Return an episode in which the tool that is called next after a failed call is not trained.

    Its arguments are: how to call again is learnt, whether to is not.
    """
    mask_T = trajectory.loss_mask.copy()
    failed = {call.turn for call in trajectory.tool_calls if call.status is not ToolStatus.OK}
    for call in trajectory.tool_calls:
        if call.name and call.turn - 1 in failed:
            places = np.flatnonzero(trajectory.turns == call.turn)
            message = trajectory.token_ids[places]
            text = chat.decode(message)
            start = text.index(call.name, chat.calls.read(text)[0].start)
            mask_T[places[chat.span(message, start, start + len(call.name))]] = 0
    return replace(trajectory, loss_mask=mask_T)
