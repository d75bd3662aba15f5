"""Floor 4. Deep research over real text: search, open, check, note, answer; several hops.

The text is not made up: sentences of Python's documentation, or of a folder (passages.py). Questions are made
from the text itself and are checked against its index (questions.py). A search lists the passage asked for
among near misses; `check` tells whether a passage holds the words searched for side by side. A model that
knows the text by heart has an advantage: the answer is a word of it.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from pydantic import Field

from slipstream.config import EnvironmentConfig, Part, RewardConfig
from slipstream.environments.deep_research.passages import TOPICS, words
from slipstream.environments.deep_research.players import (
    DO_NOTHING,
    DOES_NOT_HOLD,
    EXPERT,
    HASTY,
    HOLDS,
    NO_RESULTS,
    WITHOUT_CHECK,
    WITHOUT_RETRY,
    Habits,
    play,
)
from slipstream.environments.deep_research.questions import NUMBERS, DeepResearchTasks
from slipstream.environments.factory import ORACLE, EnvironmentFactory, Script
from slipstream.environments.options import read_options
from slipstream.environments.tool_episode import ANSWER, COMPLAINTS, FAULTS, Result, ToolEpisode, failed, tool
from slipstream.interfaces import ToolSpec
from slipstream.tools.cache import ToolCache, cache_of
from slipstream.tools.hermes import format_call
from slipstream.types import Score, ScoreKind, Split

VERSION: Final = "2"
"""Of the pure tools."""
FIRST_IDENTIFIER: Final = 10
MOST_NOTES: Final = 32

TOOLS: Final = (
    tool("search", "List the best passages that hold all words, in no order", "query", version=VERSION),
    tool("open", "Read a passage", "document", version=VERSION),
    tool(
        "check",
        "Tell whether a passage holds the words searched for last side by side, in their order",
        "document",
        version=VERSION,
    ),
    tool("note", "Write a note; all notes are shown", "text"),
    ANSWER,
)


class DeepResearchOptions(Part):
    """What is read, and how far."""

    corpus: str = Field(default=TOPICS, min_length=1)
    """"python-topics" or "python-help", which come with Python, or a folder of text (passages.py)."""
    hops: int = Field(default=2, ge=1, le=4)
    """Passages to find, one after the other."""
    uses: int = Field(default=1, ge=1)
    """Passages that hold each word asked by or for, at least: common words are easier to copy."""


def factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return what makes the environment; raises ConfigurationError for its options and its text."""
    options = read_options(DeepResearchOptions, config)
    tasks, cache = DeepResearchTasks(options.corpus, options.hops, options.uses), cache_of(config)

    def script(habits: Habits, about: str) -> Script:
        return Script(play=lambda task: play(task, habits), about=about)

    return EnvironmentFactory(
        tasks=tasks,
        make=lambda: DeepResearchEnvironment(tasks, config, rewards, cache),
        close=cache.close,
        corpus=lambda: corpus(tasks),
        scripts={
            "do_nothing": script(DO_NOTHING, 'answers "unknown" at once'),
            "without_check": script(WITHOUT_CHECK, "retries, believes the first passage"),
            "without_retry": script(WITHOUT_RETRY, "checks each passage, gives up at the first error"),
            ORACLE: script(EXPERT, "checks each passage and retries"),
        },
        careless=script(HASTY, "believes the first passage, gives up at the first error"),
        versions={"text of deep-research": tasks.library.digest},
    )


class DeepResearchEnvironment(ToolEpisode):
    """One episode of deep research."""

    tools: Sequence[ToolSpec] = TOOLS
    secrets: Collection[str] = ("answer", "passages")

    def __init__(
        self,
        tasks: DeepResearchTasks,
        config: EnvironmentConfig,
        rewards: RewardConfig,
        cache: ToolCache | None = None,
    ) -> None:
        super().__init__(config, rewards, cache)
        self._tasks, self._library = tasks, tasks.library
        self._opened: set[int] = set()
        self._listed: list[int] = []
        """Passages that searches have listed, in the order in which they got their numbers."""
        self._searched: list[str] = []
        """Words of the last search."""
        self._notes: list[str] = []

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Search, open, check or note."""
        argument: str = next(iter(arguments.values()))
        if name == "note":
            self._notes = [*self._notes, " ".join(argument.split())][-MOST_NOTES:]
            return Result(text="; ".join(self._notes))
        if name == "search":
            known, found = self._known(argument)
            shown = sorted(self._identifier(known.index(number)) for number in found)
            return Result(text="\n".join(map(str, shown)) or NO_RESULTS)
        number = self._number(argument)
        if number is None:
            return failed("no such document")
        text = self._library.passages[number]
        if name == "open":
            return Result(text=text)
        if not self._searched:
            return failed("search first")
        return Result(text=HOLDS if _side_by_side(self._searched, words(text)) else DOES_NOT_HOLD)

    def saw(self, name: str, arguments: Mapping[str, Any], result: Result) -> None:
        """Note what was searched for and which passages were read."""
        if name == "search":
            self._searched = words(arguments["query"])
            self._listed, _ = self._known(arguments["query"])
        number = self._number(arguments["document"]) if name == "open" else None
        if number is not None:
            self._opened.add(number)

    def world(self, name: str) -> Any:
        """Return what names the text, the numbers that passages carry, and for a check the last search."""
        searched = self._searched if name == "check" else []
        return [self._library.digest, self._task.data["numbering"], self._listed, searched]

    def right(self) -> bool:
        """Tell whether the answer is the word in the last gap."""
        expected: str = self._task.data["answer"]
        return (self._answer or "").strip().casefold() == expected.casefold()

    def more_scores(self) -> Sequence[Score]:
        """Shaping by the passages of the chain that were read."""
        found = len(self._opened.intersection(self._task.data["passages"])) / self._tasks.hops
        return (Score(name="passages", kind=ScoreKind.SHAPING, weight=self._rewards.shaping, value=found),)

    def memory(self) -> dict[str, Any]:
        """Return what was read, searched for and noted."""
        return {
            "opened": sorted(self._opened),
            "listed": self._listed,
            "searched": self._searched,
            "notes": self._notes,
        }

    def remember(self, memory: dict[str, Any]) -> None:
        """Take up what was read, searched for and noted."""
        self._opened = set(memory["opened"])
        self._listed = list(memory["listed"])
        self._searched, self._notes = list(memory["searched"]), list(memory["notes"])

    def _known(self, query: str) -> tuple[list[int], list[int]]:
        """Return the passages that have a number once this search has listed its own, and those it lists."""
        found = self._library.search(query)
        return [*self._listed, *(number for number in found if number not in self._listed)], found

    def _identifier(self, place: int) -> int:
        """Return the number of what was listed at a place: two digits while they last, none known before."""
        factor, shift = self._task.data["numbering"]
        return FIRST_IDENTIFIER + ((place * factor + shift) % NUMBERS if place < NUMBERS else place)

    def _number(self, identifier: str) -> int | None:
        """Return the listed passage that carries a number, or None."""
        shown = {str(self._identifier(place)): number for place, number in enumerate(self._listed)}
        return shown.get(identifier)


def _side_by_side(searched: Sequence[str], text: Sequence[str]) -> bool:
    return any(
        text[start : start + len(searched)] == searched for start in range(len(text) - len(searched) + 1)
    )


def corpus(tasks: DeepResearchTasks) -> Iterator[str]:
    """Yield text as episodes hold it: questions, calls, listings, passages, errors."""
    yield "Tools: search(query), open(document), check(document), note(text), answer(text)"
    yield from (*FAULTS, "error: no such document", "error: search first", *COMPLAINTS)
    yield from (HOLDS, DOES_NOT_HOLD, NO_RESULTS, format_call("answer", {"text": "unknown "}))
    draw = random.Random("deep research corpus")
    for text in tasks.library.passages:
        numbers = [str(FIRST_IDENTIFIER + draw.randrange(NUMBERS)) for _ in range(2)]
        yield text
        yield "\n".join(numbers)
        yield from (format_call(name, {"document": numbers[0]}) for name in ("open", "check"))
    for index in range(tasks.count(Split.TRAIN)):
        task = tasks.task(Split.TRAIN, index)
        yield task.question
        clue = f"{' '.join(task.data['clues'][0])} "
        yield format_call("search", {"query": clue})
        yield format_call("note", {"text": f"{clue}{task.data['answer']} "})
        yield format_call("answer", {"text": f"{task.data['answer']} "})
