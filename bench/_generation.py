"""Prints the tokens/s of an actor never short of episodes: python bench/_generation.py CONFIG POLICY."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from slipstream import config as configuration
from slipstream.config import RunConfig
from slipstream.environments import environment_factory
from slipstream.episodes import EpisodeRunner
from slipstream.inference.trial import held_trial
from slipstream.model import choose_device, load_policy
from slipstream.types import Split

FILLS = 4


def tokens_per_s(config: RunConfig, folder: Path) -> float:
    """Return the rate between the ends of a short and a long trial: filling up and running dry cancel out."""
    torch.set_num_threads(config.actor.threads)
    policy = load_policy(folder, config=config.model, device=choose_device(config.device))
    runner = EpisodeRunner(
        factory=environment_factory(config.environment, config.rewards),
        chat=policy.chat,
        environment=config.environment,
        rewards=config.rewards,
    )

    def trial(tasks: int) -> tuple[float, int]:
        began = time.perf_counter()
        shown = held_trial(
            policy,
            runner,
            split=Split.TRAIN,
            tasks=tasks,
            temperature=config.sampling.temperature,
            top_p=1.0,
            config=config,
        )
        return time.perf_counter() - began, sum(int(t.loss_mask.sum()) for t in shown)

    fill = config.actor.concurrency
    trial(fill)  # the first trial also builds the tasks
    short_s, short_tokens = trial(fill)
    long_s, long_tokens = trial((FILLS + 1) * fill)
    return (long_tokens - short_tokens) / (long_s - short_s)


if __name__ == "__main__":
    sys.stdout.write(f"{tokens_per_s(configuration.read(Path(sys.argv[1])), Path(sys.argv[2])):.6g}\n")
