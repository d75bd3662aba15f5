"""Floor 4. Episodes of agents that are programs of their own, each against a gateway beside it.

lease ─▶ rollout ─▶ program(task, base_url=..., api_key=...) ─▶ reward ─▶ trajectory
                       │  ▲
                       ▼  │  any framework that speaks to OpenAI or Anthropic
                     gateway ─▶ backend       what was sampled is recorded before the agent reads it

    the program                              outcome                  score
    returns a number                         completed                the number
    returns None                             completed                the sum of the rewards it posted
    could not go on: too long, all calls     truncated                likewise, or 0 when it raised
    is not done after `timeout_s`            timed out                0
    raises anything else                     infrastructure failure   none: it says nothing about the policy
"""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from slipstream.chat import Chat
from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.episodes import UNSENT, TokenArrays, one_line
from slipstream.flight_recorder import FLIGHT
from slipstream.gateway.app import Gateway
from slipstream.gateway.graph import Sample
from slipstream.gateway.rollouts import NoTaskError, Rollout, Rollouts
from slipstream.gateway.server import GatewayServer
from slipstream.interfaces import InferenceBackend, TaskSource
from slipstream.programs import Program
from slipstream.redaction import Redactor
from slipstream.rewards import turn_rewards
from slipstream.types import (
    Lease,
    Outcome,
    Sampling,
    Score,
    ScoreKind,
    Task,
    Timings,
    ToolCall,
    ToolStatus,
    Trajectory,
)

MODEL = "policy"
"""What agents call the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """How a program ended."""

    outcome: Outcome
    reward: float | None = None
    note: str = ""


class ProgramRunner:
    """Runs leased tasks with a program; its gateway starts with the first.

    Example: ``await ProgramRunner(program, tasks=tasks, chat=chat, environment=environment,
    rewards=rewards).sampled(lease, backend, sampling, rollout_id=7)``.
    """

    def __init__(
        self,
        program: Program,
        *,
        tasks: TaskSource,
        chat: Chat,
        environment: EnvironmentConfig,
        rewards: RewardConfig,
        redactor: Redactor | None = None,
    ) -> None:
        """Give each task of `tasks` to `program`, with the bounds of `environment`."""
        self._program, self._tasks, self._limits, self._rewards = program, tasks, environment, rewards
        self.redactor = redactor or Redactor.of_process()
        """What the policy is shown and what is recorded goes through it."""
        self._rollouts = Rollouts(
            chat,
            max_tokens=environment.max_tokens,
            max_calls=environment.max_turns,
            redact=self.redactor.text,
        )
        self._server: GatewayServer | None = None
        self._starting = asyncio.Lock()

    async def sampled(
        self, lease: Lease, backend: InferenceBackend, sampling: Sampling, *, rollout_id: int
    ) -> Trajectory:
        """Run one leased task with a backend; what the rollout held is released whatever happens."""
        FLIGHT.beat()
        url = await self._serving()
        task = self._tasks.task(lease.split, lease.attempt.task)
        started_s, began = time.time(), time.monotonic()
        rollout = self._rollouts.open(backend, sampling, number=rollout_id)
        try:
            end = await self._played(task, rollout, url)
        finally:
            self._rollouts.finish(rollout)
            self._rollouts.forget(rollout)
        seconds = time.monotonic() - began
        timings = Timings(
            started_s=started_s,
            finished_s=time.time(),
            generate_s=rollout.generate_s,
            tools_s=max(0.0, seconds - rollout.generate_s),
        )
        return self._trajectory(lease, rollout, end, sampling, timings)

    async def close(self) -> None:
        """Stop the gateway."""
        if self._server is not None:
            await self._server.stop()

    async def _serving(self) -> str:
        async with self._starting:
            if self._server is None:
                app = Gateway(self._rollouts, model=MODEL, opener=_nothing_outside).app
                self._server = GatewayServer(app)
                await self._server.start()
        return self._server.url

    async def _played(self, task: Task, rollout: Rollout, url: str) -> _End:
        """Run the program to its end or its time-out."""
        arguments = {"base_url": url, "api_key": rollout.key}
        if inspect.iscoroutinefunction(self._program):
            work = asyncio.create_task(self._program(task, **arguments))
        else:
            work = asyncio.create_task(asyncio.to_thread(self._program, task, **arguments))
        try:
            await asyncio.wait([work], timeout=self._limits.timeout_s)
        finally:
            work.cancel()
        if not work.done():
            note = f"no end within environment.timeout_s = {self._limits.timeout_s:g} s"
            return _End(outcome=Outcome.TIMED_OUT, reward=0.0, note=note)
        outcome = Outcome.TRUNCATED if rollout.denied else Outcome.COMPLETED
        error = work.exception()
        if error is not None and not rollout.denied:
            note = f"agent.program: {type(error).__name__}: {one_line(error)}"
            return _End(outcome=Outcome.INFRASTRUCTURE_FAILURE, note=note)
        if error is not None:
            return _End(outcome=outcome, reward=sum(rollout.rewards), note=rollout.denied)
        given = work.result()
        if given is None and rollout.rewards:
            given = sum(rollout.rewards)
        return _End(outcome=outcome, reward=None if given is None else float(given), note=rollout.denied)

    def _trajectory(
        self, lease: Lease, rollout: Rollout, end: _End, sampling: Sampling, timings: Timings
    ) -> Trajectory:
        samples = list(rollout.graph.samples())
        trained = [index for sample in samples for index in sample.trained]
        scores = () if end.outcome is Outcome.INFRASTRUCTURE_FAILURE else (_score(end.reward),)
        lengths = [len(sample.token_ids) for sample in samples]
        return Trajectory(
            identity=UNSENT,
            attempt=lease.attempt,
            split=lease.split,
            evaluation=lease.evaluation,
            issue=lease.issue,
            **_joined(samples),
            turn_rewards=turn_rewards([0.0] * len(trained), scores, self._rewards),
            scores=scores,
            outcome=end.outcome,
            tool_calls=self._calls(rollout, trained),
            sampling=sampling,
            timings=timings,
            note=self.redactor.text(end.note),
            segments=tuple(accumulate(lengths[:-1])),
        )

    def _calls(self, rollout: Rollout, trained: list[int]) -> list[ToolCall]:
        """Return the tool calls of trained messages; whether a valid one succeeded only the agent knows."""
        numbers = {index: number for number, index in enumerate(trained)}
        calls = []
        for index, answer in rollout.said:
            if index not in numbers:
                continue
            for name, arguments in answer.calls:
                read = self.redactor.data(json.loads(arguments))
                calls.append(_call(numbers[index], name, read, ToolStatus.OK))
            calls += [_call(numbers[index], "", {}, ToolStatus.INVALID) for _ in answer.faults]
        return calls


def _nothing_outside(_key: str) -> Rollout:
    raise NoTaskError("rollouts: this gateway serves the agents of its own actor only")


def _score(reward: float | None) -> Score:
    invalid = "" if reward is not None else "the agent returned no reward and posted none"
    return Score(name="agent", kind=ScoreKind.OUTCOME, weight=1.0, value=reward, invalid=invalid)


def _call(turn: int, name: str, arguments: dict[str, Any], status: ToolStatus) -> ToolCall:
    return ToolCall(turn=turn, name=name, arguments=arguments, status=status, latency_s=0.0)


def _joined(samples: list[Sample]) -> TokenArrays:
    """Return the per-token arrays of a trajectory, one sample behind the other."""
    return TokenArrays(
        token_ids=_concatenated([sample.token_ids for sample in samples], np.int32),
        loss_mask=_concatenated([sample.loss_mask for sample in samples], np.uint8),
        behavior_logprobs=_concatenated([sample.behavior_logprobs for sample in samples], np.float32),
        versions=_concatenated([sample.versions for sample in samples], np.int32),
        turns=_concatenated([sample.turns for sample in samples], np.int16),
    )


def _concatenated(parts: list[Any], dtype: Any) -> Any:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts]).astype(dtype)
