"""Floor 4. Any resumable environment, played in one worker of a sandbox and judged in another.

    actor     task -> reset ... message -> step ... -> score
                        │              │              │
    worker    task without its secrets, tools         │    killed before the judge is forked
    judge                                      task, last state the worker gave: score

The judge is fresh: no tool ran in it, nothing that a tool started is alive, and the answers it judges by
never were in the worker. What the worker says is checked for form and else taken as evidence, never as a
verdict: call, turn and latency are the actor's own, and only the judge's scores make a reward.
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import msgspec

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments.factory import EnvironmentFactory
from slipstream.errors import ConfigurationError, InfrastructureError
from slipstream.interfaces import AssistantMessage, Conversing, Observation, Resumable, ToolSpec, Transition
from slipstream.tools import wording
from slipstream.tools.sandbox import Sandbox, Worker, WorkerError, choose
from slipstream.types import Score, Task, TaskAttempt, ToolCall, ToolStatus

T = TypeVar("T")
CUT: Final = "\n[cut at {} characters]"

log = logging.getLogger(__name__)


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker answers to a step."""

    transition: Transition
    state: dict[str, Any]
    other_tools: bool
    """Whether the policy may call other tools from now on; which ones a worker in which no tool ran says."""


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker answers to a reset."""

    observation: Observation
    state: dict[str, Any]
    tools: tuple[ToolSpec, ...]


class EnvironmentService:
    """A worker's side: one environment."""

    def __init__(self, environment: Resumable) -> None:
        self._environment = environment

    async def reset(self, task: Any, attempt: Any) -> Opened:
        """Start an episode."""
        observation = await self._environment.reset(*_posed(task, attempt))
        environment = self._environment
        return Opened(observation=observation, state=environment.state(), tools=tuple(environment.tools))

    async def restore(self, task: Any, attempt: Any, state: dict[str, Any]) -> Sequence[ToolSpec]:
        """Take up an episode that another worker began; return its tools."""
        await self._environment.restore(*_posed(task, attempt), state)
        return self._environment.tools

    async def step(self, message: Any) -> Moved:
        """Carry one message out."""
        before = self._environment.tools
        transition = await self._environment.step(msgspec.convert(message, AssistantMessage))
        other_tools = self._environment.tools != before
        return Moved(transition=transition, state=self._environment.state(), other_tools=other_tools)

    async def judge(self, task: Any, attempt: Any, state: dict[str, Any]) -> Sequence[Score]:
        """Score an episode by its last state."""
        await self.restore(task, attempt, state)
        return await self._environment.score()


def service(options: dict[str, Any]) -> Callable[[], EnvironmentService]:
    """Return the maker of each worker's service; called once, in the fork server."""
    path = options["factory"]
    config = EnvironmentConfig.model_validate_json(options["environment"])
    factory = factory_at(path, config, RewardConfig.model_validate_json(options["rewards"]))
    return lambda: EnvironmentService(resumable(factory, path))


def sandboxed(
    path: str, config: EnvironmentConfig, rewards: RewardConfig, *, packages: Sequence[str] = ()
) -> EnvironmentFactory:
    """Return the factory of environments that run in a sandbox.

    `path` is "module:function"; the function takes `config` and `rewards` and returns an
    `EnvironmentFactory` of `Resumable` environments. It is called here too, for the tasks. `packages` are
    top-level packages it imports that are not installed. Raises ConfigurationError when the environment is
    not resumable or the sandbox does not work here.
    """
    plain = factory_at(path, config, rewards)
    pattern = resumable(plain, path)
    sandbox = Sandbox(
        choose(config.sandbox),
        service=f"{__name__}:{service.__name__}",
        options={
            "factory": path,
            "environment": config.model_copy(update={"sandbox": "none"}).model_dump_json(),
            "rewards": rewards.model_dump_json(),
        },
        config=config.limits,
        packages=(path.partition(":")[0].partition(".")[0], *packages),
    )
    return replace(
        plain,
        make=lambda: SandboxedEnvironment(pattern, sandbox, config),
        rehearse=plain.make,
        close=sandbox.close,
    )


def factory_at(path: str, config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return what the function "module:function" makes of the configuration."""
    module, _, function = path.partition(":")
    factory: EnvironmentFactory = getattr(importlib.import_module(module), function)(config, rewards)
    return factory


def resumable(factory: EnvironmentFactory, path: str) -> Resumable:
    """Return a new environment; raises ConfigurationError when a sandbox cannot run it."""
    environment = factory.make()
    if not isinstance(environment, Resumable):
        raise ConfigurationError(
            f"environment.sandbox: expected {path} to make environments with secrets, state and restore, "
            f'got {type(environment).__name__}; add them or choose "none"'
        )
    return environment


class SandboxedEnvironment:
    """One episode in a sandbox.

    A tool that crashes, hangs or says too much costs its worker: the policy is shown a standard error, and
    a new worker takes up the last state. Only what the host fails at is an InfrastructureError.
    """

    def __init__(self, pattern: Resumable, sandbox: Sandbox, config: EnvironmentConfig) -> None:
        """Start nothing yet; `pattern` is an environment of the same kind, which is never played."""
        self.tools: Sequence[ToolSpec] = pattern.tools
        self.secrets = pattern.secrets
        self.converses = isinstance(pattern, Conversing) and pattern.converses
        self._sandbox, self._config, self._limits = sandbox, config, config.limits
        self._worker: Worker | None = None
        self._state: dict[str, Any] = {}
        self._turn = 0

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Start an episode in a fresh worker; raises InfrastructureError."""
        self._take(task, attempt)
        worker = await self._fresh_worker()
        opened = await self._ground(worker, Opened, "reset", task=self._blind, attempt=attempt)
        self._state, self.tools = opened.state, opened.tools
        return opened.observation

    async def step(self, message: AssistantMessage) -> Transition:
        """Carry one message out; raises ToolError and InfrastructureError as the environment does."""
        assert self._worker is not None
        turn, self._turn = self._turn, self._turn + 1
        started = time.monotonic()
        try:
            raw = await self._worker.call("step", self._limits.call_timeout_s, message=message)
            moved = msgspec.msgpack.decode(raw, type=Moved)
        except WorkerError as error:
            fault = str(error)
        except msgspec.MsgspecError:
            fault = wording.BROKE_PROTOCOL
        else:
            if math.isfinite(moved.transition.reward):
                self._state = moved.state
                if moved.other_tools:
                    await self.restore(self._task, self._attempt, self._state)
                return self._checked(moved.transition, message, turn, time.monotonic() - started)
            fault = wording.BROKE_PROTOCOL
        await self.restore(self._task, self._attempt, self._state)
        failed = Transition(observation=f"{wording.ERROR}{fault}", done=False, call=_FAILED)
        return self._checked(failed, message, turn, time.monotonic() - started)

    async def score(self) -> Sequence[Score]:
        """Judge the episode where no tool ever ran; raises InfrastructureError."""
        judge = await self._fresh_worker()
        scores = await self._ground(
            judge, tuple[Score, ...], "judge", task=self._task, attempt=self._attempt, state=self._state
        )
        await self.close()
        return scores

    def state(self) -> dict[str, Any]:
        """Return the last state that a worker gave."""
        return self._state

    async def restore(self, task: Task, attempt: TaskAttempt, state: dict[str, Any]) -> None:
        """Go on from `state` in a fresh worker; raises InfrastructureError."""
        self._take(task, attempt)
        self._state = state
        worker = await self._fresh_worker()
        self.tools = await self._ground(
            worker, tuple[ToolSpec, ...], "restore", task=self._blind, attempt=attempt, state=state
        )

    async def close(self) -> None:
        """Kill the worker with all it started."""
        worker, self._worker = self._worker, None
        if worker is not None:
            try:
                await worker.close()
            except InfrastructureError as error:
                log.warning("%s", error)

    def _take(self, task: Task, attempt: TaskAttempt) -> None:
        public = {key: value for key, value in task.data.items() if key not in self.secrets}
        self._task, self._blind, self._attempt = task, replace(task, data=public), attempt

    async def _fresh_worker(self) -> Worker:
        await self.close()
        self._worker = await self._sandbox.worker()
        return self._worker

    async def _ground(self, worker: Worker, kind: type[T], method: str, **arguments: Any) -> T:
        """Call a method in which no tool of the policy's runs: whatever fails is the host's fault."""
        try:
            raw = await worker.call(method, self._config.timeout_s, **arguments)
            value: T = msgspec.msgpack.decode(raw, type=kind)
        except (WorkerError, msgspec.MsgspecError) as error:
            raise InfrastructureError(f"sandbox: {method}: {error}") from error
        return value

    def _checked(
        self, given: Transition, message: AssistantMessage, turn: int, latency_s: float
    ) -> Transition:
        """Return a transition that holds nothing about the call but its status on the worker's word."""
        most, text, call = self._limits.observation_chars, given.observation, given.call
        cut = len(text) > most + len(CUT.format(most))
        if cut:
            text = text[:most] + CUT.format(most)
        if message.error or message.arguments is None or call is None:
            return replace(given, observation=text, call=None)
        call = replace(call, turn=turn, name=message.name, arguments=message.arguments, latency_s=latency_s)
        if cut:
            call = replace(call, cut=True)
        return replace(given, observation=text, call=call)


_FAILED: Final = ToolCall(turn=0, name="", arguments={}, status=ToolStatus.CRASHED, latency_s=0.0)


def _posed(task: Any, attempt: Any) -> tuple[Task, TaskAttempt]:
    return msgspec.convert(task, Task), msgspec.convert(attempt, TaskAttempt)
