"""An environment for the real OpenEnv; as a program it is a server of it at the port that it is given."""

from __future__ import annotations

import random
import sys
from typing import Any

from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Guess(Action):
    """Guess the number."""

    number: int


class Told(Observation):
    hint: str


class GuessEnvironment(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, top: int = 4) -> None:
        super().__init__()
        self.top, self.turns = top, 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Told:
        self.number = random.Random(seed).randrange(self.top)
        return Told(hint=f"a number below {self.top}")

    def step(self, action: Guess, timeout_s: float | None = None, **_: Any) -> Told:
        self.turns += 1
        if action.number == self.number:
            return Told(hint="right", done=True, reward=1.0)
        return Told(hint="higher" if action.number < self.number else "lower", reward=0.0)

    @property
    def state(self) -> State:
        return State(step_count=self.turns)


if __name__ == "__main__":
    import uvicorn
    from openenv.core.env_server.http_server import create_app

    app = create_app(GuessEnvironment, Guess, Told, max_concurrent_envs=64)
    uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
