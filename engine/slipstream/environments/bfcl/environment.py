"""Floor 4. One episode of BFCL multi-turn: a user who asks for several things, one after another.

A message of plain text ends the policy's turn: the user says the next thing, and after the last one the
episode ends. A withheld tool is given by a message of the user that tells it as the system message told the
others. Every message holds one call, so that what the leaderboard does in one step of several calls takes
several messages here, with the same state and the same results.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments.bfcl.apis import Apis, Call
from slipstream.environments.bfcl.judge import passed_turns
from slipstream.environments.bfcl.tasks import SECRET, BfclTasks
from slipstream.environments.tool_episode import Result, ToolEpisode, failed
from slipstream.interfaces import AssistantMessage, Observation, ToolSpec, Transition
from slipstream.tools.wording import UNKNOWN_TOOL
from slipstream.types import Score, ScoreKind, Task, TaskAttempt, ToolStatus

SYSTEM: Final = (
    "Do what the user asks with the tools, one call after another. When it is done, or when a tool or a "
    "value that it takes is missing, say so in plain text: that ends your turn, and the user goes on."
)
MORE_TOOLS: Final = "{}\nThese tools are new. Can you do it now?"


class BfclEnvironment(ToolEpisode):
    """One episode."""

    secrets: Collection[str] = (SECRET,)
    converses = True

    def __init__(self, tasks: BfclTasks, config: EnvironmentConfig, rewards: RewardConfig) -> None:
        """Load nothing yet."""
        super().__init__(config, rewards)
        self.tools: Sequence[ToolSpec] = ()
        self._tasks = tasks

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Set the APIs up; nothing in them is random."""
        await super().reset(task, attempt)
        self._entry = entry = self._tasks.entry(task)
        self._said: list[list[Call]] = [[]]
        self._since_user, self._overrun = 0, False
        self._apis = Apis(entry.apis, entry.setting(), long_context=entry.long_context)
        self._known = self._tasks.catalogue.tools_of(entry)
        self.tools = [self._known[name] for name in task.data["tools"]]
        return Observation(system=SYSTEM, user=self._request(0))

    async def step(self, message: AssistantMessage) -> Transition:
        """Carry one message out; plain text hands over to the user."""
        if not message.error and message.arguments is None:
            return self._handed_over()
        transition = await super().step(message)
        self._since_user += 1
        if self._since_user > self._tasks.options.calls_per_turn:
            self._overrun = True
            return replace(transition, done=True)
        return transition

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Call an API."""
        return self._used(name, arguments)

    async def score(self) -> Sequence[Score]:
        """Outcome +1 when every turn passes BFCL's checks, else -1; shaping by the share that does."""
        # The last list is of a turn that was not handed over.
        finished = [] if self._overrun else self._said[:-1]
        self._passed = passed_turns(self._entry, finished, self._task.data[SECRET])
        return await super().score()

    def right(self) -> bool:
        """Tell whether every turn passes."""
        return self._passed == len(self._task.data[SECRET])

    def more_scores(self) -> Sequence[Score]:
        """Return the share of turns that pass."""
        share = self._passed / len(self._task.data[SECRET])
        return [Score(name="turns", kind=ScoreKind.SHAPING, weight=self._rewards.shaping, value=share)]

    def memory(self) -> dict[str, Any]:
        """Return the calls of each turn: they lead to the same objects again."""
        return {
            "said": [[[name, dict(arguments)] for name, arguments in turn] for turn in self._said],
            "since_user": self._since_user,
            "overrun": self._overrun,
        }

    def remember(self, memory: dict[str, Any]) -> None:
        """Play the calls again."""
        for number, turn in enumerate(memory["said"]):
            if number:
                self._begin(number)
            for name, arguments in turn:
                self._used(name, arguments)
        self._since_user, self._overrun = memory["since_user"], memory["overrun"]

    def _used(self, name: str, arguments: Mapping[str, Any]) -> Result:
        if all(tool.name != name for tool in self.tools):
            return failed(UNKNOWN_TOOL)
        self._said[-1].append((name, arguments))
        text, well = self._apis.call(name, arguments)
        return Result(text=text, status=ToolStatus.OK if well else ToolStatus.ERROR)

    def _handed_over(self) -> Transition:
        self._turn += 1
        self._since_user = 0
        lost = -self._rewards.step_penalty
        said = self._begin(len(self._said))
        if said is None:
            return Transition(observation="", done=True, reward=lost)
        return Transition(observation=said, done=False, reward=lost, role="user")

    def _begin(self, turn: int) -> str | None:
        """Begin a turn of the policy with what the user says; None: the user has nothing to say any more."""
        self._said.append([])
        return self._request(turn) if turn < len(self._entry.turns) else None

    def _request(self, turn: int) -> str:
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
