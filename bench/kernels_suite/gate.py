"""The regression gate: ratios to eager PyTorch of this class of machine, never absolute times.

{"tolerance": 0.15, "machines": {"CPU model, cores": {"op mode shape type variant": ratio}}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Row = dict[str, Any]
TOLERANCE: Final = 0.15
"""Share of the baseline's ratio that may be lost before it counts as a regression."""


class BaselineError(ValueError):
    """The baselines cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression:
    """One ratio worse than its baseline."""

    key: str
    expected: float
    least: float
    got: float | None
    """None when the row was not measured."""

    def __str__(self) -> str:
        """Return one sentence with row, expected and got."""
        got = "it was not measured" if self.got is None else f"got {self.got:.3f}"
        wanted = f"expected {self.expected:.3f} times eager, at least {self.least:.3f}"
        return f"{self.key}: {wanted}; {got}"


def read(path: Path) -> dict[str, Any]:
    """Return the baselines. Raises BaselineError."""
    if not path.exists():
        return {"tolerance": TOLERANCE, "machines": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BaselineError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or not {"tolerance", "machines"} <= found.keys():
        raise BaselineError(f"{path} must hold tolerance and machines")
    return found


def regressions(rows: Sequence[Row], machine: str, path: Path) -> list[Regression]:
    """Return the rows of ours whose ratio is worse than the baseline allows. Raises BaselineError.

    A baseline counts when its op, mode, shape and type were part of this run, also when its row is missing.
    """
    baselines = read(path)
    if machine not in baselines["machines"]:
        raise BaselineError(f'{path} has no baseline for "{machine}"; --update writes one')
    measured = {row["key"]: row.get("ratio_to_eager") for row in rows}
    cases = {_case(row["key"], row["variant"]) for row in rows}
    tolerance = baselines["tolerance"]
    found = []
    for key, expected in baselines["machines"][machine].items():
        in_run = key in measured or any(key.startswith(f"{case} ") for case in cases)
        got, least = measured.get(key), expected * (1 - tolerance)
        if in_run and (got is None or got < least):
            found.append(Regression(key=key, expected=expected, least=least, got=got))
    return found


def update(rows: Sequence[Row], machine: str, path: Path) -> int:
    """Write the ratios of our rows over those of this class of machine; return how many."""
    baselines = read(path)
    ratios = {row["key"]: round(row["ratio_to_eager"], 3) for row in rows
              if row["ours"] and row.get("ratio_to_eager") is not None}  # fmt: skip
    known = baselines["machines"].get(machine, {})
    baselines["machines"][machine] = dict(sorted((known | ratios).items()))
    text = json.dumps(baselines, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return len(ratios)


def _case(key: str, variant: str) -> str:
    return key.removesuffix(f" {variant}")
