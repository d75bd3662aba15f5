"""The set of identities that only keeps intervals is a set."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from slipstream.seen import Seen
from slipstream.types import TrajectoryId


def identity(actor: str, epoch: int, seq: int) -> TrajectoryId:
    return TrajectoryId(run="run", actor=actor, epoch=epoch, seq=seq)


identities = st.builds(identity, st.sampled_from("ab"), st.integers(0, 1), st.integers(0, 12))


@given(st.lists(identities, unique=True), st.lists(identities))
def test_holds_what_was_added_and_nothing_else(added: list[TrajectoryId], asked: list[TrajectoryId]) -> None:
    seen = Seen()
    for number, one in enumerate(added):
        seen.add(one)
        known = set(added[: number + 1])
        assert [other in seen for other in asked + added] == [other in known for other in asked + added]
    again = Seen(seen.intervals())
    assert [one in again for one in asked + added] == [one in set(added) for one in asked + added]
    for _, _, found in seen.intervals():
        assert list(found) == sorted(found)
        # Whatever touches is one interval.
        assert all(one[1] < other[0] for one, other in pairwise(found))


def test_numbers_in_order_are_one_interval() -> None:
    seen = Seen()
    for seq in (5, 7, 6, 8, 4):
        seen.add(identity("a", 0, seq))
    assert list(seen.intervals()) == [("a", 0, ((4, 9),))]
