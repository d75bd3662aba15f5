"""Floor 4. Which datasets of reasoning-gym may be trained on: what fuzzing all their scorers has found.

`scorers.json` holds the findings, with version and date; `bench/audits/reasoning_gym_scorers.py` writes it.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any, Final

MOST_PAID: Final = 0.3
"""A constant answer may earn less than this, as a mean score and as a share of entries solved."""

MOST_DRAW_S: Final = 1.0
"""An entry must be drawn in less CPU time than this."""


@cache
def findings() -> dict[str, Any]:
    """Return what was found: `version`, `date`, and a row for each of `datasets`."""
    found: dict[str, Any] = json.loads(
        files(__package__).joinpath("scorers.json").read_text(encoding="utf-8")
    )
    return found


def why_unfit(name: str) -> str:
    """Return why a dataset should not be trained on, in words that follow its name, or ""."""
    found = findings()
    row = found["datasets"].get(name)
    if row is None:
        return f"was not audited (reasoning-gym {found['version']} was, on {found['date']})"
    earned = max(row["pays"], row["solves"])
    if earned >= MOST_PAID:
        return f"pays {earned:g} for the constant answer {row['constant']!r}"
    if row["own"] < 1.0:
        return f"gives its own answer a score of {row['own']:g}"
    if not row["repeats"]:
        return "does not draw the same entry twice"
    if row.get("draw_s", 0.0) >= MOST_DRAW_S:
        return f"takes {row['draw_s']:g} s to draw an entry, for which an actor's other episodes would wait"
    if row["runs"]:
        return "has a scorer that runs the answer as code"
    if row["raises"]:
        return f"has a scorer that raises {', '.join(row['raises'])} at answers it cannot read"
    return ""


def fit() -> list[str]:
    """Return the datasets that may be trained on."""
    return [name for name in findings()["datasets"] if not why_unfit(name)]
