"""Floor 4. Small computations with a Python tool: run, answer. What the code raises is shown as it is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Final, Literal

from pydantic import Field

from slipstream.config import EnvironmentConfig, Part, RewardConfig
from slipstream.environments.factory import EnvironmentFactory, Play
from slipstream.environments.options import read_options
from slipstream.environments.python.puzzles import pose
from slipstream.environments.scripted import GaveUp, Habits, insist, usual_players
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
from slipstream.tools.hermes import format_call
from slipstream.tools.interpreter import Interpreter
from slipstream.types import Split, Task

TOOLS: Final = (
    tool("run", "Run Python; returns what is printed and the value of the last line", "code"),
    ANSWER,
)
ERRORS: Final = ("ZeroDivisionError: division by zero", "NameError: name 'x' is not defined")
Question = Literal[
    "arithmetic", "digits", "primes", "divisible", "remainder", "recurrence", "weighted", "letters", "base"
]


class PythonOptions(Part):
    """What is asked, and how long a snippet may take."""

    questions: tuple[Question, ...] = Field(
        default=("digits", "primes", "divisible", "remainder", "recurrence", "weighted", "letters", "base"),
        min_length=1,
    )
    """Kinds of computations; "arithmetic", an expression of three numbers, is the easy one."""
    seconds: float = Field(default=2.0, gt=0.0, le=60.0)
    """Of one snippet; one that takes longer ends with a TimeoutError."""


def factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return what makes the environment; raises ConfigurationError."""
    options = read_options(PythonOptions, config)
    tasks = PythonTasks(options)
    interpreter = Interpreter(seconds=options.seconds, wait_s=config.timeout_s)

    return EnvironmentFactory(
        tasks=tasks,
        make=lambda: PythonEnvironment(interpreter, config, rewards),
        corpus=lambda: corpus(tasks),
        **usual_players(compute, does="computes", hastily="computes something near"),
        versions={"pydantic-monty": version("pydantic-monty")},
        close=interpreter.close,
    )


class PythonTasks:
    """Tasks to compute: "What is the sum of the digits of 37 to the power of 411?"."""

    def __init__(self, options: PythonOptions) -> None:
        self.options = options
        self.task = lru_cache(maxsize=4096)(self._task)

    def _task(self, split: Split, index: int) -> Task:
        text, puzzle = pose(split, index, self.options.questions)
        data = {"answer": puzzle.answer, "code": puzzle.code, "careless": puzzle.careless}
        return Task(split=split, index=index, question=text, data=data)


class PythonEnvironment(ToolEpisode):
    """One computation. Each snippet runs in a session of its own: nothing carries over to the next."""

    tools: Sequence[ToolSpec] = TOOLS
    secrets: Collection[str] = ("answer", "code", "careless")

    def __init__(self, interpreter: Interpreter, config: EnvironmentConfig, rewards: RewardConfig) -> None:
        super().__init__(config, rewards)
        self._interpreter = interpreter

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Run a snippet."""
        try:
            return Result(text=await self._interpreter.run(arguments["code"]))
        except ToolError as error:
            return failed(str(error))

    def right(self) -> bool:
        """Tell whether the answer is the number or the word asked for."""
        return self._answer is not None and equals(self._answer, self._task.data["answer"])


def equals(given: str, expected: int | str) -> bool:
    """Tell whether a text is this number, however it is grouped, or this word."""
    plain = given.strip().removesuffix(".").strip("'\"")
    if isinstance(expected, str):
        return plain.casefold() == expected.casefold()
    whole = re.fullmatch(r"[-+]?[0-9][0-9,]{0,99}", plain)
    return whole is not None and int(plain.replace(",", "")) == expected


def compute(task: Task, habits: Habits) -> Play:
    """Play one episode: run a snippet, answer what it returns."""
    code = task.data["code"] if habits.reads_on() else task.data["careless"]
    try:
        if not habits.acts:
            raise GaveUp
        found = yield from insist(format_call("run", {"code": code}), habits)
    except GaveUp:
        yield NO_ANSWER
        return
    yield format_call("answer", {"text": found})


def corpus(tasks: PythonTasks, *, count: int = 2048) -> Iterator[str]:
    """Yield text as episodes hold it: questions, snippets, results, errors."""
    yield "Tools: run(code), answer(text)"
    yield from (*FAULTS, *COMPLAINTS, *(f"error: {error}" for error in ERRORS), "no output", NO_ANSWER)
    for index in range(count):
        task = tasks.task(Split.TRAIN, index)
        yield task.question
        yield format_call("run", {"code": task.data["code"]})
        yield str(task.data["answer"])
        yield format_call("answer", {"text": str(task.data["answer"])})
