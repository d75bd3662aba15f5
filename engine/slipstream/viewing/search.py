"""Floor 5. Looking for text in episodes, a slice of time at once: nothing but the hits is kept.

An episode's text is all its tokens as text, what its tools were called with, and its note. Newest first, so
that a page is full long before a long run has been read.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from slipstream.errors import FrameError, RunFolderError
from slipstream.types import Trajectory
from slipstream.viewing.episode import repr_json
from slipstream.viewing.index import RunIndex
from slipstream.viewing.tokens import TokenTexts
from slipstream.wire import decode_trajectory

SLICE_S: Final = 0.25
_KEPT: Final = 8
"""Searches that go on where they stopped when they are asked again."""


class Search:
    """One text among the episodes that fit otherwise."""

    def __init__(self, text: str, record: Callable[[int], bytes], texts: TokenTexts) -> None:
        self._text, self._record, self._texts = text.casefold(), record, texts
        self._hits: list[int] = []
        self._next = self._end = 0
        """Rows below `_next` are still to be looked at; those from `_end` on came later."""
        self._wanted = 0

    def advance(self, fits: NDArray[np.bool_], index: RunIndex, *, groups: int) -> NDArray[np.bool_]:
        """Look on until so many groups are found or the slice is over; return [n]: what was found so far."""
        if not self._end:
            self._next = self._end = len(fits)
        self._wanted = int(fits[: self._end].sum())
        deadline = time.monotonic() + SLICE_S
        found = {self._group(index, hit) for hit in self._hits}
        candidates = np.flatnonzero(fits[: self._next])[::-1].tolist()
        for number in candidates:
            if len(found) > groups or time.monotonic() > deadline:
                break
            self._next = number
            if self._holds(number):
                self._hits.append(number)
                found.add(self._group(index, number))
        else:
            self._next = 0
        mask = np.zeros(len(fits), bool)
        mask[self._hits] = True
        self._left = int(fits[: self._next].sum())
        return mask

    def state(self) -> dict[str, Any]:
        """Return how far it is."""
        return {"looked": self._wanted - self._left, "of": self._wanted, "over": self._next == 0}

    def _holds(self, number: int) -> bool:
        try:
            trajectory = decode_trajectory(self._record(number))
        except (RunFolderError, FrameError):
            return False
        return self._text in text_of(trajectory, self._texts).casefold()

    @staticmethod
    def _group(index: RunIndex, number: int) -> tuple[int, int]:
        row = index.rows[number]
        return int(row["evaluation"]), int(row["group"])


class Searches:
    """The latest searches, so that their next pages do not begin anew."""

    def __init__(self, record: Callable[[int], bytes], texts: TokenTexts) -> None:
        self._record, self._texts = record, texts
        self._kept: OrderedDict[tuple[tuple[str, str], ...], Search] = OrderedDict()

    def of(self, given: Mapping[str, str], text: str) -> Search:
        """Return the search for these filters, begun before or now."""
        key = tuple(sorted((name, value) for name, value in given.items() if name not in ("sort", "up")))
        search = self._kept.pop(key, None) or Search(text, self._record, self._texts)
        self._kept[key] = search
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return search


def text_of(trajectory: Trajectory, texts: TokenTexts) -> str:
    """Return all that is said in an episode."""
    calls = [f"{call.name} {repr_json(call.arguments)}" for call in trajectory.tool_calls]
    return "\n".join([texts.text(trajectory.token_ids), *calls, trajectory.note])
