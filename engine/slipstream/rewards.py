"""Floor 2. Turns the scores of a trajectory into its reward.

    reward = sum of outcomes + min(shaping, sum of shaping scores) - min(penalty_cap, sum of penalties)

Each component contributes weight x value. The caps make the outcome dominate whatever an environment
scores; `config_tasks.check_outcome_dominates` proves that they are small enough.

Dimensions: U turns of one trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from slipstream.config_tasks import RewardConfig
from slipstream.types import Float32Array, Score, ScoreKind

_REWARDED: Final = (ScoreKind.OUTCOME, ScoreKind.SHAPING, ScoreKind.PENALTY)


def reward(scores: Sequence[Score], config: RewardConfig) -> float | None:
    """Return a trajectory's reward, or None when its outcome could not be judged.

    None means: the trajectory leaves its group's baseline and is not trained. A shaping or penalty
    score that could not be judged counts as 0.

    Source: outcome +1 or -1, step -0.05, invalid call -0.2, as in the recipe's defaults.
    """
    outcomes = [score for score in scores if score.kind is ScoreKind.OUTCOME]
    if not outcomes or any(score.value is None for score in outcomes):
        return None
    return sum(map(_contribution, outcomes)) + _capped_shaping(scores, config) + capped(scores, config)


def capped(scores: Sequence[Score], config: RewardConfig) -> float:
    """Return the sum of all penalties, at least -penalty_cap and at most 0."""
    total = sum(_contribution(score) for score in scores if score.kind is ScoreKind.PENALTY)
    return min(0.0, max(-config.penalty_cap, total))


def components(scores: Sequence[Score]) -> dict[str, float]:
    """Return weight x value of every judged component by name, before any cap, for the metrics."""
    sums: dict[str, float] = {}
    for score in scores:
        if score.value is not None and score.kind in _REWARDED:
            sums[score.name] = sums.get(score.name, 0.0) + _contribution(score)
    return sums


def shown(trajectories: Sequence[Sequence[Score]]) -> dict[str, float]:
    """Return what the scores of many trajectories tell beside their reward, under the names of metrics.py.

    metric/NAME: mean over those in which it could be taken; fired/NAME: share in which that monitor fired;
    invalid/NAME: share in which that component could not be judged; screened: share without a verdict.
    """
    values: dict[str, list[float]] = {}
    for scores in trajectories:
        for score in scores:
            if score.kind is ScoreKind.METRIC and score.value is not None:
                values.setdefault(f"metric/{score.name}", []).append(score.value)
            elif score.kind in (ScoreKind.MONITOR, ScoreKind.HALT):
                values.setdefault(score.name, []).append(score.value or 0.0)
    means = {name: sum(taken) / len(taken) for name, taken in values.items()}
    for scores in trajectories:
        missing = [score for score in scores if score.value is None]
        for name in {score.name for score in missing}:
            means[f"invalid/{name}"] = means.get(f"invalid/{name}", 0.0) + 1.0 / len(trajectories)
        if any(score.kind is ScoreKind.OUTCOME for score in missing):
            means["screened"] = means.get("screened", 0.0) + 1.0 / len(trajectories)
    return means


def leniently(scores: Sequence[Score], progress: float) -> Sequence[Score]:
    """Return scores in which so much progress is a success: then each outcome is worth +1.

    Progress is the mean of the shaping scores, whatever their weights. With `progress` 0, or where an
    outcome or all of the shaping could not be judged, the scores stay what they are.
    """
    made = [score.value for score in scores if score.kind is ScoreKind.SHAPING and score.value is not None]
    outcomes = [score for score in scores if score.kind is ScoreKind.OUTCOME]
    if not progress or not made or any(score.value is None for score in outcomes):
        return scores
    if sum(made) / len(made) < progress:
        return scores
    return [replace(score, value=1.0) if score.kind is ScoreKind.OUTCOME else score for score in scores]


def turn_rewards(earned_U: Sequence[float], scores: Sequence[Score], config: RewardConfig) -> Float32Array:
    """Spread a trajectory's reward over its turns; the sum is `reward(scores, config)`.

    `earned_U` is what the environment gave in each turn apart from the outcome. Its penalties and its
    shaping are each scaled down alike until they fit the trajectory's caps; the last turn takes the
    outcome and whatever the turns did not account for. Returns [U] float32; zeros when the outcome
    could not be judged.
    """
    total = reward(scores, config)
    earned = np.asarray(earned_U, dtype=np.float64)
    if total is None or not len(earned):
        return np.zeros(len(earned), dtype=np.float32)
    losses, gains = np.minimum(earned, 0.0), np.maximum(earned, 0.0)
    turns = _fitted(losses, config.penalty_cap) + _fitted(gains, config.shaping)
    turns[-1] = total - turns[:-1].sum()
    return turns.astype(np.float32)


def _contribution(score: Score) -> float:
    return 0.0 if score.value is None else score.weight * score.value


def _capped_shaping(scores: Sequence[Score], config: RewardConfig) -> float:
    total = sum(_contribution(score) for score in scores if score.kind is ScoreKind.SHAPING)
    return max(0.0, min(config.shaping, total))


def _fitted(values_U: NDArray[np.float64], cap: float) -> NDArray[np.float64]:
    """Scale [U] values of one sign so that their sum is at most `cap` in size."""
    size = float(np.abs(values_U).sum())
    share = 1.0 if size <= cap else cap / size
    return share * values_U
