"""A stand-in for SkyRL-gym: its documented interface, and episodes that misbehave in each way one can."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any

__version__ = "0.0.1"
TOGETHER = 8
_meeting = threading.Barrier(TOGETHER)


class Sums:
    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        assert extras is not None and "expert" not in extras
        self.answer = extras["reward_spec"]["ground_truth"]
        self.closed = False

    def init(self, prompt: list[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, Any]]:
        return [{"role": "system", "content": "Add."}, *prompt], {}

    def step(self, action: str) -> dict[str, Any]:
        reward: Any = 0.0
        said = "Wrong."
        match action:
            case "raise":
                raise ValueError("cannot read\nthat")
            case "hang":
                threading.Event().wait()
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
                # It may be another thread that the signal stops first.
                threading.Event().wait()
            case "exit":
                os._exit(3)
            case "huge":
                said = "x" * (2 << 20)
            case "nan":
                reward = float("nan")
            case "print":
                print("so to say")
            case "meet":
                _meeting.wait(30)
                said = "met"
            case "spawn":
                said = str(subprocess.Popen(["sleep", "600"]).pid)
        if action == self.answer:
            return {"observations": [], "reward": 1.0, "done": True, "metadata": {}}
        observations = [{"role": "user", "content": said}]
        return {"observations": observations, "reward": reward, "done": False, "metadata": {}}

    def get_metrics(self) -> dict[str, Any]:
        return {"closed": self.closed, "name": "sums"}

    def close(self) -> None:
        self.closed = True


registry = {"sums": Sums}


def make(name: str, **options: Any) -> Sums:
    return registry[name](**options)
