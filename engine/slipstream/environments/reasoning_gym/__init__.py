"""Floor 4. Datasets of reasoning-gym, one for each variant: a calculator, and an answer.

The outcome is +1 where the dataset's own scorer gives 1.0; what it gives below that counts as shaping.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Final

from slipstream.config import EnvironmentConfig, Part, RewardConfig
from slipstream.environments import variant_of
from slipstream.environments.factory import ORACLE, EnvironmentFactory, Play, Script
from slipstream.environments.options import read_options
from slipstream.environments.reasoning_gym.entries import Entries
from slipstream.environments.reasoning_gym.verdicts import why_unfit
from slipstream.environments.tool_episode import (
    ANSWER,
    COMPLAINTS,
    FAULTS,
    NO_ANSWER,
    Result,
    ToolEpisode,
    failed,
    tool,
)
from slipstream.errors import ToolError
from slipstream.interfaces import ToolSpec
from slipstream.tools.calculator import calculate
from slipstream.tools.hermes import format_call
from slipstream.types import Score, ScoreKind, Split, Task

TOOLS: Final = (tool("calculate", "Work out an arithmetic expression", "expression"), ANSWER)


class ReasoningGymOptions(Part):
    """Whether the audit of scorers is heeded."""

    trust_scorer: bool = False
    """Train on the dataset although its scorer was found wanting."""


def factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return what makes the environment of a dataset; raises ConfigurationError."""
    options = read_options(ReasoningGymOptions, config)
    name = variant_of(config)
    entries = Entries(name)
    tasks = ReasoningGymTasks(entries)
    reason = why_unfit(name)
    return EnvironmentFactory(
        tasks=tasks,
        make=lambda: ReasoningGymEnvironment(entries, config, rewards),
        corpus=lambda: corpus(tasks),
        scripts={
            "do_nothing": Script(play=lambda task: _once(NO_ANSWER), about='answers "unknown" at once'),
            ORACLE: Script(
                play=lambda task: _once(format_call("answer", {"text": task.data["answer"]})),
                about="answers what the dataset itself answers",
            ),
        },
        versions={"reasoning-gym": version("reasoning-gym")},
        unfit=""
        if options.trust_scorer or not reason
        else f"environment.name: reasoning-gym:{name} {reason}; choose another dataset, or train on it all "
        "the same with environment.options.trust_scorer=true",
    )


class ReasoningGymTasks:
    """Tasks of one dataset."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        self.task = lru_cache(maxsize=4096)(self._task)

    def _task(self, split: Split, index: int) -> Task:
        number = self._entries.number(split, index)
        entry = self._entries.entry(number)
        data = {"entry": number, "answer": str(entry["answer"])}
        return Task(split=split, index=index, question=str(entry["question"]), data=data)


class ReasoningGymEnvironment(ToolEpisode):
    """One entry of a dataset."""

    tools: Sequence[ToolSpec] = TOOLS
    secrets: Collection[str] = ("answer", "entry")

    def __init__(self, entries: Entries, config: EnvironmentConfig, rewards: RewardConfig) -> None:
        super().__init__(config, rewards)
        self._entries = entries

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Calculate."""
        try:
            return Result(text=calculate(arguments["expression"]))
        except ToolError as error:
            return failed(str(error))

    def right(self) -> bool | str:
        """Tell whether the dataset's scorer gives the answer 1.0, or why it cannot judge."""
        try:
            return self._earned() >= 1.0
        except RuntimeError as error:
            return str(error)

    def more_scores(self) -> Sequence[Score]:
        """Shaping by what the scorer gives an answer that is not right."""
        try:
            earned, invalid = self._earned(), ""
        except RuntimeError as error:
            earned, invalid = None, str(error)
        weight = self._rewards.shaping
        return (
            Score(name="partial", kind=ScoreKind.SHAPING, weight=weight, value=earned, invalid=invalid),
        )  # fmt: skip

    def _earned(self) -> float:
        if self._answer is None:
            return 0.0
        return self._entries.score(self._task.data["entry"], self._answer)


def corpus(tasks: ReasoningGymTasks, *, count: int = 512) -> Iterator[str]:
    """Yield text as episodes hold it: questions, answers, errors."""
    yield "Tools: calculate(expression), answer(text)"
    yield from (*FAULTS, *COMPLAINTS, "error: not an expression", NO_ANSWER)
    for index in range(count):
        task = tasks.task(Split.TRAIN, index)
        yield task.question
        yield format_call("answer", {"text": task.data["answer"]})
        yield format_call("calculate", {"expression": "(12 + 34) * 56 - 7 / 8"})


def _once(text: str) -> Play:
    yield text
