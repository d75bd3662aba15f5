"""The rig catches bugs: each, planted into the processes of a run, fails the quick test named for it."""

from __future__ import annotations

import bugs
import pytest
import quick

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]
SEEDS = 3
"""A bug that needs luck to show gets so many tries."""


@pytest.mark.parametrize("name", sorted(set(bugs.CAUGHT_BY.values())))
def test_the_clean_product_passes(name: str, torture_seed: int) -> None:
    found = quick.run(name, seed=torture_seed)
    assert not found["wrong"], "\n".join(found["wrong"])


@pytest.mark.parametrize("bug", sorted(bugs.CAUGHT_BY))
def test_a_planted_bug_is_caught(bug: str, torture_seed: int) -> None:
    name = bugs.CAUGHT_BY[bug]
    caught = any(quick.run(name, seed=torture_seed + n, bug=bug)["wrong"] for n in range(SEEDS))
    assert caught, f"{name} passes with {bug}, seeds {torture_seed} to {torture_seed + SEEDS - 1}"
