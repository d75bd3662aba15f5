"""Comparisons by task and pass@k, against numbers counted by hand and resampled without shortcuts."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.selection import Paired, paired, pass_at_k


def test_pass_at_k_counts_the_choices_that_hold_a_success() -> None:
    for n in range(1, 7):
        for c in range(n + 1):
            tries = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                choices = [any(choice) for choice in combinations(tries, k)]
                assert pass_at_k(n, c, k) == pytest.approx(np.mean(choices))
    assert pass_at_k(5, 2, 3) == pytest.approx(0.9)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_of_nonsense_is_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of {c} successes in {n} tries"):
        pass_at_k(n, c, k)


def test_what_is_hard_for_both_cancels() -> None:
    """30 tasks of 100 gained and 10 lost: 0.2, with the standard error of the paired differences, 0.06."""
    incumbent = {task: task < 50 for task in range(100)}
    challenger = {task: 10 <= task < 80 for task in range(100)}
    found = paired(challenger, incumbent)
    error = np.sqrt((0.4 - 0.2**2) / 100)
    assert (found.tasks, found.difference) == (100, 0.2)
    assert found.low == pytest.approx(0.2 - 1.96 * error, abs=0.011)
    assert found.high == pytest.approx(0.2 + 1.96 * error, abs=0.011)
    # Twice as wide as that is the interval of two unpaired shares.
    assert found == paired(challenger, incumbent)


def test_the_bounds_are_those_of_resampled_tasks() -> None:
    draw = np.random.default_rng(3)
    old, new = draw.random(60) < 0.5, draw.random(60) < 0.6
    gains = new.astype(int) - old.astype(int)
    means = draw.choice(gains, size=(20_000, 60)).mean(axis=1)
    found = paired(dict(enumerate(new.tolist())), dict(enumerate(old.tolist())))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.018)


def test_only_common_tasks_count() -> None:
    assert paired({1: True, 2: True}, {2: True, 3: False}) == Paired(
        tasks=1, difference=0.0, low=0.0, high=0.0
    )
    assert paired({1: True}, {}) == Paired(tasks=0, difference=0.0, low=-1.0, high=1.0)


@given(st.dictionaries(st.integers(0, 50), st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_sides_are_alike(both: dict[int, tuple[bool, bool]]) -> None:
    one = {task: pair[0] for task, pair in both.items()}
    other = {task: pair[1] for task, pair in both.items()}
    there, back = paired(one, other), paired(other, one)
    assert there.difference == -back.difference
    assert there.low <= there.difference <= there.high
