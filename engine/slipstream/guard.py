"""Floor 2. Which numbers may move the weights: finite ones that are no spikes.

A loss or gradient norm is a spike when its size exceeds `spike_factor` times the 90th percentile of those
accepted lately. A percentile, because norms of a policy gradient have a heavy tail: batches in which all
attempts of a group fare alike give nearly none, and twenty times the median is no rarity.

On 23 recorded runs (2,153 steps) the largest healthy one was 5.8 times that percentile.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from slipstream.types import Float32Array, Trajectory

WINDOW: Final = 64
"""Accepted updates that count as lately."""
WARMUP: Final = 16
"""Accepted updates before the first spike can be told."""
PERCENTILE: Final = 90
HARMLESS: Final = 1.0
"""A loss or norm up to this is no spike, whatever came before: those of a converged policy are near 0."""
LARGEST: Final = 1e6
"""No sound loss, norm, reward or advantage is larger, not even in the first update."""
LARGEST_LOGPROB: Final = 1e3
"""Nats: a token that unlikely is never sampled."""


class SpikeGuard:
    """Judges updates against those it has accepted.

    Example: ``reason = guard.fault(loss, norm)``; when it is "", update and ``guard.accept(loss, norm)``.
    """

    def __init__(self, factor: float) -> None:
        """With a factor of 0 only numbers that are not finite are refused."""
        self._factor = factor
        self._accepted = {name: deque[float](maxlen=WINDOW) for name in ("loss", "gradient norm")}

    def fault(self, loss: float, norm: float) -> str:
        """Return why an update with this loss and gradient norm must not happen, or ""."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
            limit = self._limit(self._accepted[name])
            if abs(value) > limit:
                return f"{name} is {value:.4g}, a spike: expected at most {limit:.4g}"
        return ""

    def accept(self, loss: float, norm: float) -> None:
        """Remember an update that was made."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            self._accepted[name].append(abs(value))

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data."""
        return {name: list(values) for name, values in self._accepted.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        for name, values in self._accepted.items():
            values.clear()
            values.extend(float(value) for value in state.get(name, ()))

    def _limit(self, accepted: Sequence[float]) -> float:
        if self._factor == 0.0:
            return math.inf
        if len(accepted) < WARMUP:
            return LARGEST
        usual = max(float(np.percentile(accepted, PERCENTILE)), HARMLESS / self._factor)
        return min(self._factor * usual, LARGEST)


def batch_fault(trajectories: Sequence[Trajectory], rewards: Float32Array, worth: Float32Array) -> str:
    """Return what no optimizer may see of a batch, or "".

    `rewards` and `worth` are the [trajectories] rewards and advantages. A reward of None, which is NaN among
    `rewards`, is no fault as long as none of the trajectory's scores is NaN.
    """
    for trajectory, reward, advantage in zip(trajectories, rewards.tolist(), worth.tolist(), strict=True):
        where = f"trajectory {trajectory.identity.actor}/{trajectory.identity.seq}"
        logprobs = np.abs(trajectory.behavior_logprobs[trajectory.loss_mask > 0])
        # Written so that NaN is not within.
        if not (logprobs <= LARGEST_LOGPROB).all():
            return f"behavior log-probability of {where} is {logprobs[~(logprobs <= LARGEST_LOGPROB)][0]}"
        temperature = trajectory.sampling.temperature
        if not 0.0 < temperature <= LARGEST:
            return f"temperature of {where} is {temperature}"
        for score in trajectory.scores:
            size = 0.0 if score.value is None else abs(score.value * score.weight)
            if not size <= LARGEST:
                return f"score {score.name} of {where} is {score.value} x {score.weight}"
        if reward == reward and not abs(reward) <= LARGEST:
            return f"reward of {where} is {reward}"
        if not abs(advantage) <= LARGEST:
            return f"advantage of {where} is {advantage}"
    return ""
