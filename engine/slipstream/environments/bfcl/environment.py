"""Floor 4. One episode of BFCL multi-turn: a user who asks for several things, one after another.

A message of plain text ends the policy's turn: the user says the next thing, and after the last one the
episode ends. A withheld tool is given by a message of the user that tells it as the system message told the
others. Every message holds one call, so that what the leaderboard does in one step of several calls takes
several messages here, with the same state and the same results.
"""

from __future__ import annotations

import json
import time
from asyncio import sleep
from collections.abc import Collection, Sequence
from typing import Any, Final

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments.bfcl.apis import Apis, Call
from slipstream.environments.bfcl.judge import passed_turns
from slipstream.environments.bfcl.tasks import SECRET, BfclTasks
from slipstream.interfaces import AssistantMessage, Observation, ToolSpec, Transition
from slipstream.types import Score, ScoreKind, Task, TaskAttempt, ToolCall, ToolStatus

SYSTEM: Final = (
    "Do what the user asks with the tools, one call after another. When it is done, or when a tool or a value "
    "that it takes is missing, say so in plain text: that ends your turn, and the user goes on."
)
MORE_TOOLS: Final = "{}\nThese tools are new. Can you do it now?"


class BfclEnvironment:
    """One episode."""

    secrets: Collection[str] = (SECRET,)
    converses = True

    def __init__(self, tasks: BfclTasks, config: EnvironmentConfig, rewards: RewardConfig) -> None:
        """Load nothing yet."""
        self.tools: Sequence[ToolSpec] = ()
        self._tasks, self._config, self._rewards = tasks, config, rewards

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Set the APIs up; nothing in them is random."""
        self._task, self._entry = task, self._tasks.entry(task)
        self._turns: list[list[Call]] = [[]]
        self._messages = self._invalid = self._since_user = 0
        self._overrun = False
        entry = self._entry
        self._apis = Apis(entry.apis, entry.setting(), long_context=entry.long_context)
        self._known = self._tasks.catalogue.tools_of(entry)
        self.tools = [self._known[name] for name in task.data["tools"]]
        return Observation(system=SYSTEM, user=self._said(0))

    async def step(self, message: AssistantMessage) -> Transition:
        """Carry one message out; plain text hands over to the user."""
        number, self._messages = self._messages, self._messages + 1
        if message.error:
            self._invalid += 1
            lost = self._rewards.step_penalty + self._rewards.invalid_penalty
            return Transition(observation=f"error: {message.error}", done=self._counted(), reward=-lost)
        if message.arguments is None:
            return self._handed_over()
        started = time.monotonic()
        if self._config.tool_latency_s:
            await sleep(self._config.tool_latency_s)
        said, well = self._call(message.name, message.arguments)
        call = ToolCall(
            turn=number,
            name=message.name,
            arguments=message.arguments,
            status=ToolStatus.OK if well else ToolStatus.ERROR,
            latency_s=time.monotonic() - started,
        )
        return Transition(
            observation=said, done=self._counted(), call=call, reward=-self._rewards.step_penalty
        )

    async def score(self) -> Sequence[Score]:
        """Outcome +1 when every turn passes BFCL's checks, else -1; shaping by the share that does."""
        gold = self._task.data[SECRET]
        # The last list is of a turn that was not handed over, when the episode ended before its end.
        finished = [] if self._overrun else self._turns[:-1]
        passed = passed_turns(self._entry, finished, gold)
        weights = self._rewards
        penalties = (
            ("step", weights.step_penalty, self._messages),
            ("invalid", weights.invalid_penalty, self._invalid),
        )
        return (
            Score(
                name="outcome",
                kind=ScoreKind.OUTCOME,
                weight=1.0,
                value=1.0 if passed == len(gold) else -1.0,
            ),
            *(
                Score(name=name, kind=ScoreKind.PENALTY, weight=-weight, value=float(count))
                for name, weight, count in penalties
            ),
            Score(name="turns", kind=ScoreKind.SHAPING, weight=weights.shaping, value=passed / len(gold)),
        )

    def state(self) -> dict[str, Any]:
        """Return the calls of each turn: they lead to the same objects again."""
        return {
            "turns": [[[name, dict(arguments)] for name, arguments in turn] for turn in self._turns],
            "messages": self._messages,
            "invalid": self._invalid,
            "since_user": self._since_user,
            "overrun": self._overrun,
        }

    async def restore(self, task: Task, attempt: TaskAttempt, state: dict[str, Any]) -> None:
        """Play the calls again."""
        await self.reset(task, attempt)
        for number, turn in enumerate(state["turns"]):
            if number:
                self._turns.append([])
                self._said(number)
            for name, arguments in turn:
                self._call(name, arguments)
        self._messages, self._invalid = state["messages"], state["invalid"]
        self._since_user, self._overrun = state["since_user"], state["overrun"]

    def _call(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        if all(tool.name != name for tool in self.tools):
            return "error: unknown tool", False
        self._turns[-1].append((name, arguments))
        return self._apis.call(name, arguments)

    def _counted(self) -> bool:
        """Count what the policy did since the user spoke; return whether that is enough."""
        self._since_user += 1
        self._overrun = self._since_user > self._tasks.options.calls_per_turn
        return self._overrun

    def _handed_over(self) -> Transition:
        turn = len(self._turns)
        self._turns.append([])
        self._since_user = 0
        lost = -self._rewards.step_penalty
        if turn == len(self._entry.turns):
            return Transition(observation="", done=True, reward=lost)
        return Transition(observation=self._said(turn), done=False, reward=lost, role="user")

    def _said(self, turn: int) -> str:
        """Return what the user says in a turn, and give the tools that are withheld until then."""
        given = [self._known[name] for name in self._task.data["given"].get(str(turn), ())]
        if not given:
            return self._entry.turns[turn]
        self.tools = [*self.tools, *given]
        return MORE_TOOLS.format("\n".join(map(self._told, given)))

    def _told(self, tool: ToolSpec) -> str:
        """Return a tool as the system message tells the others (chat.py)."""
        if not self._config.tool_schemas:
            return f"{tool.name}({', '.join(tool.parameters.get('properties', {}))})"
        described = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        return json.dumps(described, ensure_ascii=False)
