"""Floor 4. A SQLite database to be asked by those one does not trust: read-only, and the same each time.

    what may be done     SELECT, reading tables, functions that give the same each time (authorizer)
    how long it may take so many steps of SQLite's virtual machine: no clock, so that a replay ends alike
    how much may come    rows, characters of the answer, bytes of a value

One database in memory serves many episodes: no query changes it.
"""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from slipstream.errors import ToolError

STEPS: Final = 300_000
"""Instructions of the virtual machine for one query; some 10 ms."""
STEPS_BETWEEN_LOOKS: Final = 1000
LIMITS: Final = {
    sqlite3.SQLITE_LIMIT_LENGTH: 4096,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 4096,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 64,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 16,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 256,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
"""With STEPS they bound what one query can hold in memory, to some 100 MB."""
ACTIONS: Final = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
PRAGMAS: Final = ("foreign_key_list", "table_info", "table_list")
"""Those that only tell."""
CLOCKS: Final = "date time datetime julianday unixepoch strftime timediff current_date current_time"
REFUSED: Final = frozenset({*CLOCKS.split(), "current_timestamp", "random", "randomblob", "load_extension"})
"""Functions that differ between two calls, or reach beyond the database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table."""

    name: str
    type: str
    """TEXT, INTEGER or REAL."""
    refers_to: str = ""
    """The table whose `id` its values are."""

    @property
    def declared(self) -> str:
        """As it stands in CREATE TABLE."""
        key = " PRIMARY KEY" if self.name == "id" else ""
        return f'"{self.name}" {self.type}{key}' + (
            f' REFERENCES "{self.refers_to}" (id)' if self.refers_to else ""
        )

    @property
    def described(self) -> str:
        """As a policy is told of it."""
        return f"{self.name} {self.type}" + (f" -> {self.refers_to}.id" if self.refers_to else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with all its rows."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]


class Database:
    """Tables in memory, behind an authorizer.

    Example: ``Database([clients]).query("SELECT city FROM clients WHERE name = 'Ada Kline'")`` is ``Oslo``.
    """

    def __init__(self, tables: Iterable[Table], *, max_rows: int = 20, max_chars: int = 1000) -> None:
        """Create and fill the tables; from then on nothing changes them."""
        self._max_rows, self._max_chars = max_rows, max_chars
        self._described: dict[str, str] = {}
        self._connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        weakref.finalize(self, self._connection.close)
        self._connection.execute("PRAGMA temp_store = MEMORY")
        self._connection.execute("BEGIN")
        for table in tables:
            self._described[table.name] = "\n".join(column.described for column in table.columns)
            declared = ", ".join(column.declared for column in table.columns)
            self._connection.execute(f'CREATE TABLE "{table.name}" ({declared})')
            marks = ", ".join("?" * len(table.columns))
            self._connection.executemany(f'INSERT INTO "{table.name}" VALUES ({marks})', table.rows)
        self._connection.execute("COMMIT")
        for pragma in PRAGMAS:
            # Asked for the first time, its table is made, which the authorizer would forbid.
            self._connection.execute(f"SELECT 1 FROM pragma_{pragma}")
        self._connection.execute("PRAGMA query_only = 1")
        for limit, most in LIMITS.items():
            self._connection.setlimit(limit, most)
        self._looks = 0
        self._connection.set_progress_handler(self._spent, STEPS_BETWEEN_LOOKS)
        self._connection.set_authorizer(_may)

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables."""
        return tuple(self._described)

    def describe(self, table: str) -> str:
        """Return a line for each column; raises ToolError when there is no such table."""
        if table not in self._described:
            raise ToolError(f"no such table: {table}")
        return self._described[table]

    def query(self, sql: str) -> str:
        """Return a line for each row, values between ` | `; raises ToolError in SQLite's own words."""
        self._looks = 0
        try:
            cursor = self._connection.execute(sql)
            rows = cursor.fetchmany(self._max_rows + 1)
            cursor.close()
        except (sqlite3.Error, sqlite3.Warning) as error:
            # SQLite's word for a query that ran out of steps says nothing of why.
            raise ToolError("query takes too long" if str(error) == "interrupted" else str(error)) from None
        lines = [" | ".join(map(_shown, row)) for row in rows[: self._max_rows]]
        text = "\n".join(lines) or "no rows"
        if len(text) > self._max_chars:
            return text[: self._max_chars] + f"\n[cut at {self._max_chars} characters]"
        return text if len(rows) <= self._max_rows else f"{text}\n[cut at {self._max_rows} rows]"

    def _spent(self) -> int:
        self._looks += 1
        return self._looks * STEPS_BETWEEN_LOOKS >= STEPS


def _may(
    action: int, first: str | None, second: str | None, database: str | None, trigger: str | None
) -> int:
    """Tell SQLite whether a statement may do this; `first` and `second` mean what the action says."""
    match action:
        case sqlite3.SQLITE_FUNCTION:
            allowed = second is not None and second.lower() not in REFUSED
        case sqlite3.SQLITE_PRAGMA:
            allowed = first in PRAGMAS
        case _:
            allowed = action in ACTIONS
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _shown(value: Any) -> str:
    match value:
        case None:
            return "NULL"
        case float():
            return f"{value:.10g}"
        case bytes():
            return f"x'{value.hex()}'"
        case _:
            return str(value)
