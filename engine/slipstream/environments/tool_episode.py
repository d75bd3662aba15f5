"""Floor 4. What environments of tools share: booked turns, seeded failures, latency, the usual score.

    reward of a turn = - step_penalty [- invalid_penalty]
    scores           = outcome +1 or -1, step x turns, invalid x invalid messages, and what else there is

An environment adds its tools, `call` and `right`; what it says, apart from its seeded failures, depends on
the task and the calls alone. Results of tools that are declared pure come out of the tool cache, if there is
one: their `call` changes nothing, what an episode remembers of a result it notes in `saw`.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from asyncio import sleep
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.interfaces import AssistantMessage, Observation, ToolSpec, Transition
from slipstream.tools.cache import ToolCache
from slipstream.tools.hermes import format_call
from slipstream.tools.wording import COMPLAINTS as COMPLAINTS
from slipstream.tools.wording import ERROR, error
from slipstream.tools.wording import FAULTS as FAULTS
from slipstream.types import Score, ScoreKind, Split, Task, TaskAttempt, ToolCall, ToolStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a tool says."""

    # Kept in the tool cache as these three: another field means another `version` of every pure tool.

    text: str
    status: ToolStatus = ToolStatus.OK
    done: bool = False
    """Whether the episode ends with it."""


def failed(reason: str) -> Result:
    """Return a tool's standard error."""
    return Result(text=error(reason), status=ToolStatus.ERROR)


def tool(name: str, description: str, *arguments: str, version: str = "") -> ToolSpec:
    """Return a tool that takes strings; one with a version is pure."""
    schema = {
        "type": "object",
        "properties": {argument: {"type": "string"} for argument in arguments},
        "required": list(arguments),
    }
    return ToolSpec(
        name=name, description=description, parameters=schema, pure=bool(version), version=version
    )


ANSWER: Final = tool("answer", "Give the final answer", "text")
NO_ANSWER: Final = format_call("answer", {"text": "unknown"})
"""What scripts say that have given up."""


class Faults:
    """Seeded failures of an attempt's tools, so that a replay fails alike."""

    def __init__(self, split: Split, attempt: TaskAttempt, rate: float) -> None:
        """Draw from a sequence keyed by the attempt."""
        self._rate = rate
        self._draw = random.Random(
            f"faults {split} {attempt.task} {attempt.seed} {attempt.group} {attempt.attempt}"
        )

    def strike(self) -> str | None:
        """Return the error in place of the next call, or None."""
        return self._draw.choice(FAULTS) if self._draw.random() < self._rate else None

    def state(self) -> Any:
        """Return where the sequence stands, as plain data."""
        return self._draw.getstate()

    def restore(self, state: Any) -> None:
        """Go on where `state` was taken, also after a wire has made lists of its tuples."""
        version, words, gauss = state
        self._draw.setstate((version, tuple(words), gauss))


class ToolEpisode(ABC):
    """One episode over tools; a `Resumable` environment.

    What else an episode remembers stands in attributes that `memory` gives and `remember` takes.
    """

    tools: Sequence[ToolSpec]
    secrets: Collection[str] = ("answer",)

    def __init__(
        self, config: EnvironmentConfig, rewards: RewardConfig, cache: ToolCache | None = None
    ) -> None:
        self._config, self._rewards = config, rewards
        self._cache = cache or ToolCache(config.name)
        self._turn = self._invalid = 0
        self._answer: str | None = None

    @abstractmethod
    async def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Carry out a call of a tool other than `answer`."""

    def saw(self, name: str, arguments: Mapping[str, Any], result: Result) -> None:
        """Note what a tool said, wherever the result came from."""
        return

    def world(self, name: str) -> Any:
        """Return what results of the pure tool `name` depend on beside its arguments, as plain data.

        Here it is the task; tasks of one world give what names that.
        """
        return [self._task.split, self._task.index, self._config.options]

    @abstractmethod
    def right(self) -> bool | str:
        """Tell whether the task is solved, or why that cannot be judged."""

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Start an episode."""
        self._task = task
        self._faults = Faults(task.split, attempt, self._config.tool_failure_rate)
        return Observation(system="", user=task.question)

    async def step(self, message: AssistantMessage) -> Transition:
        """Carry one call out; all but an answer may fail with a standard error."""
        turn, self._turn = self._turn, self._turn + 1
        if message.error or message.arguments is None:
            self._invalid += 1
            lost = self._rewards.step_penalty + self._rewards.invalid_penalty
            return Transition(observation=f"{ERROR}{message.error}", done=False, reward=-lost)
        started = time.monotonic()
        result, cached = await self._result(message.name, message.arguments)
        call = ToolCall(
            turn=turn,
            name=message.name,
            arguments=message.arguments,
            status=result.status,
            latency_s=time.monotonic() - started,
            cached=cached,
        )
        return Transition(
            observation=result.text, done=result.done, call=call, reward=-self._rewards.step_penalty
        )

    async def score(self) -> Sequence[Score]:
        """Outcome +1 or -1, a penalty per turn and per invalid message, then `more_scores`."""
        right, weights = self.right(), self._rewards
        value, invalid = (None, right) if isinstance(right, str) else (1.0 if right else -1.0, "")
        return (
            Score(name="outcome", kind=ScoreKind.OUTCOME, weight=1.0, value=value, invalid=invalid),
            Score(name="step", kind=ScoreKind.PENALTY, weight=-weights.step_penalty, value=float(self._turn)),
            Score(
                name="invalid",
                kind=ScoreKind.PENALTY,
                weight=-weights.invalid_penalty,
                value=float(self._invalid),
            ),
            *self.more_scores(),
        )

    def more_scores(self) -> Sequence[Score]:
        """Return scores beside the usual ones."""
        return ()

    def memory(self) -> dict[str, Any]:
        """Return what else the episode remembers, as plain data."""
        return {}

    def remember(self, memory: dict[str, Any]) -> None:
        """Take up what `memory` gave."""
        assert not self.memory(), "override this together with memory"

    def state(self) -> dict[str, Any]:
        """Return turns, answer, where the faults stand, and `memory`."""
        return {
            "turn": self._turn,
            "invalid": self._invalid,
            "answer": self._answer,
            "faults": self._faults.state(),
            **self.memory(),
        }

    async def restore(self, task: Task, attempt: TaskAttempt, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        await self.reset(task, attempt)
        self._turn, self._invalid, self._answer = state["turn"], state["invalid"], state["answer"]
        self._faults.restore(state["faults"])
        self.remember(state)

    async def _result(self, name: str, arguments: Mapping[str, Any]) -> tuple[Result, bool]:
        """Return what a call gives, and whether it came out of the cache; an answer takes no time."""
        if name == ANSWER.name:
            self._answer = next(iter(arguments.values()))
            return Result(text="", done=True), False
        fault = self._faults.strike()
        if fault is not None:
            await self._take_time()
            return Result(text=fault, status=ToolStatus.ERROR), False
        spec = next((tool for tool in self.tools if tool.name == name), None)
        if spec is None or not spec.pure:
            result = await self._called(name, arguments)
            self.saw(name, arguments, result)
            return result, False

        async def compute() -> list[Any]:
            result = await self._called(name, arguments)
            return [result.text, result.status.value, result.done]

        said, cached = await self._cache.call(name, spec.version, arguments, self.world(name), compute)
        result = Result(text=said[0], status=ToolStatus(said[1]), done=said[2])
        self.saw(name, arguments, result)
        return result, cached

    async def _called(self, name: str, arguments: Mapping[str, Any]) -> Result:
        await self._take_time()
        return await self.call(name, arguments)

    async def _take_time(self) -> None:
        if self._config.tool_latency_s:
            await sleep(self._config.tool_latency_s)
