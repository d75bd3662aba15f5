"""Floor 4. A rubric: one criterion, the verdicts there are, and what each is worth.

name = "polite"
criterion = "The agent never insults anybody."

[choices]
fails = 0
partly = 0.5
meets = 1
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from slipstream.errors import ConfigurationError

KEYS: Final = ("name", "criterion", "choices")
_NAME: Final = re.compile(r"[A-Za-z][\w-]*")
_CHOICE: Final = re.compile(r"\S(?:[^\n]{0,62}\S)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubric:
    """What an episode is judged by; raises ConfigurationError for what nobody could judge by.

    Example: ``Rubric(name="polite", criterion="No insults.", choices={"fails": 0, "meets": 1})``.
    """

    name: str
    criterion: str
    choices: Mapping[str, float]
    """Verdict -> value, in the order in which the judge is shown them."""

    def __post_init__(self) -> None:
        """Look at all of it."""
        _check(self.name, self.criterion, self.choices)

    def choice(self, said: str) -> str | None:
        """Return the verdict that somebody named, in whatever letters, or None."""
        wanted = said.strip().casefold()
        return next((choice for choice in self.choices if choice.casefold() == wanted), None)

    def passes(self, choice: str) -> bool:
        """Return whether a verdict speaks for success: above the middle of the least and the highest."""
        values = self.choices.values()
        return self.choices[choice] > (min(values) + max(values)) / 2.0


def read_rubric(path: str | Path) -> Rubric:
    """Return the rubric of a TOML file; raises ConfigurationError that names the file."""
    try:
        given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"rubric {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"rubric {path}: expected TOML: {error}") from None
    wrong = [f"no {key}" for key in KEYS if key not in given]
    wrong += [f"an unknown key {key}" for key in given if key not in KEYS]
    if wrong:
        raise ConfigurationError(f"rubric {path}: expected the keys {', '.join(KEYS)}, got {wrong[0]}")
    try:
        return Rubric(**given)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def _check(name: Any, criterion: Any, choices: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"rubric: name must be letters, digits, _ and -, the first a letter, got {name!r}"
        )
    if not isinstance(criterion, str) or not criterion.strip():
        raise ConfigurationError(f"rubric {name}: criterion must be text, got {criterion!r}")
    if not isinstance(choices, Mapping) or len(choices) < 2:
        raise ConfigurationError(f"rubric {name}: choices must be two verdicts or more, got {choices!r}")
    for choice, value in choices.items():
        if not isinstance(choice, str) or not _CHOICE.fullmatch(choice):
            raise ConfigurationError(
                f"rubric {name}: a verdict must be a line of at most 64 characters, got {choice!r}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigurationError(
                f"rubric {name}: choices.{choice} must be a finite number, got {value!r}"
            )
    if len({choice.casefold() for choice in choices}) < len(choices):
        raise ConfigurationError(f"rubric {name}: two verdicts differ in the case of letters alone")
    if len(set(choices.values())) < 2:
        raise ConfigurationError(f"rubric {name}: all verdicts are worth the same; give two values or more")
