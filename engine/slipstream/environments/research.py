"""Floor 4. Deep research over a document store: search, open, answer; near misses and failing tools included.

A *world* is a small company: people stand in a ring, each managed by the next, each living in a city.
Every fact is told by one true document and several near misses ("left", "was in") under the same title,
so that a title never gives the answer away and each document must be read. Names recur in every world
with other facts: nothing can be learned by heart.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

from pydantic import Field, model_validator

from slipstream.config import EnvironmentConfig, Part, RewardConfig
from slipstream.config_base import Share
from slipstream.environments.factory import EnvironmentFactory
from slipstream.environments.options import read_options
from slipstream.environments.scripted import Habits, research, usual_players
from slipstream.environments.tool_episode import ANSWER, COMPLAINTS, FAULTS, Result, ToolEpisode, failed, tool
from slipstream.errors import ConfigurationError
from slipstream.interfaces import Observation, ToolSpec
from slipstream.tools.cache import ToolCache, cache_of
from slipstream.tools.documents import Document, DocumentStore
from slipstream.tools.hermes import format_call
from slipstream.types import Score, ScoreKind, Split, Task, TaskAttempt, ToolStatus


def words(text: str) -> list[str]:
    """Return the words of a text."""
    return text.split()


FIRST_NAMES = words(
    "Ada Bela Carl Dora Emil Fay Gus Hana Ivan Jana Karl Lena Milo Nora Otto Pia Quin Rosa Saul "
    "Tara Ugo Vera Walt Xena Yuri Zoe Abel Beth Cleo Drew Elsa Finn"
)
LAST_NAMES = words(
    "Adler Brandt Conti Dahl Egan Falk Gruber Holm Ivers Jansen Kline Lund Moss Novak Olsen "
    "Payne Quist Reyes Stone Tran Urban Vance Weber Xavier Young Zorn Archer Becker Cole Drake "
    "Ellis Ford"
)
CITIES = words(
    "Athens Bern Cairo Delhi Essen Fes Genoa Hanoi Izmir Jena Kyoto Lima Milan Nice Oslo Porto "
    "Quito Rome Seoul Turin Ulm Vienna Warsaw Xian York Zagreb Accra Basel Cork Dakar Evora "
    "Faro"
)
FIRST_IDENTIFIER, IDENTIFIERS = 10, 90
"""Identifiers are numbers from the first one on; two digits while they last."""
TASKS_PER_WORLD = 8
LEAST_PEOPLE = 10
"""So many that each task has its person and each manager enough near misses."""
OF_WORLDS = ("hops", "documents_per_fact")
"""Options that a world is drawn by; the others choose and play its tasks."""

TOOLS = (
    tool("search", "List documents whose title holds all words", "query", version="1"),
    tool("open", "Read a document", "document", version="1"),
    ANSWER,
)


class ResearchOptions(Part):
    """What is asked, and how much stands in its way."""

    hops: int = Field(default=1, ge=1, le=8)
    """Facts to chain before the answer is known."""
    least_hops: int = Field(default=0, ge=0, le=8)
    """Tasks chain so many, one more, and so on up to `hops`, in turn; 0: all of them chain `hops`."""
    documents_per_fact: int = Field(default=3, ge=1, le=8)
    """One true document and this many less one near misses."""
    retrying: Share = 0.0
    """Share of errors after which the careless player of demonstrations repeats its call."""
    reading_on: Share = 0.0
    """Share of near misses after which it opens the next document."""

    @model_validator(mode="after")
    def _hops_in_order(self) -> Self:
        if self.least_hops > self.hops:
            raise ConfigurationError(
                f"environment.options.least_hops must be at most hops = {self.hops}, got {self.least_hops}"
            )
        return self

    def hops_of(self, index: int) -> int:
        """Return how many facts a task chains."""
        least = self.least_hops or self.hops
        return least + index % (self.hops - least + 1)


def factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return what makes the environment; raises ConfigurationError for its options."""
    options = read_options(ResearchOptions, config)
    tasks, cache = ResearchTasks(options), cache_of(config)

    return EnvironmentFactory(
        tasks=tasks,
        make=lambda: ResearchEnvironment(tasks, config, rewards, cache),
        close=cache.close,
        corpus=lambda: corpus(options),
        **usual_players(
            research,
            does="reads on",
            hastily="believes the first document",
            careless=Habits(retrying=options.retrying, reading_on=options.reading_on),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One company: who lives where, and the documents that tell it."""

    people: tuple[str, ...]
    """In ring order: person i is managed by person i + 1."""
    homes: tuple[str, ...]
    documents: tuple[Document, ...]

    def answer(self, person: int, hops: int) -> str:
        """Return the city of the person `hops - 1` managers above `person`."""
        return self.homes[(person + hops - 1) % len(self.people)]

    def facts(self, person: int, hops: int) -> tuple[str, ...]:
        """Return the identifiers of the true documents that lead to the answer."""
        names = [self.people[(person + hop) % len(self.people)] for hop in range(hops)]
        titles = {f"{name} manager" for name in names[:-1]} | {f"{names[-1]} home"}
        true = (" lives in ", " is the manager of ")
        return tuple(
            d.identifier for d in self.documents if d.title in titles and any(verb in d.body for verb in true)
        )


def build_world(split: Split, number: int, options: ResearchOptions) -> World:
    """Draw a world; equal arguments give equal worlds."""
    draw = random.Random(f"world {split} {number}")
    kinds = 1 if options.hops == 1 else 2
    per_person = kinds * options.documents_per_fact
    size = max(IDENTIFIERS // per_person, LEAST_PEOPLE)
    names = draw.sample([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], size)
    homes = [draw.choice(CITIES) for _ in names]
    pages: list[tuple[str, str]] = []
    for person, name in enumerate(names):
        pages += [(f"{name} home", body) for body in _home_bodies(name, homes[person], options, draw)]
        if kinds == 2:
            boss = names[(person + 1) % size]
            pages += [(f"{name} manager", body) for body in _manager_bodies(name, boss, names, options, draw)]
    draw.shuffle(pages)
    numbers = range(FIRST_IDENTIFIER, FIRST_IDENTIFIER + max(IDENTIFIERS, len(pages)))
    identifiers = [str(number) for number in draw.sample(numbers, len(pages))]
    documents = [
        Document(identifier=i, title=title, body=body)
        for i, (title, body) in zip(identifiers, pages, strict=True)
    ]
    return World(people=tuple(names), homes=tuple(homes), documents=tuple(documents))


def _home_bodies(name: str, home: str, options: ResearchOptions, draw: random.Random) -> Iterator[str]:
    yield f"{name} lives in {home}."
    others = draw.sample([city for city in CITIES if city != home], options.documents_per_fact - 1)
    for city in others:
        yield draw.choice((f"{name} left {city}.", f"{name} was in {city}."))


def _manager_bodies(
    name: str, boss: str, names: Sequence[str], options: ResearchOptions, draw: random.Random
) -> Iterator[str]:
    yield f"{boss} is the manager of {name}."
    others = draw.sample(
        [other for other in names if other not in (name, boss)], options.documents_per_fact - 1
    )
    for other in others:
        yield draw.choice((f"{other} was the manager of {name}.", f"{other} left the team of {name}."))


class ResearchTasks:
    """Tasks of the research environment: "Where does the manager of Ada Kline live?"."""

    def __init__(self, options: ResearchOptions) -> None:
        self.options = options
        self.world = lru_cache(maxsize=256)(self._world)
        # A group poses one task many times.
        self.task = lru_cache(maxsize=4096)(self._task)

    def _task(self, split: Split, index: int) -> Task:
        """Return the task at `index`; worlds never cross splits."""
        number, person = divmod(index, TASKS_PER_WORLD)
        world, _ = self.world(split, number)
        hops = self.options.hops_of(index)
        chain = "the manager of " * (hops - 1)
        question = f"Where does {chain}{world.people[person]} live?"
        data = {
            "hops": hops,
            "answer": world.answer(person, hops),
            "world": number,
            "person": world.people[person],
            "facts": world.facts(person, hops),
        }
        return Task(split=split, index=index, question=question, data=data)

    def _world(self, split: Split, number: int) -> tuple[World, DocumentStore]:
        world = build_world(split, number, self.options)
        return world, DocumentStore(world.documents)


class ResearchEnvironment(ToolEpisode):
    """One episode of research."""

    tools: Sequence[ToolSpec] = TOOLS
    secrets: Collection[str] = ("answer", "facts")

    def __init__(
        self,
        tasks: ResearchTasks,
        config: EnvironmentConfig,
        rewards: RewardConfig,
        cache: ToolCache | None = None,
    ) -> None:
        super().__init__(config, rewards, cache)
        self._tasks = tasks
        self._opened: set[str] = set()

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Open the task's world."""
        _, self._store = self._tasks.world(task.split, task.data["world"])
        return await super().reset(task, attempt)

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Search or open."""
        argument = next(iter(arguments.values()))
        if name == "search":
            return Result(text="\n".join(self._store.search(argument)) or "no results")
        body = self._store.open(argument)
        if body is None:
            return failed("no such document")
        return Result(text=body)

    def saw(self, name: str, arguments: Mapping[str, Any], result: Result) -> None:
        """Note which documents were read."""
        if name == "open" and result.status is ToolStatus.OK:
            self._opened.add(arguments["document"])

    def world(self, name: str) -> Any:
        """Return what names the world, which several tasks share."""
        return [
            self._task.split,
            self._task.data["world"],
            self._tasks.options.model_dump(include={*OF_WORLDS}),
        ]

    def right(self) -> bool:
        """Tell whether the answer is the city asked for."""
        expected: str = self._task.data["answer"]
        return (self._answer or "").strip().casefold() == expected.casefold()

    def more_scores(self) -> Sequence[Score]:
        """Shaping by the facts read."""
        found = len(self._opened.intersection(self._task.data["facts"])) / self._task.data["hops"]
        return (Score(name="facts", kind=ScoreKind.SHAPING, weight=self._rewards.shaping, value=found),)

    def memory(self) -> dict[str, Any]:
        """Return the documents read."""
        return {"opened": sorted(self._opened)}

    def remember(self, memory: dict[str, Any]) -> None:
        """Take up the documents read."""
        self._opened = set(memory["opened"])


def corpus(options: ResearchOptions, *, worlds: int = 64) -> Iterator[str]:
    """Yield text as episodes hold it: questions, calls, listings, documents, errors."""
    yield "Tools: search(query), open(document), answer(text)"
    yield from FAULTS
    yield from ("error: no such document", *COMPLAINTS, "no results")
    for number in range(worlds):
        world = build_world(Split.TRAIN, number, options)
        for person, name in enumerate(world.people):
            for hops in range(1, options.hops + 1):
                yield f"Where does {'the manager of ' * (hops - 1)}{name} live?"
            yield format_call("answer", {"text": world.homes[person]})
        yield format_call("answer", {"text": "unknown"})
        for document in world.documents:
            yield document.body
            yield format_call("open", {"document": document.identifier})
            yield format_call("search", {"query": document.title})
        identifiers = [document.identifier for document in world.documents]
        yield from ("\n".join(identifiers[i : i + 3]) for i in range(0, len(identifiers), 3))
