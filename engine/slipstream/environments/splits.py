"""Floor 4. Generated questions that no two splits share: each question belongs to one by its own text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar
from zlib import crc32

from slipstream.types import Split

T = TypeVar("T")
ORDER: Final = tuple(Split)


def split_of(question: str) -> Split:
    """Return the split of a question: CRC-32 of its text modulo 3."""
    return ORDER[crc32(question.encode()) % len(ORDER)]


def first_of(split: Split, drawn: Iterable[tuple[str, T]]) -> tuple[str, T] | None:
    """Return the first drawn (question, rest) that belongs to the split, or None when there is none."""
    return next((each for each in drawn if split_of(each[0]) is split), None)
