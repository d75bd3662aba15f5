"""Floor 4. A searchable collection of documents: a real SQLite FTS5 database, read-only once built."""

from __future__ import annotations

import re
import sqlite3
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from slipstream.errors import InfrastructureError

MAX_QUERY_WORDS = 32
"""More words match nothing: no title is that long, and the query planner is spared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document.

    Example: ``Document(identifier="17", title="Ada Kline home", body="Ada Kline lives in Oslo.")``.
    """

    identifier: str
    title: str
    body: str


class DocumentStore:
    """Full-text search over documents, in memory; one store serves many episodes."""

    def __init__(self, documents: Iterable[Document]) -> None:
        """Build the index; identifiers must be unique."""
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        weakref.finalize(self, self._connection.close)
        self._connection.execute(
            "CREATE TABLE pages (identifier TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID"
        )
        self._connection.execute("CREATE VIRTUAL TABLE titles USING fts5(identifier UNINDEXED, title)")
        kept = list(documents)
        self._connection.executemany(
            "INSERT INTO pages VALUES (?, ?)", [(d.identifier, d.body) for d in kept]
        )
        self._connection.executemany(
            "INSERT INTO titles VALUES (?, ?)", [(d.identifier, d.title) for d in kept]
        )
        self._connection.commit()
        self._connection.execute("PRAGMA query_only = 1")

    def search(self, query: str, *, limit: int = 8) -> list[str]:
        """Return identifiers of documents whose title holds every word of `query`, best first.

        Words are quoted: the query is data and never FTS5 syntax. Raises InfrastructureError.
        """
        words = re.findall(r"\w+", query)
        if not 0 < len(words) <= MAX_QUERY_WORDS:
            return []
        match = " AND ".join(f'"{word}"' for word in words)
        found = "SELECT identifier FROM titles WHERE titles MATCH ? ORDER BY rank, rowid LIMIT ?"
        with _failing_as_infrastructure():
            return [str(row[0]) for row in self._connection.execute(found, (match, limit))]

    def open(self, identifier: str) -> str | None:
        """Return a document's text, or None when there is none of that name; raises InfrastructureError."""
        named = "SELECT body FROM pages WHERE identifier = ?"
        with _failing_as_infrastructure():
            row = self._connection.execute(named, (identifier,)).fetchone()
        return None if row is None else str(row[0])


@contextmanager
def _failing_as_infrastructure() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise InfrastructureError(f"document store: {error}") from error
