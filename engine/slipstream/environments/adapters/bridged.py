"""Floor 4. `environment.name` = "skyrl-gym", "openenv" or "verifiers": a foreign environment as one of ours.

    [environment.options]
    python = "/path/to/venv/bin/python"        in which the framework is installed
    entry = "gsm8k"                            what to play there

A task is solved when the rewards of its episode add up to `success`: outcome +1, and -1 below. That sum
is shown as the metric "reward"; as shaping it counts by rewards.shaping.

skyrl-gym    entry: an id or module:Class; tasks: a JSONL file, whose keys beside the question are `extras`
openenv      entry: module:Environment with arguments.action = "module:Action", or a server's address;
             tasks: seeds, or a JSONL file, whose keys beside the question go to `reset`
verifiers    entry: module:Taskset, whose tasks are divided among the splits by their content

Lines of a JSONL file may hold "expert", the messages that solve the task: then the scripted expert says
them, and the warm start imitates it. The environment is not told.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import time
from asyncio import sleep
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pydantic import Field

from slipstream.authoring.tasks import jsonl, listed
from slipstream.config import EnvironmentConfig, Part, RewardConfig
from slipstream.environments.adapters.bridge import Bridge, Description, Held, Opening, Refused
from slipstream.environments.adapters.foreign import CallTimeout, done_there, there
from slipstream.environments.adapters.mcp import refuse_sandbox
from slipstream.environments.factory import ORACLE, EnvironmentFactory, Play, Script
from slipstream.environments.options import KEY, read_options
from slipstream.environments.sandboxed import CUT
from slipstream.environments.tool_episode import Faults, failed
from slipstream.errors import ConfigurationError, InfrastructureError, ToolError
from slipstream.interfaces import AssistantMessage, Observation, TaskSource, ToolSpec, Transition
from slipstream.types import Score, ScoreKind, Split, Task, TaskAttempt, ToolCall, ToolStatus

CORPUS_TASKS: Final = 512
EXPERT: Final = "expert"
SPLITS: Final = tuple(Split)

log = logging.getLogger(__name__)


class BridgeOptions(Part):
    """What is played, and where."""

    python: str = sys.executable
    """The interpreter; ours unless said otherwise."""
    entry: str = Field(min_length=1)
    arguments: dict[str, Any] = Field(default_factory=dict)
    """What it is made with."""
    path: tuple[str, ...] = ()
    """Folders in which its modules are looked for, too."""
    env: dict[str, str] = Field(default_factory=dict)
    """Variables for the worker, beside PATH, HOME and the like."""
    tasks: str = ""
    """A JSONL file of tasks."""
    question: str = "question"
    """The key of a line that holds the question."""
    system: str = ""
    """Said to the policy before everything else."""
    success: float = 1.0
    """Least sum of an episode's rewards with which its task is solved."""
    episodes_per_worker: int = Field(default=0, ge=0)
    """Beyond these another worker is started; 0: all in one. 1 is for environments that share state."""
    start_timeout_s: float = Field(default=120.0, gt=0.0)


def factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return what makes the environment, a worker of it started; raises ConfigurationError."""
    options = read_options(BridgeOptions, config)
    refuse_sandbox(config)
    if shutil.which(options.python) is None:
        raise ConfigurationError(
            f"{KEY}.python: there is no interpreter {options.python}; make one with python -m venv, or leave "
            "the key out to use this one"
        )
    bridge = Bridge(
        Opening(
            kind=config.name,
            python=options.python,
            entry=options.entry,
            arguments=options.arguments,
            path=tuple(os.path.abspath(each) for each in options.path),
            variables=options.env,
            answer_bytes=config.limits.answer_bytes,
            start_s=options.start_timeout_s,
            episodes_per_worker=options.episodes_per_worker,
        )
    )
    given = _tasks(config.name, options)
    described = _described(bridge, config.name, options)
    if not described.concurrent and not options.episodes_per_worker:
        log.warning(
            "%s %s does not say that it supports concurrent sessions: should its episodes share what they "
            "must not, give %s.episodes_per_worker=1",
            config.name,
            options.entry,
            KEY,
        )
    # The row number is what the worker knows a task of its own by.
    own = [{"question": text, "row": row} for row, text in enumerate(described.questions or ())]
    tasks = given or listed(own)
    tools = tuple(ToolSpec(**tool) for tool in described.tools)
    return EnvironmentFactory(
        tasks=tasks,
        make=lambda: BridgedEnvironment(bridge, described, tools, options, config, rewards),
        corpus=lambda: _corpus(tasks, options, tools),
        scripts=_scripts(tasks),
        versions=described.versions,
        close=lambda: done_there(bridge.end(), options.start_timeout_s),
    )


class BridgedEnvironment:
    """One episode in a worker; it cannot go on elsewhere, so that none of its steps is tried again."""

    def __init__(
        self,
        bridge: Bridge,
        described: Description,
        tools: Sequence[ToolSpec],
        options: BridgeOptions,
        config: EnvironmentConfig,
        rewards: RewardConfig,
    ) -> None:
        """Begin nothing yet."""
        self.tools, self.converses = tools, described.converses
        self._bridge, self._options, self._config, self._rewards = bridge, options, config, rewards
        self._held: Held | None = None
        self._turn = self._invalid = 0
        self._hung = False
        """Whether a message was handed on that has led to nothing yet."""

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Begin the episode in a worker; raises InfrastructureError."""
        await self.close()
        self._faults = Faults(task.split, attempt, self._config.tool_failure_rate)
        data = {key: value for key, value in task.data.items() if key != EXPERT}
        posed = {"question": task.question, "data": data}
        given = task.data.get("seed")
        seed = given if isinstance(given, int) else seed_of(task.split, task.index)
        self._held, opened = await there(self._bridge.reset(posed, seed, self._config.timeout_s))
        system = "\n".join(filter(None, (self._options.system, str(opened.get("system") or ""))))
        return Observation(system=system, user=self._cut(str(opened.get("user") or task.question)))

    async def step(self, message: AssistantMessage) -> Transition:
        """Hand one message on: a call of a tool, or text."""
        turn, self._turn = self._turn, self._turn + 1
        if message.error and self.tools:
            self._invalid += 1
            lost = self._rewards.step_penalty + self._rewards.invalid_penalty
            return Transition(observation=f"error: {message.error}", done=False, reward=-lost)
        started, called = time.monotonic(), message.arguments is not None
        moved, status = await self._moved(message, called)
        done = moved.get("done") is True
        call = None
        if called:
            call = ToolCall(
                turn=turn,
                name=message.name,
                arguments=message.arguments or {},
                status=status,
                latency_s=time.monotonic() - started,
            )
        return Transition(
            observation="" if done else self._cut(str(moved.get("text") or "")),
            done=done,
            call=call,
            reward=-self._rewards.step_penalty,
            role="user" if moved.get("role") == "user" else "tool",
        )

    async def score(self) -> Sequence[Score]:
        """Outcome by what the environment's own rewards add up to; raises InfrastructureError."""
        reward, invalid, metrics = await self._judged()
        solved = None if invalid else reward >= self._options.success and not self._hung
        weights = self._rewards
        share = min(1.0, max(0.0, reward / self._options.success)) if self._options.success > 0 else 0.0
        spent = (
            ("step", weights.step_penalty, self._turn),
            ("invalid", weights.invalid_penalty, self._invalid),
        )
        return (
            Score(
                name="outcome",
                kind=ScoreKind.OUTCOME,
                weight=1.0,
                value=None if solved is None else 1.0 if solved else -1.0,
                invalid=invalid,
            ),
            Score(name="progress", kind=ScoreKind.SHAPING, weight=weights.shaping, value=share),
            *(
                Score(name=name, kind=ScoreKind.PENALTY, weight=-weight, value=float(count))
                for name, weight, count in spent
            ),
            *(
                Score(name=name, kind=ScoreKind.METRIC, weight=0.0, value=value)
                for name, value in metrics.items()
            ),
        )

    async def close(self) -> None:
        """Let go of the episode in the worker."""
        held, self._held = self._held, None
        if held is not None:
            await there(self._bridge.close(held))

    async def _moved(self, message: AssistantMessage, called: bool) -> tuple[dict[str, Any], ToolStatus]:
        """Return what a message led to; the environment's failure is what the policy reads."""
        assert self._held is not None
        if called:
            if self._config.tool_latency_s:
                await sleep(self._config.tool_latency_s)
            fault = self._faults.strike()
            if fault is not None:
                return {"text": fault}, ToolStatus.ERROR
        limit_s = self._config.limits.call_timeout_s
        said = {"text": message.text, "name": message.name, "arguments": message.arguments}
        # Until it has returned nothing else may be asked, also when the episode's own time ends it.
        self._hung = True
        try:
            moved = await there(self._bridge.call(self._held, "step", limit_s, **said))
            self._hung = False
        except ToolError as error:
            self._hung = False
            return {"text": failed(str(error)).text}, ToolStatus.CRASHED
        except CallTimeout:
            return {"done": True}, ToolStatus.CRASHED
        except InfrastructureError:
            self._hung = False
            raise
        return moved, ToolStatus.ERROR if moved.get("failed") is True else ToolStatus.OK

    async def _judged(self) -> tuple[float, str, dict[str, float]]:
        """Return the sum of rewards, why it cannot be judged by, and the metrics."""
        if self._hung or self._held is None:
            return 0.0, "" if self._hung else "the episode never began", {}
        try:
            judged = await there(self._bridge.call(self._held, "score", self._config.timeout_s))
        except CallTimeout:
            return 0.0, f"no score within {self._config.timeout_s:g} s", {}
        except ToolError as error:
            return 0.0, str(error), {}
        reward, shown = judged.get("reward"), judged.get("metrics")
        if not isinstance(reward, int | float) or not math.isfinite(reward):
            return 0.0, f"expected a finite reward, got {reward!r}"[:200], {}
        return float(reward), "", {"reward": float(reward), **_finite(shown)}

    def _cut(self, text: str) -> str:
        most = self._config.limits.observation_chars
        return text if len(text) <= most else text[:most] + CUT.format(most)


def seed_of(split: Split, index: int) -> int:
    """Return a task's seed: 3 x index + the place of its split, so that no two tasks share one."""
    return len(SPLITS) * index + SPLITS.index(split)


class SeedTasks:
    """Tasks that differ in nothing but the seed of their environment."""

    def __init__(self, entry: str) -> None:
        self._entry = entry

    def task(self, split: Split, index: int) -> Task:
        """Return the task at `index`; no two have the same seed."""
        seed = seed_of(split, index)
        return Task(split=split, index=index, question=f"{self._entry}, seed {seed}", data={"seed": seed})


def _described(bridge: Bridge, name: str, options: BridgeOptions) -> Description:
    """Return what a first worker serves; raises ConfigurationError for what it refuses."""
    try:
        return done_there(bridge.described(), 2 * options.start_timeout_s)
    except Refused as error:
        if error.kind == "package":
            raise ConfigurationError(
                f"{KEY}.python: {options.python} has no package {error}; run "
                f"{options.python} -m pip install {name}"
            ) from None
        raise ConfigurationError(f"{KEY}.entry: {options.entry}: {error}") from None
    except InfrastructureError as error:
        raise ConfigurationError(f"{KEY}.entry: {options.entry} does not start: {error}") from None


def _tasks(name: str, options: BridgeOptions) -> TaskSource | None:
    """Return the tasks, or None where the environment brings its own; raises ConfigurationError."""
    if name == "verifiers":
        if options.tasks:
            raise ConfigurationError(f"{KEY}.tasks: {name} brings its own; leave the key out")
        return None
    if options.tasks:
        tasks = jsonl(options.tasks, question=options.question)
        tasks.check()
        return tasks
    if name == "openenv":
        return SeedTasks(options.entry)
    raise ConfigurationError(f"{KEY}.tasks: {name} brings no tasks; give a JSONL file, a task a line")


def _corpus(tasks: TaskSource, options: BridgeOptions, tools: Sequence[ToolSpec]) -> Iterator[str]:
    """Yield what is known of episodes that nobody has played."""
    yield from (options.system, *(tool.name for tool in tools))
    for index in range(CORPUS_TASKS):
        task = tasks.task(Split.TRAIN, index)
        yield from (task.question, *map(str, task.data.get(EXPERT, ())))


def _finite(metrics: Any) -> dict[str, float]:
    shown = metrics if isinstance(metrics, Mapping) else {}
    return {
        str(name): float(value)
        for name, value in shown.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _scripts(tasks: TaskSource) -> dict[str, Script]:
    scripts = {"do_nothing": Script(play=_says_nothing, about='says "unknown" at every turn')}
    if tasks.task(Split.TRAIN, 0).data.get(EXPERT):
        scripts[ORACLE] = Script(play=_expert, about="says what the task's line has its expert say")
    return scripts


def _says_nothing(task: Task) -> Play:
    while True:
        yield "unknown"


def _expert(task: Task) -> Play:
    last = "unknown"
    for last in map(str, task.data.get(EXPERT, ())):
        yield last
    while True:
        yield last
