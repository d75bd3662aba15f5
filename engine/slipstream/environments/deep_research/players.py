"""Floor 4. Scripted researchers of real text: demonstrators of the warm start, and baselines."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass

from slipstream.environments.deep_research.passages import WORD
from slipstream.environments.factory import Play
from slipstream.tools.hermes import format_call
from slipstream.tools.wording import ERROR
from slipstream.types import Task

HOLDS, DOES_NOT_HOLD, NO_RESULTS = "holds", "does not hold", "no results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What a scripted researcher does and does not do.

    Example: ``Habits(retries=True, checks=False)`` repeats what failed and believes the first passage.
    """

    retries: bool
    """Repeats a call that returned an error; otherwise answers "unknown"."""
    checks: bool
    """Reads only a passage that holds the words side by side; otherwise the first one listed."""
    notes: bool = False
    """Notes what each passage says: both words and the one behind them."""
    acts: bool = True
    """Uses tools at all."""


EXPERT = Habits(retries=True, checks=True, notes=True)
WITHOUT_RETRY = Habits(retries=False, checks=True)
WITHOUT_CHECK = Habits(retries=True, checks=False)
HASTY = Habits(retries=False, checks=False, notes=True)
DO_NOTHING = Habits(retries=False, checks=False, acts=False)


def play(task: Task, habits: Habits) -> Play:
    """Play one episode as a generator: yields messages, is sent each tool result."""
    clues: list[list[str]] = task.data["clues"]
    try:
        if not habits.acts:
            raise _GaveUp
        found, second = clues[0]
        for hop, clue in enumerate(clues):
            if hop:
                second = clue[0]
            found = yield from _followed(found, second, habits)
    except _GaveUp:
        found = "unknown"
    # Words keep the blank behind them, as in a passage: it is part of their token.
    yield format_call("answer", {"text": f"{found} "})


class _GaveUp(Exception):
    """Raised inside a script that does not know how to go on."""


def _followed(first: str, second: str, habits: Habits) -> Generator[str, str, str]:
    """Search for two words, find the passage in which they are neighbours; return the word behind them."""
    listed = yield from _insist("search", "query", f"{first} {second} ", habits)
    for document in [] if listed == NO_RESULTS else listed.split("\n"):
        if habits.checks:
            verdict = yield from _insist("check", "document", document, habits)
            if verdict != HOLDS:
                continue
        text = yield from _insist("open", "document", document, habits)
        found = _word_behind(text, first, second)
        if habits.notes:
            yield from _insist("note", "text", f"{first} {second} {found} ", habits)
        return found
    raise _GaveUp


def _word_behind(text: str, first: str, second: str) -> str:
    """Return the word behind both words, or else behind the second one, where a hasty reader looks."""
    for start in (rf"\b{re.escape(first)}\W+{re.escape(second)}", rf"\b{re.escape(second)}"):
        found = re.search(rf"{start}\W+({WORD.pattern})", text, re.IGNORECASE)
        if found:
            return found[1]
    raise _GaveUp


def _insist(name: str, argument: str, value: str, habits: Habits) -> Generator[str, str, str]:
    """Make a call, again after each error if that is the habit."""
    while True:
        result = yield format_call(name, {argument: value})
        if not result.startswith(ERROR):
            return result
        if not habits.retries:
            raise _GaveUp
