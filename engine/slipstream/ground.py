"""Floor 4. What an episode stands on: an environment whose ground may fail, and is tried again.

ToolError                      an error the environment means to show: an observation, never tried again
InfrastructureError, OSError   its ground failed: tried again with back-off, within the episode's time;
                               a step only of a resumable environment, from the state before it
any other                      a programmer's mistake: ends the actor; in a sandbox it costs a worker
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

from slipstream.config import EnvironmentConfig
from slipstream.errors import InfrastructureError, ToolError
from slipstream.interfaces import (
    AssistantMessage,
    Conversing,
    Environment,
    Observation,
    Resumable,
    ToolSpec,
    Transition,
)
from slipstream.retries import Backoff, retried
from slipstream.tools.wording import ERROR
from slipstream.types import Score, Task, TaskAttempt, ToolCall, ToolStatus

T = TypeVar("T")


@runtime_checkable
class Closable(Protocol):
    """An environment that holds something: a worker, a connection."""

    async def close(self) -> None:
        """Let go of it; called once, whatever happened."""


class Ground:
    """One episode's environment.

    Example: ``ground = Ground(factory.make(), config); await ground.reset(task, attempt)``.
    """

    def __init__(
        self,
        environment: Environment,
        config: EnvironmentConfig,
        backoff: Backoff | None = None,
        *,
        only: Collection[str] = (),
    ) -> None:
        """Touch nothing yet; without `backoff` it is as configured.

        only: the names of the tools there are; empty: all.
        """
        self._only = only
        self.converses = isinstance(environment, Conversing) and environment.converses
        self._environment, self._config = environment, config
        self._backoff = backoff or Backoff(first_s=config.backoff_s)
        self._until_s = math.inf

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """What the policy may call now: a reset and a step may change it."""
        tools = self._environment.tools
        return [tool for tool in tools if tool.name in self._only] if self._only else tools

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Start the episode, and its time; raises InfrastructureError."""
        self._task, self._attempt = task, attempt
        self._start_clock()
        return await self._tried("reset", lambda _: self._environment.reset(task, attempt))

    async def step(self, message: AssistantMessage, turn: int) -> Transition:
        """Carry a message out; raises InfrastructureError."""
        environment = self._environment
        before = environment.state() if self._config.retries and isinstance(environment, Resumable) else None

        async def step(retry: int) -> Transition:
            if retry and isinstance(environment, Resumable) and before is not None:
                await environment.restore(self._task, self._attempt, before)
            return await environment.step(message)

        try:
            return await self._tried("step", step, again=before is not None)
        except ToolError as error:
            return _refused(message, turn, error)

    async def score(self) -> Sequence[Score]:
        """Judge the episode within another time-out; raises InfrastructureError."""
        self._start_clock()
        limit_s = self._config.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._tried("score", lambda _: self._environment.score())
        except TimeoutError as error:
            late = f"score: no end within environment.timeout_s = {limit_s:g} s"
            raise InfrastructureError(late) from error

    async def close(self) -> None:
        """End what the environment holds."""
        if isinstance(self._environment, Closable):
            await self._environment.close()

    def _start_clock(self) -> None:
        self._until_s = asyncio.get_running_loop().time() + self._config.timeout_s

    async def _tried(self, what: str, operation: Callable[[int], Awaitable[T]], *, again: bool = True) -> T:
        async def attempt(retry: int) -> T:
            with _failing_as_infrastructure(what):
                return await operation(retry)

        retries = self._config.retries if again else 0
        return await retried(attempt, retries=retries, backoff=self._backoff, until_s=self._until_s)


def _refused(message: AssistantMessage, turn: int, error: ToolError) -> Transition:
    call = ToolCall(
        turn=turn,
        name=message.name,
        arguments=message.arguments or {},
        status=ToolStatus.ERROR,
        latency_s=0.0,
    )
    return Transition(observation=f"{ERROR}{error}", done=False, call=call)


@contextmanager
def _failing_as_infrastructure(what: str) -> Iterator[None]:
    """Name what failed; a tool's own time-out is an OSError too, the episode's ends outside of here."""
    try:
        yield
    except InfrastructureError as error:
        raise InfrastructureError(f"{what}: {error}") from error
    except OSError as error:
        raise InfrastructureError(f"{what}: {type(error).__name__} {error}") from error
