"""Floor 4. Who plays a rollout to its end: a program of this process, or an agent outside.

the program, or the agent outside            outcome                  score
returns a number                             completed                the number
returns None; finishes                       completed                the sum of the rewards it posted
could not go on: too long, all calls         truncated                likewise, or 0 when it raised
is not done in time                          timed out                0
raises, returns no number; does nothing      infrastructure failure   none: it says nothing about the policy
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import deque
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Final, Protocol, cast

from slipstream.episodes import one_line
from slipstream.gateway.rollouts import NoTaskError, Rollout, Rollouts
from slipstream.programs import Program
from slipstream.types import Outcome, Task

_THREADS: Final = 1024
"""Plain functions that run at once; a thread begins when it is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a rollout ended."""

    outcome: Outcome
    reward: float | None = None
    note: str = ""


class Player(Protocol):
    """Plays rollouts, many at once."""

    def opened(self, key: str) -> Rollout:
        """Give an agent outside a rollout that waits for one, under a key of its own if it names one."""

    async def play(self, task: Task, rollout: Rollout, url: str) -> End:
        """Play one to its end or its time-out."""


class ProgramPlayer:
    """Calls a program for each rollout.

    Example: ``await ProgramPlayer(run, timeout_s=60.0).play(task, rollout, url)``.
    """

    def __init__(self, program: Program, *, timeout_s: float) -> None:
        """Call a coroutine function in this loop, a plain one in a thread."""
        self._program, self._timeout_s = program, timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="agent")

    def opened(self, key: str) -> Rollout:
        """Refuse: every rollout has its program."""
        raise NoTaskError(
            "rollouts: this gateway serves the agent program of its own actor; agent.program=outside lets "
            "others in"
        )

    async def play(self, task: Task, rollout: Rollout, url: str) -> End:
        """Run the program to its end or its time-out; after that its key is worth nothing."""
        work = asyncio.ensure_future(self._called(task, base_url=url, api_key=rollout.key))
        try:
            await asyncio.wait([work], timeout=self._timeout_s)
        finally:
            work.cancel()
        if not work.done():
            return _late(self._timeout_s)
        if work.cancelled():
            return _failed("it cancelled itself")
        error = work.exception()
        if error is not None and not rollout.denied:
            return _failed(f"{type(error).__name__}: {one_line(error)}")
        given = None if error is not None else work.result()
        if given is None:
            none = 0.0 if error is not None else None
            return _ended(rollout, sum(rollout.rewards) if rollout.rewards else none)
        if not isinstance(given, Real) or not math.isfinite(given):
            return _failed(f"expected a finite number as the reward, got {given!r:.80}")
        return _ended(rollout, float(given))

    def _called(self, task: Task, **arguments: str) -> Awaitable[Any]:
        if inspect.iscoroutinefunction(self._program):
            return cast(Awaitable[Any], self._program(task, **arguments))
        call = partial(self._program, task, **arguments)
        return asyncio.get_running_loop().run_in_executor(self._threads, call)


class OutsidePlayer:
    """Hands rollouts to agents outside, first come, first served, and waits for them to finish.

    Example: an agent's ``POST /v1/rollouts`` ends in ``player.opened("")``.
    """

    def __init__(self, rollouts: Rollouts, *, timeout_s: float, patience_s: float) -> None:
        """Let a rollout wait `patience_s` for its agent, and its agent have `timeout_s` for it."""
        self._rollouts, self._timeout_s, self._patience_s = rollouts, timeout_s, patience_s
        self._waiting: deque[tuple[Rollout, asyncio.Event]] = deque()

    def opened(self, key: str) -> Rollout:
        """Give the rollout that has waited longest; raises NoTaskError, FinishedError for a key in use."""
        if not self._waiting:
            raise NoTaskError("rollouts: no task waits for an agent now; ask again")
        rollout, taken = self._waiting[0]
        if key:
            self._rollouts.rename(rollout, key)
        self._waiting.popleft()
        taken.set()
        return rollout

    async def play(self, task: Task, rollout: Rollout, url: str) -> End:
        """Wait for an agent, then for its end."""
        taken = asyncio.Event()
        self._waiting.append((rollout, taken))
        try:
            async with asyncio.timeout(self._patience_s):
                await taken.wait()
        except TimeoutError:
            return _failed(f"no agent asked for the task within {self._patience_s:g} s")
        finally:
            if not taken.is_set():
                self._waiting.remove((rollout, taken))
        try:
            async with asyncio.timeout(self._timeout_s):
                await rollout.ended.wait()
        except TimeoutError:
            heard = bool(rollout.graph.turns)
            return _late(self._timeout_s) if heard else _failed("took a task and asked nothing in time")
        return _ended(rollout, sum(rollout.rewards) if rollout.rewards else None)


def _ended(rollout: Rollout, reward: float | None) -> End:
    outcome = Outcome.TRUNCATED if rollout.denied else Outcome.COMPLETED
    return End(outcome=outcome, reward=reward, note=rollout.denied)


def _late(seconds: float) -> End:
    note = f"no end within environment.timeout_s = {seconds:g} s"
    return End(outcome=Outcome.TIMED_OUT, reward=0.0, note=note)


def _failed(why: str) -> End:
    return End(outcome=Outcome.INFRASTRUCTURE_FAILURE, note=f"agent.program: {why}")
