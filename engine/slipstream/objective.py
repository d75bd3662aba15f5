"""Floor 2. From rewards to advantages, and from the configuration to the kernels' objective: pure functions.

Dimensions: G trajectories of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slipstream.config import CurriculumConfig, ObjectiveConfig, RewardConfig
from slipstream.curriculum import is_alike
from slipstream.guard import LARGEST
from slipstream.rewards import reward
from slipstream.types import Float32Array, Trajectory
from slipstream_kernels import Objective, group_advantage


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Advantages:
    """What a batch's trajectories are worth against their groups."""

    rewards: Float32Array
    """[G] reward; NaN where the outcome could not be judged."""
    advantages: Float32Array
    """[G] reward relative to the group; 0 where the reward is NaN."""
    zero_variance_share: float
    """Share of groups whose judged rewards are all equal: nothing is learned from them."""


def kernel_objective(config: ObjectiveConfig) -> Objective:
    """Return the kernels' objective: decoupled PPO with a trust region and k2 to the warm start."""
    return Objective(
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        importance_cap=config.importance_cap,
        trust_low=config.trust_low,
        trust_high=config.trust_high,
        kl_coefficient=config.kl_coefficient,
        entropy_coefficient=config.entropy_coefficient,
    )


def advantages(
    trajectories: Sequence[Trajectory], objective: ObjectiveConfig, rewards: RewardConfig
) -> Advantages:
    """Return [G] group-relative advantages; a trajectory without a verdict leaves its group's baseline.

    advantage = reward - mean of the group (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783), or as
    `objective.advantage` says.
    """
    scored = np.array([_or_nan(reward(t.scores, rewards)) for t in trajectories], dtype=np.float32)
    groups = np.array([t.attempt.group for t in trajectories], dtype=np.int64)
    judged = np.isfinite(scored)
    result = np.zeros(len(trajectories), dtype=np.float32)
    if judged.any():
        result[judged] = group_advantage(
            torch.from_numpy(scored[judged]),
            torch.from_numpy(groups[judged]),
            kind=objective.advantage,
            std_floor=objective.std_floor if objective.advantage == "std" else 0.0,
        ).numpy()
    flat = [not np.ptp(scored[judged & (groups == group)]) for group in np.unique(groups[judged])]
    share = float(np.mean(flat)) if flat else 1.0
    return Advantages(rewards=scored, advantages=result, zero_variance_share=share)


def group_weights(
    trajectories: Sequence[Trajectory], rewards: Float32Array, config: CurriculumConfig
) -> Float32Array:
    """Return the [G] weight of each trajectory in the loss: less than 1 where its group tells nothing.

    `rewards` as in Advantages: a trajectory that could not be judged says nothing about its group.
    """
    weights = np.ones(len(trajectories), dtype=np.float32)
    if not config.enabled or config.dynamic.weight == 1.0:
        return weights
    groups = np.array([t.attempt.group for t in trajectories], dtype=np.int64)
    successes = np.array([t.success for t in trajectories])
    for group in np.unique(groups):
        members = np.flatnonzero((groups == group) & np.isfinite(rewards))
        if is_alike(rewards[members].tolist(), successes[members].tolist(), config):
            weights[groups == group] = config.dynamic.weight
    return weights


def _or_nan(value: float | None) -> float:
    # A batch with a reward too large for float32 is refused by guard.batch_fault.
    return value if value is not None and abs(value) <= LARGEST else math.nan
