"""Floor 4. The learner's rows of metrics: kept until metrics.jsonl has them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import numpy as np

from slipstream.metrics import Row, read_rows, rows_of

KEPT_ROWS: Final = 8
"""Rows kept in memory and in a checkpoint."""
Values = dict[str, float | list[float]]


class LearnerRows:
    """Rows on their way to the hub, which alone writes metrics.jsonl and may die before it has.

    Example: ``rows = LearnerRows(folder, client.report); rows.begin(); rows.report(step, {"loss": 0.5})``.
    """

    def __init__(self, folder: Path, report: Callable[[str, Values], None]) -> None:
        """Write nothing; `report` takes a kind of row and its values."""
        self._folder, self._say = folder, report
        self._rows: deque[Values] = deque(maxlen=KEPT_ROWS)
        self._written: list[Row] = []
        """What metrics.jsonl held when it was last read."""
        self._starved_s = 0.0
        self._began = time.monotonic()

    def begin(self) -> None:
        """Let the first step's seconds begin now, and say again what a hub before this one did not write."""
        self._began = time.monotonic()
        self.say_again()

    def starved(self, seconds: float) -> None:
        """Count time in which there was no batch."""
        self._starved_s += seconds

    def report(self, step: int, values: Values) -> None:
        """Report a step, with its rates."""
        now = time.monotonic()
        seconds, self._began = now - self._began, now
        starved, self._starved_s = self._starved_s, 0.0
        rates = {
            "seconds/step": seconds,
            "wait/learner_starved": min(starved / seconds, 1.0),
            "tokens/trained_per_s": float(values["tokens/trained"]) / seconds,  # type: ignore[arg-type]
        }
        self._rows.append({"step": float(step), "time": time.time(), **values, **rates})
        self._say("train", self._rows[-1])

    def say_again(self) -> None:
        """Report the rows once more that a hub which died has taken with it."""
        self.look()
        for row in self._missing():
            self._say("train", row)

    def look(self) -> None:
        """Read what has been written by now."""
        self._written = read_rows(self._folder)

    def are_written(self) -> bool:
        """Return whether nothing was missing at the last look."""
        return not self._missing()

    def is_evaluated(self, step: int) -> bool:
        """Return whether a step's evaluation was there at the last look."""
        return any(row["step"] == step for row in rows_of(self._written, "evaluation"))

    def state(self) -> list[Values]:
        """Return the newest rows for a checkpoint, which holds finite numbers only."""
        return [
            {key: value for key, value in row.items() if bool(np.isfinite(value).all())} for row in self._rows
        ]

    def restore(self, rows: Iterable[Values]) -> None:
        """Take the rows of a checkpoint back."""
        self._rows.extend(rows)

    def _missing(self) -> list[Values]:
        """Return the rows that were not there; steps repeat after a rollback, times do not."""
        times = {row["time"] for row in rows_of(self._written, "train")}
        return [row for row in self._rows if row["time"] not in times]
