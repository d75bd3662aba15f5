"""Floor 5. Which episodes are wanted, and in which order their groups are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from slipstream.errors import ConfigurationError
from slipstream.viewing.index import FATES, OUTCOMES, SPLITS, STATUSES, RunIndex

Numbers = NDArray[Any]
ORDERS: Final = ("newest", "reward", "spread", "turns", "tokens", "slip", "seconds")
"""Groups by arrival, or by the mean of a column; `spread` is the largest reward minus the least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What an episode must be; an empty or missing condition admits all.

    Example: ``Filters.of({"outcome": "completed", "low": "0.5"})``.
    """

    kind: str = ""
    """train or evaluation."""
    outcome: str = ""
    """One of Outcome, or `success`, or `failure`."""
    fate: str = ""
    tool: str = ""
    status: str = ""
    """An episode with a call that ended so."""
    low: float = -math.inf
    high: float = math.inf
    """Bounds of the reward."""
    step: int = -1
    """The optimizer step that trained it, counted as in metrics.jsonl."""
    serial: int = -1
    """Weights that sampled a token of it, or that were evaluated."""
    text: str = ""
    sort: str = "newest"
    up: bool = False
    """Ascending."""

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Filters:
        """Read settings as an address or the command line gives them; raises ConfigurationError."""
        known = {field.name: field.type for field in fields(cls)}
        odd = sorted(given.keys() - known.keys())
        if odd:
            raise ConfigurationError(f'unknown filter "{odd[0][:40]}"; there are {", ".join(known)}')
        values = {name: _read(name, str(known[name]), text) for name, text in given.items() if text != ""}
        chosen = cls(**values)
        choices = (
            ("kind", ("train", "evaluation")), ("outcome", (*OUTCOMES, "success", "failure")),
            ("fate", FATES), ("status", STATUSES), ("sort", ORDERS),
        )  # fmt: skip
        for name, allowed in choices:
            value = getattr(chosen, name)
            if value and value not in allowed:
                raise ConfigurationError(
                    f'filter {name}: expected one of {", ".join(allowed)}, got "{value[:40]}"'
                )
        return chosen

    def mask(self, index: RunIndex) -> NDArray[np.bool_]:
        """Return [n]: which episodes fit, but for their text."""
        rows = index.rows
        fits = np.ones(len(rows), bool)
        if self.kind:
            fits &= (rows["evaluation"] >= 0) == (self.kind == "evaluation")
        if self.outcome in ("success", "failure"):
            fits &= rows["success"] == (self.outcome == "success")
        elif self.outcome:
            fits &= rows["outcome"] == [str(one) for one in OUTCOMES].index(self.outcome)
        if self.fate:
            fits &= rows["fate"] == FATES.index(self.fate)
        if self.tool:
            bit = index.tools.index(self.tool) if self.tool in index.tools else -1
            fits &= (rows["tools"] >> np.uint64(bit) & np.uint64(1)).astype(bool) if bit >= 0 else False
        if self.status:
            fits &= (rows["statuses"] >> [str(one) for one in STATUSES].index(self.status) & 1).astype(bool)
        if self.low > -math.inf or self.high < math.inf:
            fits &= (rows["reward"] >= np.float32(self.low)) & (rows["reward"] <= np.float32(self.high))
        if self.step >= 0:
            fits &= rows["step"] == self.step
        if self.serial >= 0:
            sampled = (rows["serial_low"] <= self.serial) & (rows["serial_high"] >= self.serial)
            fits &= (rows["evaluation"] == self.serial) | (sampled & (rows["evaluation"] < 0))
        return fits

    def ordered(self, index: RunIndex, fits: NDArray[np.bool_]) -> list[int]:
        """Return the places of the groups that hold a fitting episode, in the order asked for."""
        numbers = np.flatnonzero(fits)
        if not len(numbers):
            return []
        counts = np.bincount(index.rows["place"][numbers], minlength=len(index.members))
        value = self._value(index.rows, numbers, counts)
        present = np.flatnonzero(counts)
        order = np.argsort(value[present] if self.up else -value[present], kind="stable")
        return [int(place) for place in present[order]]

    def _value(self, rows: Numbers, numbers: Numbers, counts: Numbers) -> Numbers:
        """Return [groups]: what they are sorted by."""
        place_n, groups = rows["place"][numbers], len(counts)
        if self.sort == "newest":
            newest = np.zeros(groups)
            newest[place_n] = numbers  # the last assignment stays, and numbers ascend
            return newest
        if self.sort == "spread":
            most, least = np.full(groups, -np.inf), np.full(groups, np.inf)
            np.maximum.at(most, place_n, rows["reward"][numbers])
            np.minimum.at(least, place_n, rows["reward"][numbers])
            spread: Numbers = most - least
            return spread
        column = rows["finished"] - rows["started"] if self.sort == "seconds" else rows[self.sort]
        sums = np.bincount(place_n, weights=column[numbers].astype(np.float64), minlength=groups)
        means: Numbers = sums / np.maximum(counts, 1)
        return means


def describe(index: RunIndex, number: int) -> dict[str, Any]:
    """Return what lists and lanes show of an episode, as plain data."""
    row = index.rows[number]
    return {
        "id": f"{row['segment']}.{row['offset']}",
        "group": int(row["group"]),
        "evaluation": int(row["evaluation"]),
        "task": int(row["task"]),
        "split": str(SPLITS[row["split"]]),
        "attempt": int(row["attempt"]),
        "outcome": str(OUTCOMES[row["outcome"]]),
        "success": bool(row["success"]),
        "fate": FATES[row["fate"]],
        "reward": round(float(row["reward"]), 5),
        "serials": [int(row["serial_low"]), int(row["serial_high"])],
        "tools": index.tools_of(int(row["tools"])),
        "statuses": [str(s) for bit, s in enumerate(STATUSES) if int(row["statuses"]) >> bit & 1],
        "actor": index.actors[row["actor"]] if row["actor"] < len(index.actors) else "",
        "order": number,
        **{name: int(row[name]) for name in ("turns", "tokens", "length", "calls", "cached", "step", "slip")},
        **{name: round(float(row[name]), 3) for name in ("started", "finished", "generate", "tool_time")},
    }


def _read(name: str, kind: str, text: str) -> Any:
    readers: dict[str, Callable[[str], Any]] = {"float": float, "int": int, "bool": _truth, "str": str}
    try:
        value = readers[kind](text)
        if isinstance(value, float) and math.isnan(value):
            raise ValueError("not a number")
        if isinstance(value, int) and abs(value) > 1 << 31:
            raise ValueError("too large")
    except ValueError:
        raise ConfigurationError(f'filter {name}: expected {kind}, got "{text[:40]}"') from None
    return value


def _truth(text: str) -> bool:
    if text not in ("0", "1", "true", "false"):
        raise ValueError(text)
    return text in ("1", "true")
