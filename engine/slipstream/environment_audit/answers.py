"""Floor 1. What the policy is to say, as far as a task's data tells."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Final

from slipstream.types import Task

ANSWER_KEYS: Final = frozenset(
    {"answer", "answers", "expected", "expected_answer", "gold", "golden", "ground_truth", "label"}
    | {"reference", "solution", "solutions", "target"}
)
"""What answers are called in a task's data where nothing says so."""
LONGEST: Final = 200
"""A longer answer is a document, not something to say."""


def answers_of(task: Task, secrets: Collection[str]) -> tuple[str, ...]:
    """Return what the policy is to say, as far as the task's data tells: each counts as right.

    Secrets may be more than answers, such as the way to them, which a question may hold: they are taken for
    answers only where nothing is called so.
    """
    called = [key for key in task.data if key.casefold() in ANSWER_KEYS]
    found: list[str] = []
    for key in called or [key for key in task.data if key in secrets]:
        value = task.data[key]
        for one in value if called and isinstance(value, list | tuple) else (value,):
            if isinstance(one, str | int | float) and not isinstance(one, bool):
                found.append(str(one).strip())
    return tuple(dict.fromkeys(text for text in found if 0 < len(text) <= LONGEST))


def holds(text: str, answers: Sequence[str]) -> bool:
    """Return whether one of the answers stands in a text as words of its own."""
    return any(pattern(answer).search(text) for answer in answers)


def pattern(answer: str) -> re.Pattern[str]:
    """Return what finds an answer as words of its own."""
    return re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)
