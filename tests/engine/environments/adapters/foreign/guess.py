"""An environment with the interface of OpenEnv; its action changes when a file appears."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

CHANGED = Path(os.environ.get("CHANGED", "/nonexistent")).exists()


class Guess(BaseModel):
    """Guess the number."""

    metadata: dict[str, Any] = Field(default_factory=dict)
    number: int = Field(le=5 if CHANGED else 9)


class Told(BaseModel):
    done: bool = False
    reward: float | None = None
    hint: str


class GuessEnvironment:
    def __init__(self, top: int = 10) -> None:
        self.top = top

    def reset(self, seed: int | None = None, episode_id: str | None = None) -> Told:
        self.number = random.Random(seed).randrange(self.top)
        return Told(hint=f"a number below {self.top}")

    def step(self, action: Guess) -> Told:
        if action.number == self.number:
            return Told(hint="right", done=True, reward=1.0)
        return Told(hint="higher" if action.number < self.number else "lower")


class Broken:
    def reset(self) -> Told:
        raise OSError("no display")


raise_on_import = os.environ.get("RAISE")
if raise_on_import:
    raise RuntimeError(raise_on_import)
