"""Floor 4. Tasks of one's own over the tools of an MCP server: `environment.name = "mcp"`.

    [environment.options]
    command = ["python", "server.py"]
    tasks = "tasks.jsonl"             {"question": "Capital of Norway?", "answer": "Oslo"}   a line

The server's tools become the policy's, beside `answer`. All episodes of an actor share one server: it
takes seconds to start and milliseconds to answer, so its tools may remember nothing of a caller. An answer
is right when it equals the task's "answer", or one of them, in any case. Lines may hold "calls" that lead
there, a list of {"name", "arguments"}: then the scripted expert makes them, and the warm start imitates it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from pydantic import Field

from slipstream.authoring.tasks import RowTasks, jsonl
from slipstream.config import EnvironmentConfig, Part, RewardConfig
from slipstream.config_sentences import hint
from slipstream.environments.adapters.foreign import done_there, there
from slipstream.environments.adapters.protocol import Greeting, McpServer
from slipstream.environments.factory import ORACLE, EnvironmentFactory, Play, Script
from slipstream.environments.options import KEY, read_options
from slipstream.environments.sandboxed import CUT
from slipstream.environments.tool_episode import (
    ANSWER,
    COMPLAINTS,
    FAULTS,
    NO_ANSWER,
    Result,
    ToolEpisode,
    failed,
)
from slipstream.errors import ConfigurationError, InfrastructureError, ToolError
from slipstream.interfaces import ToolSpec
from slipstream.tools.hermes import format_call
from slipstream.types import Split, Task

PROBED: Final = 16
CORPUS_TASKS: Final = 512


class McpOptions(Part):
    """The server, and what is asked."""

    command: tuple[str, ...] = Field(min_length=1)
    """Program and arguments."""
    tasks: str = Field(min_length=1)
    """A JSONL file of questions and answers."""
    question: str = "question"
    """The key of a line that holds the question."""
    tools: tuple[str, ...] = ()
    """Those that the policy is given; none named: all."""
    env: dict[str, str] = Field(default_factory=dict)
    """Variables for the server, beside PATH, HOME and the like."""
    start_timeout_s: float = Field(default=60.0, gt=0.0)


def factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return what makes the environment, its server started; raises ConfigurationError."""
    options = read_options(McpOptions, config)
    refuse_sandbox(config)
    tasks = AnsweredTasks(jsonl(options.tasks, question=options.question), options.tasks)
    tasks.check()

    async def made() -> tuple[McpServer, Greeting]:
        server = McpServer(
            options.command,
            variables=options.env,
            answer_bytes=config.limits.answer_bytes,
            start_s=options.start_timeout_s,
        )
        return server, await server.greeting()

    try:
        server, greeting = done_there(made(), 4 * options.start_timeout_s)
    except InfrastructureError as error:
        raise ConfigurationError(f"{KEY}.command: {error}; run it by hand to see what it says") from None

    def close() -> None:
        done_there(server.close(), options.start_timeout_s)

    try:
        tools = _chosen(greeting, options)
    except ConfigurationError:
        close()
        raise
    return EnvironmentFactory(
        tasks=tasks,
        make=lambda: McpEnvironment(server, tools, config, rewards),
        corpus=lambda: corpus(tasks, tools),
        scripts={
            "do_nothing": Script(play=_gives_up, about='answers "unknown" at once'),
            ORACLE: Script(play=_expert, about="makes the calls of the task's line and gives its answer"),
        },
        versions={
            f"MCP server {greeting.server}": greeting.version,
            f"tools of {greeting.server}": greeting.digest,
        },
        close=close,
    )


def refuse_sandbox(config: EnvironmentConfig) -> None:
    """Raise ConfigurationError unless environment.sandbox is "none"."""
    if config.sandbox != "none":
        raise ConfigurationError(
            f'environment.sandbox: expected "none" for {config.name}, whose tools run in a process of their '
            f'own, got "{config.sandbox}"'
        )


class AnsweredTasks:
    """Tasks of a file whose lines have answers."""

    def __init__(self, rows: RowTasks, source: str) -> None:
        self._rows, self._source = rows, source
        self.task = rows.task

    def check(self) -> None:
        """Read all lines; raises ConfigurationError."""
        self._rows.check()
        for split in Split:
            for index in range(PROBED):
                task = self.task(split, index)
                if not accepted(task):
                    raise ConfigurationError(
                        f'{self._source}: expected text, or a list of texts, under "answer" of each task, '
                        f"got {task.data.get('answer')!r} for {task.question[:80]!r}"
                    )


def accepted(task: Task) -> list[str]:
    """Return the answers that count, or an empty list when the task has none that can be checked."""
    answer = task.data.get("answer")
    answers = [answer] if isinstance(answer, str) else answer
    valid = isinstance(answers, list) and all(isinstance(each, str) for each in answers)
    return [str(each) for each in answers] if valid and answers else []


class McpEnvironment(ToolEpisode):
    """One episode over the shared server."""

    secrets: Collection[str] = ("answer", "calls")

    def __init__(
        self, server: McpServer, tools: Sequence[ToolSpec], config: EnvironmentConfig, rewards: RewardConfig
    ) -> None:
        super().__init__(config, rewards)
        self.tools = tools
        self._server = server

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Call the server's tool; what it refuses is its standard error."""
        limits = self._config.limits
        try:
            text, wrong = await there(self._server.call(name, arguments, limits.call_timeout_s))
        except ToolError as error:
            return failed(str(error))
        if len(text) > limits.observation_chars:
            text = text[: limits.observation_chars] + CUT.format(limits.observation_chars)
        return failed(text) if wrong else Result(text=text)

    def right(self) -> bool | str:
        """Tell whether the answer is one of the task's, in any case."""
        answers = [each.strip().casefold() for each in accepted(self._task)]
        given = (self._answer or "").strip().casefold()
        return given in answers if answers else "the task has no answer"


def corpus(tasks: AnsweredTasks, tools: Sequence[ToolSpec]) -> Iterator[str]:
    """Yield questions, calls and answers; what tools say is known only when they are called."""
    yield from (tool.name for tool in tools)
    yield from (*FAULTS, *COMPLAINTS, NO_ANSWER)
    for index in range(CORPUS_TASKS):
        task = tasks.task(Split.TRAIN, index)
        yield from (task.question, *accepted(task))
        yield from (format_call(call["name"], call["arguments"]) for call in task.data.get("calls", ()))


def _chosen(greeting: Greeting, options: McpOptions) -> tuple[ToolSpec, ...]:
    known = {tool.name: tool for tool in greeting.tools}
    unknown = [name for name in options.tools if name not in known]
    if unknown:
        near = hint(unknown[0], list(known)) or f"; it has {', '.join(known) or 'none'}"
        raise ConfigurationError(f"{KEY}.tools: the MCP server has no tool {unknown[0]}{near}")
    names = options.tools or tuple(known)
    if ANSWER.name in names:
        raise ConfigurationError(
            f"{KEY}.tools: the MCP server has a tool {ANSWER.name}, which is what the policy ends an episode "
            "with; name the tools to give it, without that one"
        )
    return (*(known[name] for name in names), ANSWER)


def _gives_up(task: Task) -> Play:
    yield NO_ANSWER


def _expert(task: Task) -> Play:
    for call in task.data.get("calls", ()):
        told = FAULTS[0]
        while told in FAULTS:
            told = yield format_call(call["name"], call["arguments"])
    yield format_call(ANSWER.name, {"text": (accepted(task) or [""])[0]})
