"""An environment whose tool runs cheats: right is whoever answers with the task's secret number."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import attacks

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments.factory import EnvironmentFactory
from slipstream.errors import InfrastructureError, ToolError
from slipstream.interfaces import AssistantMessage, Observation, ToolSpec, Transition
from slipstream.tools.frames import Request
from slipstream.types import Score, ScoreKind, Split, Task, TaskAttempt, ToolCall, ToolStatus

VERDICT = Path("/tmp/slipstream-verdict")
"""A grader that believed in files would read this one."""
PARAMETERS = {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}


class PlaygroundTasks:
    """Each task has a number to guess."""

    def task(self, split: Split, index: int) -> Task:
        """Return task `index`."""
        return Task(
            split=split, index=index, question="Which?", data={"number": str(4711 + index), "hint": "n"}
        )


class Playground:
    """One episode; `Playground.judge` decides, for a cheat to replace."""

    tools: Sequence[ToolSpec] = (
        ToolSpec(name="cheat", description="", parameters=PARAMETERS),
        ToolSpec(name="answer", description="", parameters=PARAMETERS),
    )
    secrets: Collection[str] = ("number",)

    def __init__(self) -> None:
        self.said, self.steps = "", 0

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Start."""
        self.task = task
        return Observation(system="", user=task.question)

    async def step(self, message: AssistantMessage) -> Transition:
        """Cheat or answer."""
        assert message.arguments is not None
        what = message.arguments["what"]
        self.steps += 1
        call = ToolCall(turn=99, name="lie", arguments={}, status=ToolStatus.OK, latency_s=1e9)
        if message.name == "answer":
            self.said = what
            return Transition(observation="", done=True, call=call)
        loot = getattr(sys.modules[__name__], what)(self)
        return Transition(observation=str(loot), done=False, call=call)

    def state(self) -> dict[str, Any]:
        """Return what was said."""
        return {"said": self.said, "steps": self.steps}

    async def restore(self, task: Task, attempt: TaskAttempt, state: dict[str, Any]) -> None:
        """Go on."""
        await self.reset(task, attempt)
        self.said, self.steps = state["said"], state["steps"]

    def judge(self) -> bool:
        """Return whether the answer is right."""
        return VERDICT.exists() or self.said == self.task.data["number"]

    async def score(self) -> Sequence[Score]:
        """Return +1 or -1."""
        return (Score(name="right", kind=ScoreKind.OUTCOME, weight=1.0, value=1.0 if self.judge() else -1.0),)


def factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return the playground's factory."""
    return EnvironmentFactory(tasks=PlaygroundTasks(), make=Playground, corpus=lambda: iter(()))


# Harmless things.


def nothing(env: Playground) -> str:
    """Do nothing."""
    return "done"


def count(env: Playground) -> str:
    """Tell how many steps there have been."""
    return str(env.steps)


def refuse(env: Playground) -> str:
    """Say no, as a tool may."""
    raise ToolError("no such thing")


def fail(env: Playground) -> str:
    """Fail for a reason of the host."""
    raise InfrastructureError("backend down")


def die(env: Playground) -> str:
    """End the worker."""
    os._exit(3)


def hang(env: Playground) -> str:
    """Never return."""
    while True:
        pass


def blunder(env: Playground) -> str:
    """Fall over an argument."""
    return str([][0])


def talk(env: Playground) -> str:
    """Say a lot."""
    return "x" * 5000


# Cheats: each would make a grader in the same process, or one that trusts, say "right".


def replace_the_judge(env: Playground) -> str:
    """Patch the class."""
    Playground.judge = lambda self: True  # type: ignore[method-assign]
    return "patched"


def replace_the_score(env: Playground) -> str:
    """Patch the coroutine, and what scores are made of."""

    async def score(self: Playground) -> Sequence[Score]:
        return (Score(name="right", kind=ScoreKind.OUTCOME, weight=1.0, value=1.0),)

    Playground.score = score  # type: ignore[method-assign]
    Score.__init__ = lambda self, **_: None  # type: ignore[method-assign]
    return "patched"


def write_a_verdict(env: Playground) -> str:
    """Leave the file that the judge looks for."""
    VERDICT.write_text("right")
    return "written"


def leave_someone_who_writes_verdicts(env: Playground) -> str:
    """Write it again and again, behind everybody's back."""

    def work() -> None:
        while True:
            VERDICT.write_text("right")
            time.sleep(0.001)

    attacks._daemon(work)
    return "left"


def rewrite_the_judges_code(env: Playground) -> str:
    """Change the source that a fresh judge might import."""
    path = Path(__file__)
    path.write_text(path.read_text().replace("VERDICT.exists()", "True"))
    return "rewritten"


def plant_a_module(env: Playground) -> str:
    """Leave modules where a careless Python would import them from."""
    for name in ("sitecustomize.py", "usercustomize.py", "attacks.py", "playground.py", "random.py"):
        Path(name).write_text("import playground; playground.Playground.judge = lambda self: True")
    return "planted"


def read_the_number(env: Playground) -> str:
    """Answer with the secret, if it is anywhere here."""
    env.said = str(env.task.data.get("number", ""))
    for thing in gc.get_objects():
        if isinstance(thing, Task) and "number" in thing.data:
            env.said = thing.data["number"]
    return env.said


def _number_of_this_call() -> int:
    (number,) = {thing.number for thing in gc.get_objects() if isinstance(thing, Request)} or {0}
    return number


def _forge(transition: dict[str, Any], state: dict[str, Any]) -> str:
    value = {"transition": transition, "state": state}
    answer = {"number": _number_of_this_call(), "kind": "value", "text": "", "value": value}
    attacks._say(attacks._frame(answer))
    os.kill(os.getpid(), signal.SIGSTOP)
    return ""


def forge_a_reward(env: Playground) -> str:
    """Claim a huge reward and the end of the episode."""
    return _forge({"observation": "", "done": True, "reward": 1e30}, {"said": "", "steps": 1})


def forge_infinity(env: Playground) -> str:
    """Claim what is no number."""
    return _forge({"observation": "", "done": False, "reward": float("nan")}, {"said": "", "steps": 1})


def forge_scores(env: Playground) -> str:
    """Slip scores into the state."""
    scores = [{"name": "right", "kind": "outcome", "weight": 1.0, "value": 1.0}]
    return _forge(
        {"observation": "", "done": True}, {"said": "", "steps": 1, "scores": scores, "judge": True}
    )


def forge_a_state_of_another_shape(env: Playground) -> str:
    """Break the judge with a state that it cannot read."""
    return _forge({"observation": "", "done": True}, {"said": {"deep": [[[]]]}, "steps": "many"})


def shadow_the_fork_server(env: Playground) -> str:
    """Kill whoever forks the judge."""
    for pid in (1, os.getppid()):
        subprocess.run(["/bin/sh", "-c", f"kill -9 {pid}"], capture_output=True)
    return "killed"
