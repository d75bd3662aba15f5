"""Floor 4. The multi-turn tasks of BFCL, read from the package that brings them.

Four categories pose the same 200 scenarios:

    base           all there is
    miss_func      a tool is withheld until a later message of the user
    miss_param     a value is withheld until a later message of the user
    long_context   files and listings are padded

A scenario belongs to one split whatever the category: numbers that end in 8 are held out, those in 9 are
fresh, all others train. Within a split the scenarios are in the order of a checksum, so that the domains mix.

Source: Patil et al. 2025, "The Berkeley Function Calling Leaderboard", ICML; package bfcl-eval.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec
from pydantic import Field

from slipstream.config import Part
from slipstream.environments.bfcl.apis import Call, json_schema, methods, read_call
from slipstream.errors import ConfigurationError
from slipstream.interfaces import ToolSpec
from slipstream.types import Split, Task

Category = Literal["base", "miss_func", "miss_param", "long_context"]
Domain = Literal[
    "GorillaFileSystem",
    "MathAPI",
    "MessageAPI",
    "TicketAPI",
    "TradingBot",
    "TravelAPI",
    "TwitterAPI",
    "VehicleControlAPI",
]
_FILES: Final = "BFCL_v4_multi_turn_{}.json"
_PREAMBLE: Final = "Tool description: "
"""What stands before it repeats in each tool what its API is."""
_TAKEN_TOO: Final = {("close_ticket", "ticket_id"): "string"}
"""(tool, parameter) -> a type that a solution of the package gives it against the schema beside it."""
SECRET: Final = "calls"


class BfclOptions(Part):
    """Which tasks are posed, and how many tools are shown."""

    categories: tuple[Category, ...] = Field(
        default=("base", "miss_func", "miss_param", "long_context"), min_length=1
    )
    domains: tuple[Domain, ...] = ()
    """Poses only tasks whose APIs are all among these; empty: any."""
    most_turns: int = Field(default=8, ge=1)
    """Poses only tasks with at most so many messages of the user; the longest has 8."""
    tools_per_task: int = Field(default=0, ge=0)
    """Shows the tools that the task needs, and others up to this number; 0: all."""
    calls_per_turn: int = Field(default=40, ge=1)
    """Calls and mistakes between two messages of the user; one more fails the episode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One task as the package tells it, its solution apart."""

    identifier: str
    number: int
    category: Category
    turns: tuple[str, ...]
    """What the user says; empty where the withheld tools are given instead."""
    apis: tuple[str, ...]
    withheld: Mapping[int, tuple[str, ...]]
    """Turn -> tools given then."""
    scenario: bytes
    """JSON of what the APIs start with."""

    @property
    def long_context(self) -> bool:
        """Whether files and listings are padded."""
        return self.category == "long_context"

    def setting(self) -> dict[str, Any]:
        """Return fresh data to start the APIs with."""
        decoded: dict[str, Any] = msgspec.json.decode(self.scenario)
        return decoded


class Catalogue:
    """All that the installed package holds: tasks and tools, and solutions when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Read tasks and tools: a sandbox may hide the files from its workers, and finds them read."""
        self._folder = folder
        self.entries: Mapping[Category, tuple[Entry, ...]] = {
            category: tuple(_entry(line, category) for line in self._lines(_FILES.format(category)))
            for category in get_args(Category)
        }
        self.by_identifier: Mapping[str, Entry] = {
            entry.identifier: entry for entries in self.entries.values() for entry in entries
        }
        self._tools = {api: self._read_tools(api) for api in get_args(Domain)}
        self.solutions = lru_cache(maxsize=4)(self._solutions)

    def _solutions(self, category: Category) -> Mapping[str, tuple[tuple[Call, ...], ...]]:
        """Return the gold calls of each task and turn."""
        found = {}
        for line in self._lines(f"possible_answer/{_FILES.format(category)}"):
            parameters: dict[str, tuple[str, ...]] = {}
            for api in self.by_identifier[line["id"]].apis:
                parameters |= methods(api)
            found[line["id"]] = tuple(
                tuple(read_call(text, parameters.__getitem__) for text in turn)
                for turn in line["ground_truth"]
            )
        return found

    def tools(self, api: str) -> Mapping[str, ToolSpec]:
        """Return an API's tools by name, in the order of the package."""
        return self._tools[api]

    def _read_tools(self, api: str) -> Mapping[str, ToolSpec]:
        from bfcl_eval.constants.executable_backend_config import MULTI_TURN_FUNC_DOC_FILE_MAPPING

        listed = self._lines(f"multi_turn_func_doc/{MULTI_TURN_FUNC_DOC_FILE_MAPPING[api]}")
        return {
            tool["name"]: ToolSpec(
                name=tool["name"],
                description=tool["description"].rpartition(_PREAMBLE)[2].strip(),
                parameters=_widened(tool["name"], json_schema(tool["parameters"])),
            )
            for tool in listed
        }

    def tools_of(self, entry: Entry) -> dict[str, ToolSpec]:
        """Return all tools of a task by name, the withheld ones included."""
        return {name: tool for api in entry.apis for name, tool in self.tools(api).items()}

    def _lines(self, name: str) -> list[dict[str, Any]]:
        with (self._folder / name).open(encoding="utf-8") as file:
            return [msgspec.json.decode(line) for line in file if line.strip()]


@lru_cache(maxsize=1)
def catalogue() -> Catalogue:
    """Return what is installed, which is read once in a process, its APIs and its checker imported."""
    import bfcl_eval
    import bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker

    for api in get_args(Domain):
        methods(api)
    (home,) = bfcl_eval.__path__
    return Catalogue(Path(home) / "data")


def _widened(tool: str, schema: dict[str, Any]) -> dict[str, Any]:
    for name, parameter in schema["properties"].items():
        if (tool, name) in _TAKEN_TOO:
            parameter["type"] = [parameter["type"], _TAKEN_TOO[tool, name]]
    return schema


def _entry(line: Mapping[str, Any], category: Category) -> Entry:
    said = ["\n".join(message["content"] for message in turn) for turn in line["question"]]
    return Entry(
        identifier=line["id"],
        number=int(line["id"].rpartition("_")[2]),
        category=category,
        turns=tuple(said),
        apis=tuple(line["involved_classes"]),
        withheld={int(turn): tuple(names) for turn, names in line.get("missed_function", {}).items()},
        scenario=msgspec.json.encode(line["initial_config"]),
    )


def split_of(number: int) -> Split:
    """Return the split to which a scenario belongs in every category."""
    return {8: Split.HELDOUT, 9: Split.FRESH}.get(number % 10, Split.TRAIN)


class BfclTasks:
    """Tasks of the chosen categories; behind the last one the first comes again."""

    def __init__(self, catalogue: Catalogue, options: BfclOptions) -> None:
        """Raises ConfigurationError when the options leave a split without a task."""
        self.catalogue, self.options = catalogue, options
        self._listed = {split: self._chosen(split) for split in Split}
        empty = [str(split) for split, entries in self._listed.items() if not entries]
        if empty:
            raise ConfigurationError(
                f"environment.options: no task of split {empty[0]} has all its APIs among domains and at "
                f"most most_turns = {options.most_turns} messages of the user; allow more domains or turns"
            )
        self.task = lru_cache(maxsize=4096)(self._task)

    def size(self, split: Split) -> int:
        """Return how many different tasks a split has."""
        return len(self._listed[split])

    def entry(self, task: Task) -> Entry:
        """Return what is behind a task."""
        return self.catalogue.by_identifier[task.data["id"]]

    def _task(self, split: Split, index: int) -> Task:
        """Return the task at `index`."""
        entry = self._listed[split][index % self.size(split)]
        calls = self.catalogue.solutions(entry.category)[entry.identifier]
        shown = self._shown(entry, calls)
        given = _given(entry, calls)
        later = {name for names in given.values() for name in names}
        data = {
            "id": entry.identifier,
            "tools": tuple(name for name in shown if name not in later),
            "given": {str(turn): names for turn, names in given.items()},
            SECRET: calls,
        }
        return Task(split=split, index=index, question=entry.turns[0], data=data)

    def _chosen(self, split: Split) -> tuple[Entry, ...]:
        allowed = set(self.options.domains)
        chosen = [
            entry
            for category in self.options.categories
            for entry in self.catalogue.entries[category]
            if split_of(entry.number) is split
            and len(entry.turns) <= self.options.most_turns
            and (not allowed or allowed.issuperset(entry.apis))
        ]
        return tuple(sorted(chosen, key=lambda entry: (_checksum(entry.identifier), entry.identifier)))

    def _shown(self, entry: Entry, calls: Sequence[Sequence[Call]]) -> tuple[str, ...]:
        """Return the names of the tools that the policy gets to know in the course of a task."""
        every = list(self.catalogue.tools_of(entry))
        if not self.options.tools_per_task:
            return tuple(every)
        needed = {name for turn in calls for name, _ in turn}
        needed.update(name for names in entry.withheld.values() for name in names)
        others = sorted(
            (name for name in every if name not in needed),
            key=lambda name: _checksum(f"{entry.identifier} {name}"),
        )
        kept = needed.union(others[: max(0, self.options.tools_per_task - len(needed))])
        return tuple(name for name in every if name in kept)


def _given(entry: Entry, calls: Sequence[Sequence[Call]]) -> dict[int, tuple[str, ...]]:
    """Return which tools are given in which turn: those withheld, unless the solution needs one before.

    In one task of the package it does.
    """
    return {
        turn: tuple(
            name for name in names if all(name != called for done in calls[:turn] for called, _ in done)
        )
        for turn, names in entry.withheld.items()
    }


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())
