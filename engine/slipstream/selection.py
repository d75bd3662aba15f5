"""Floor 2. Which of two policies is better, and how often one of several tries succeeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import Final

import numpy as np

RESAMPLES: Final = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """A comparison on the tasks that both were tried on."""

    tasks: int
    difference: float
    """Success of the challenger minus that of the incumbent."""
    low: float
    """Bounds of the interval of that difference."""
    high: float


def paired(
    challenger: Mapping[int, bool], incumbent: Mapping[int, bool], *, confidence: float = 0.95, seed: int = 0
) -> Paired:
    """Compare two policies by task, with a bootstrap interval; equal arguments give equal bounds.

    With d_i = success of the challenger on task i minus that of the incumbent, the difference is the mean of
    d over the common tasks, and the bounds are quantiles of that mean over RESAMPLES draws of as many tasks
    with replacement. What makes a task hard for both cancels. Since each d_i is -1, 0 or 1, a draw is a
    multinomial count of the three.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3 (percentile interval).
    """
    common = challenger.keys() & incumbent.keys()
    if not common:
        return Paired(tasks=0, difference=0.0, low=-1.0, high=1.0)
    gains = [int(challenger[task]) - int(incumbent[task]) for task in common]
    n, shares = len(gains), [gains.count(gain) / len(gains) for gain in (-1, 0, 1)]
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=RESAMPLES)
    tail = (1.0 - confidence) / 2
    low, high = np.quantile((drawn[:, 2] - drawn[:, 0]) / n, [tail, 1.0 - tail])
    return Paired(tasks=n, difference=sum(gains) / n, low=float(low), high=float(high))


def pass_at_k(tries: int, successes: int, k: int) -> float:
    """Return the chance that at least one of k tries succeeds, estimated from more of them without bias.

        1 - C(n - c, k) / C(n, k)

    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1,
    arXiv:2107.03374.
    """
    if not (1 <= k <= tries and 0 <= successes <= tries):
        raise ValueError(f"pass@{k} of {successes} successes in {tries} tries")
    return 1.0 - comb(tries - successes, k) / comb(tries, k)
