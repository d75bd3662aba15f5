"""Floor 4. Scripted researchers: demonstrators of the warm start, baselines of a trained policy."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import TypedDict

from slipstream.environments.factory import ORACLE, Play, Script
from slipstream.tools.hermes import format_call
from slipstream.types import Task

_HOME = re.compile(r"^(?P<name>\w+ \w+) (?P<verb>lives in|left|was in) (?P<city>\w+)\.$")
_MANAGER = re.compile(r"^(?P<boss>\w+ \w+) (?P<verb>is the manager|was the manager|left the team) of ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How often a scripted researcher takes care, at each decision: 0 never, 1 always.

    Example: ``Habits(retrying=0.0, reading_on=1.0)`` reads carefully but gives up at the first error.
    """

    retrying: float
    """Repeats a call that returned an error; otherwise answers "unknown"."""
    reading_on: float
    """Goes on to the next document after a near miss; otherwise believes it."""
    acts: bool = True
    """Uses tools at all; otherwise answers "unknown" at once."""
    chance: random.Random = field(default_factory=random.Random, compare=False, repr=False)
    """What decides when neither never nor always does."""

    def retries(self) -> bool:
        """Decide about one error."""
        return self.chance.random() < self.retrying

    def reads_on(self) -> bool:
        """Decide about one near miss."""
        return self.chance.random() < self.reading_on


EXPERT = Habits(retrying=1.0, reading_on=1.0)
WITHOUT_RETRY = Habits(retrying=0.0, reading_on=1.0)
HASTY = Habits(retrying=0.0, reading_on=0.0)
DO_NOTHING = Habits(retrying=0.0, reading_on=0.0, acts=False)


def decided(habits: Habits, task: Task) -> Habits:
    """Return the same habits with chances of their own: equal tasks meet equal decisions."""
    return replace(habits, chance=random.Random(f"habits {task.split} {task.index}"))


class Players(TypedDict):
    """Members of an `EnvironmentFactory`."""

    scripts: dict[str, Script]
    careless: Script


def usual_players(
    play: Callable[[Task, Habits], Play], *, does: str, hastily: str, careless: Habits = HASTY
) -> Players:
    """Return the usual scripts of an environment that answers in the end, all of them one player's habits.

    does, hastily: what it does with care and without, as in "reads on"; careless: habits of the player whose
    demonstrations hold mistakes. Example:
    ``EnvironmentFactory(**usual_players(compute, does="computes", hastily="computes something near"), ...)``.
    """

    def script(habits: Habits, about: str) -> Script:
        return Script(play=lambda task: play(task, decided(habits, task)), about=about)

    return {
        "scripts": {
            "do_nothing": script(DO_NOTHING, 'answers "unknown" at once'),
            "without_retry": script(WITHOUT_RETRY, f"{does}, gives up at the first error"),
            ORACLE: script(EXPERT, f"{does} and retries"),
        },
        "careless": script(careless, f"{hastily}, gives up at the first error"),
    }


def research(task: Task, habits: Habits) -> Generator[str, str, None]:
    """Play one episode as a generator: yields messages, is sent each tool result.

    Example: ``player = research(task, EXPERT); next(player); player.send("17\\n42\\n63")``.
    """
    try:
        if not habits.acts:
            raise GaveUp
        subject = task.data["person"]
        for _ in range(task.data["hops"] - 1):
            subject = yield from _find(f"{subject} manager", _MANAGER, "boss", "is the manager", habits)
        city = yield from _find(f"{subject} home", _HOME, "city", "lives in", habits)
    except GaveUp:
        city = "unknown"
    yield format_call("answer", {"text": city})


class GaveUp(Exception):
    """Raised inside a script that knows no further; it then answers "unknown"."""


def _find(
    query: str, pattern: re.Pattern[str], field: str, true_verb: str, habits: Habits
) -> Generator[str, str, str]:
    """Search, then open documents until one convinces; return the field it tells."""
    listed = yield from insist(format_call("search", {"query": query}), habits)
    for identifier in listed.split("\n"):
        body = yield from insist(format_call("open", {"document": identifier}), habits)
        told = pattern.match(body)
        if told and (told["verb"] == true_verb or not habits.reads_on()):
            return told[field]
    raise GaveUp


def insist(call: str, habits: Habits) -> Generator[str, str, str]:
    """Make a call, again after each error if that is the habit."""
    while True:
        result = yield call
        if not result.startswith("error"):
            return result
        if not habits.retries():
            raise GaveUp
