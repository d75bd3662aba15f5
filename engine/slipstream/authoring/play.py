"""Floor 4. One episode of an environment that `environment(...)` made."""

from __future__ import annotations

import time
from asyncio import sleep
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from slipstream.authoring.episode import Call, Episode, plain_copy
from slipstream.authoring.rewards import Judge, judged
from slipstream.authoring.tools import Result, Tool
from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.errors import ConfigurationError
from slipstream.foreign import settled
from slipstream.interfaces import AssistantMessage, Observation, ToolSpec, Transition
from slipstream.types import Score, ScoreKind, Task, TaskAttempt, ToolCall, ToolStatus

Answers = Literal["tool", "text", "none"]
ANSWER: Final = ToolSpec(
    name="answer",
    description="Give the final answer",
    parameters={
        "type": "object",
        "properties": {"text": {"type": "string"}},
        "required": ["text"],
        "additionalProperties": False,
    },
)
FAULTS: Final = ("error: timeout", "error: unavailable", "error: rate limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What the author has said."""

    tools: Mapping[str, Tool]
    judges: Sequence[Judge]
    system: str
    setup: Callable[[Episode], Any] | None
    answers: Answers
    secrets: Collection[str]

    def specs(self) -> tuple[ToolSpec, ...]:
        """Return the tools as the policy sees them; without one of that name, `answer` is among them."""
        specs = tuple(tool.spec for tool in self.tools.values())
        return (*specs, ANSWER) if self.answers == "tool" and ANSWER.name not in self.tools else specs


class AuthoredEnvironment:
    """One episode; its state may be anything, so that no step of it is tried again."""

    def __init__(self, design: Design, config: EnvironmentConfig, rewards: RewardConfig) -> None:
        """Play by `design`, within the limits of `config`."""
        self.tools: Sequence[ToolSpec] = design.specs()
        self.converses = design.answers == "text"
        self._design, self._config, self._rewards = design, config, rewards

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Start an episode: the author's `setup` runs."""
        self._begin(task, attempt)
        if self._design.setup is not None:
            await settled(self._design.setup(self._episode))
        opening = Observation(system=self._design.system, user=task.question)
        said = (("system", opening.system), ("user", opening.user))
        self._episode.messages += [{"role": role, "content": text} for role, text in said if text]
        return opening

    async def step(self, message: AssistantMessage) -> Transition:
        """Carry a message out: a call, an answer in text, or what is neither."""
        episode, weights = self._episode, self._rewards
        turn, episode.turns = episode.turns, episode.turns + 1
        episode.messages.append({"role": "assistant", "content": message.text})
        if message.error:
            episode.invalid += 1
            lost = weights.step_penalty + weights.invalid_penalty
            return self._said(f"error: {message.error}", reward=-lost)
        if message.arguments is None:
            episode.end(message.text.strip())
            return self._said("", reward=-weights.step_penalty)
        started = time.monotonic()
        result = await self._carried_out(message.name, message.arguments)
        episode.calls.append(
            Call(name=message.name, arguments=message.arguments, status=result.status, result=result.text)
        )
        call = ToolCall(
            turn=turn,
            name=message.name,
            arguments=message.arguments,
            status=result.status,
            latency_s=time.monotonic() - started,
            cut=result.cut,
        )
        return replace(self._said(result.text, reward=-weights.step_penalty), call=call)

    async def score(self) -> Sequence[Score]:
        """Return the author's scores, and penalties per turn and per invalid call."""
        weights, episode = self._rewards, replace(self._episode, task=self._task)
        spent = (
            ("step", weights.step_penalty, episode.turns),
            ("invalid", weights.invalid_penalty, episode.invalid),
        )
        return (
            *await judged(self._design.judges, episode),
            *(
                Score(name=name, kind=ScoreKind.PENALTY, weight=-weight, value=float(count))
                for name, weight, count in spent
            ),
        )

    def _begin(self, task: Task, attempt: TaskAttempt) -> None:
        shown = {key: value for key, value in task.data.items() if key not in self._design.secrets}
        self._task = task
        self._episode = Episode(task=replace(task, data=shown), attempt=attempt)

    def _said(self, text: str, *, reward: float) -> Transition:
        if text:
            self._episode.messages.append({"role": "tool", "content": text})
        return Transition(observation=text, done=self._episode.ended, reward=reward)

    async def _carried_out(self, name: str, arguments: Mapping[str, Any]) -> Result:
        episode, tool = self._episode, self._design.tools.get(name)
        if tool is None:
            episode.end(arguments["text"])
            return Result(text="", status=ToolStatus.OK)
        if self._config.tool_latency_s:
            await sleep(self._config.tool_latency_s)
        if tool.may_fail:
            chance = episode.random
            if chance.random() < self._config.tool_failure_rate:
                return Result(text=chance.choice(FAULTS), status=ToolStatus.ERROR)
        undo = self._before(tool)
        result = await tool.run(arguments, episode, most_chars=self._config.limits.observation_chars)
        if tool.episode and result.status is not ToolStatus.OK:
            undo()
        self._after(tool)
        return result

    def _before(self, tool: Tool) -> Callable[[], None]:
        """Return what undoes a call; nothing can where state may be anything."""
        return lambda: None

    def _after(self, tool: Tool) -> None:
        """Look at what a call left."""


class ResumableEnvironment(AuthoredEnvironment):
    """One episode whose state is plain data: it can go on in another object, or another process."""

    def __init__(self, design: Design, config: EnvironmentConfig, rewards: RewardConfig) -> None:
        """Play by `design`, within the limits of `config`."""
        super().__init__(design, config, rewards)
        self.secrets: Collection[str] = design.secrets

    def state(self) -> dict[str, Any]:
        """Return all that has happened; messages and calls are never changed, so only their lists are new."""
        episode = self._episode
        return {
            "messages": list(episode.messages),
            "calls": [
                {
                    "name": call.name,
                    "arguments": call.arguments,
                    "status": call.status.value,
                    "result": call.result,
                }
                for call in episode.calls
            ],
            "state": plain_copy(episode.state, "episode.state"),
            "answer": plain_copy(episode.answer, "episode.answer"),
            "ended": episode.ended,
            "turns": episode.turns,
            "invalid": episode.invalid,
        }

    async def restore(self, task: Task, attempt: TaskAttempt, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; `setup` does not run again."""
        self._begin(task, attempt)
        episode = self._episode
        episode.messages = list(state["messages"])
        episode.calls = [Call(**{**call, "status": ToolStatus(call["status"])}) for call in state["calls"]]
        episode.state = plain_copy(state["state"], "episode.state")
        episode.answer, episode.ended = state["answer"], state["ended"]
        episode.turns, episode.invalid = state["turns"], state["invalid"]

    def _before(self, tool: Tool) -> Callable[[], None]:
        episode = self._episode
        if not tool.episode:
            return lambda: None
        state, answer, ended = plain_copy(episode.state, "episode.state"), episode.answer, episode.ended

        def undo() -> None:
            episode.state, episode.answer, episode.ended = state, answer, ended

        return undo

    def _after(self, tool: Tool) -> None:
        if tool.episode:
            self._episode.state = _own(self._episode.state, f"tool {tool.name}: episode.state")


def _own(state: Any, where: str) -> dict[str, Any]:
    try:
        copied: dict[str, Any] = plain_copy(state, where)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{error}; keep it elsewhere, or say environment(..., resumable=False), which goes without "
            "retries of a step and without a sandbox"
        ) from None
    return copied
