"""Floor 4. SQL over a real database whose schema must be looked up: tables, describe, query, answer.

Each shop is a SQLite database of its own (`worlds`), drawn rather than taken from published data: of a
database that is always the same, schema and answers are soon known by heart, and nobody would look.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal

from pydantic import Field

from slipstream.config import EnvironmentConfig, Part, RewardConfig
from slipstream.environments.factory import EnvironmentFactory
from slipstream.environments.options import read_options
from slipstream.environments.scripted import usual_players
from slipstream.environments.sql.players import QUERIES, analyse
from slipstream.environments.sql.questions import KINDS, TRIES, Question, ask, equals
from slipstream.environments.sql.worlds import Shop, build_shop
from slipstream.environments.tool_episode import (
    ANSWER,
    COMPLAINTS,
    FAULTS,
    NO_ANSWER,
    Result,
    ToolEpisode,
    failed,
    tool,
)
from slipstream.errors import ToolError
from slipstream.interfaces import Observation, ToolSpec
from slipstream.tools.database import Database
from slipstream.tools.hermes import format_call
from slipstream.types import Split, Task, TaskAttempt

TASKS_PER_SHOP: Final = 8
TOOLS: Final = (
    tool("tables", "List the tables of the database"),
    tool("describe", "List the columns of a table", "table"),
    tool("query", "Run one SELECT statement of SQLite", "sql"),
    ANSWER,
)
QuestionKind = Literal["residence", "price", "average", "spent", "sold", "favourite", "top"]


class SqlOptions(Part):
    """What is asked, and of how large a shop."""

    questions: tuple[QuestionKind, ...] = Field(
        default=("residence", "price", "average", "spent", "sold", "favourite", "top"), min_length=1
    )
    """Kinds of questions: two that look a value up, one that aggregates, four that join, two of them rank."""
    customers: int = Field(default=36, ge=24, le=200)
    products: int = Field(default=20, ge=12, le=100)
    orders: int = Field(default=200, ge=150, le=2000)
    rows: int = Field(default=20, ge=1, le=200)
    """Most rows that a query returns."""


def factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return what makes the environment; raises ConfigurationError for its options."""
    options = read_options(SqlOptions, config)
    tasks = SqlTasks(options)
    return EnvironmentFactory(
        tasks=tasks,
        make=lambda: SqlEnvironment(tasks, config, rewards),
        corpus=lambda: corpus(tasks),
        **usual_players(analyse, does="reads the schema", hastily="takes the first column that looks right"),
        versions={"sqlite": sqlite3.sqlite_version},
    )


class SqlTasks:
    """Tasks over shops: "How many units of the Oak Lamp have gone to people who live in Oslo?"."""

    def __init__(self, options: SqlOptions) -> None:
        self.options = options
        self.shop = lru_cache(maxsize=256)(self._shop)
        self.database = lru_cache(maxsize=256)(self._database)
        self.questions = lru_cache(maxsize=256)(self._questions)
        # A group poses one task many times.
        self.task = lru_cache(maxsize=4096)(self._task)

    def _task(self, split: Split, index: int) -> Task:
        """Return the task at `index`; shops never cross splits."""
        number, place = divmod(index, TASKS_PER_SHOP)
        kind, text, about, answer = self.questions(split, number)[place]
        data = {"answer": answer, "shop": number, "kind": kind, "about": about}
        return Task(split=split, index=index, question=text, data=data)

    def _questions(self, split: Split, number: int) -> list[Question]:
        """Return what is asked of a shop; no question twice, as far as chance goes."""
        asked: list[Question] = []
        for place in range(TASKS_PER_SHOP):
            draw = random.Random(f"question {split} {number * TASKS_PER_SHOP + place}")
            for _ in range(TRIES):
                question = ask(self.shop(split, number), self.options.questions, draw)
                if question not in asked:
                    break
            asked.append(question)
        return asked

    def _shop(self, split: Split, number: int) -> Shop:
        sizes = self.options
        return build_shop(
            split, number, customers=sizes.customers, products=sizes.products, orders=sizes.orders
        )

    def _database(self, split: Split, number: int) -> Database:
        return Database(self.shop(split, number).tables, max_rows=self.options.rows)


class SqlEnvironment(ToolEpisode):
    """One question over one shop."""

    tools: Sequence[ToolSpec] = TOOLS
    secrets: Collection[str] = ("answer",)

    def __init__(self, tasks: SqlTasks, config: EnvironmentConfig, rewards: RewardConfig) -> None:
        super().__init__(config, rewards)
        self._tasks = tasks

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Open the task's database."""
        self._database = self._tasks.database(task.split, task.data["shop"])
        return await super().reset(task, attempt)

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """List, describe or query; what SQLite refuses is an error in its own words."""
        try:
            match name:
                case "tables":
                    return Result(text="\n".join(self._database.tables))
                case "describe":
                    return Result(text=self._database.describe(arguments["table"]))
                case _:
                    return Result(text=self._database.query(arguments["sql"]))
        except ToolError as error:
            return failed(str(error))

    def right(self) -> bool:
        """Tell whether the answer has the value asked for."""
        return self._answer is not None and equals(self._answer, self._task.data["answer"])


def corpus(tasks: SqlTasks, *, shops: int = 64) -> Iterator[str]:
    """Yield text as episodes hold it: questions, calls, schemas, values, errors."""
    yield "Tools: tables(), describe(table), query(sql), answer(text)"
    yield from FAULTS
    yield from (*COMPLAINTS, "error: no such table: ", "error: no such column: ", "no rows", NO_ANSWER)
    yield format_call("tables", {})
    for number in range(shops):
        shop = tasks.shop(Split.TRAIN, number)
        database = tasks.database(Split.TRAIN, number)
        yield "\n".join(database.tables)
        for table in database.tables:
            yield format_call("describe", {"table": table})
            yield database.describe(table)
        draw = random.Random(f"corpus {number}")
        for kind in tasks.options.questions:
            for _ in range(TASKS_PER_SHOP):
                about, answer = KINDS[kind].ask(shop, draw)
                yield KINDS[kind].text.format(**about)
                yield format_call("answer", {"text": str(answer)})
                yield format_call("query", {"sql": QUERIES[kind].format_map(_Names(about, shop))})


class _Names(dict[str, str]):
    """Names for a query of the corpus: what it is about, and columns under whatever they mean."""

    def __init__(self, about: Mapping[str, str], shop: Shop) -> None:
        super().__init__({f"about_{key}": value for key, value in about.items()})
        self._columns = [column.name for table in shop.tables for column in table.columns]

    def __missing__(self, key: str) -> str:
        return next((column for column in self._columns if column.endswith(key)), key)
