"""A question belongs to one split, and to the same for ever."""

from __future__ import annotations

from slipstream.environments.splits import first_of, split_of
from slipstream.types import Split


def test_each_question_has_its_split() -> None:
    """Literal: another rule would show trained policies questions that they know."""
    assert [split_of(text) for text in ("What is 1 + 1?", "What is 1 + 2?", "", "é")] == GOLDEN
    counts = [sum(split_of(f"question {n}") is split for n in range(3000)) for split in Split]
    assert all(900 < count < 1100 for count in counts)


GOLDEN = [Split.TRAIN, Split.HELDOUT, Split.TRAIN, Split.FRESH]


def test_the_first_that_belongs_is_taken() -> None:
    drawn = [(f"question {n}", n) for n in range(50)]
    for split in Split:
        found = first_of(split, drawn)
        assert found == next((text, n) for text, n in drawn if split_of(text) is split)
    assert first_of(Split.TRAIN, []) is None
