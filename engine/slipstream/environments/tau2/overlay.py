"""Floor 4. A database that many episodes share until they touch it: rows are copied when they are read.

The database of a τ² domain holds tables, each a dict of rows by identifier. To read one by its identifier is
to be able to change it, so that copies it into the episode's own layer. Going through a table shows the rows
as they are, without a copy; no tool of the package changes one that way.
"""

from __future__ import annotations

import hashlib
import json
from collections import ChainMap
from collections.abc import Callable, ItemsView, Mapping, ValuesView
from typing import Any, TypeVar

Row = TypeVar("Row")


class Overlay(ChainMap[str, Row]):
    """One table as one episode sees it.

    Example: ``rows = Overlay({"a": [1]}, copy.copy); rows["a"].append(2)`` leaves the shared row alone.
    """

    def __init__(self, shared: Mapping[str, Row], copied: Callable[[Row], Row]) -> None:
        """Copy nothing yet; `copied` makes an independent copy of a row."""
        self.own: dict[str, Row] = {}
        super().__init__(self.own, shared)  # type: ignore[arg-type]
        self._copied = copied

    def __getitem__(self, key: str) -> Row:
        """Return the episode's own row."""
        if key not in self.own:
            self.own[key] = self._copied(self.maps[1][key])
        return self.own[key]

    def items(self) -> ItemsView[str, Row]:
        """Return keys and rows, to be read only."""
        return ItemsView(ChainMap(*self.maps))

    def values(self) -> ValuesView[Row]:
        """Return rows, to be read only."""
        return ValuesView(ChainMap(*self.maps))


class SharedTables:
    """The tables that every episode begins with."""

    def __init__(
        self,
        tables: Mapping[str, Mapping[str, Any]],
        copied: Callable[[Any], Any],
        plain: Callable[[Any], Any],
    ) -> None:
        """`copied` makes an independent copy of a row, `plain` gives it as plain data."""
        self._tables, self._copied, self._plain = tables, copied, plain
        self._written = {
            name: {key: self._row(row) for key, row in sorted(rows.items())} for name, rows in tables.items()
        }

    def overlays(self) -> dict[str, Overlay[Any]]:
        """Return fresh tables of one episode."""
        return {name: Overlay(rows, self._copied) for name, rows in self._tables.items()}

    def digest(self, overlays: Mapping[str, Overlay[Any]]) -> str:
        """Return the SHA-256, in hexadecimal, of all tables as JSON with sorted keys.

        It is that of ``json.dumps(everything, sort_keys=True, default=str)``; only rows that the episode has
        read are written anew.
        """
        tables = []
        for name, overlay in sorted(overlays.items()):
            written = self._written[name] | {key: self._row(row) for key, row in overlay.own.items()}
            new = written.keys() - self._written[name].keys()
            rows = (f"{json.dumps(key)}: {written[key]}" for key in (sorted(written) if new else written))
            tables.append(f"{json.dumps(name)}: {{{', '.join(rows)}}}")
        return hashlib.sha256(f"{{{', '.join(tables)}}}".encode()).hexdigest()

    def _row(self, row: Any) -> str:
        return json.dumps(self._plain(row), sort_keys=True, default=str)
