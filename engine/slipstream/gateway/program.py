"""Floor 4. Episodes of agents that are programs of their own, each against a gateway beside it.

lease ─▶ rollout ─▶ program(task, base_url=..., api_key=...) ─▶ reward ─▶ trajectory
                       │  ▲
                       ▼  │  any framework that speaks to OpenAI or Anthropic
                     gateway ─▶ backend       what was sampled is recorded before the agent reads it
"""

from __future__ import annotations

import asyncio
import json
import time
from itertools import accumulate
from typing import Any

import numpy as np

from slipstream.chat import Chat
from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.episodes import UNSENT, TokenArrays, marks_ms
from slipstream.flight_recorder import FLIGHT
from slipstream.gateway.app import Gateway
from slipstream.gateway.graph import Sample
from slipstream.gateway.players import End, OutsidePlayer, Player, ProgramPlayer
from slipstream.gateway.rollouts import Rollout, Rollouts
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
    Timings,
    ToolCall,
    ToolStatus,
    Trajectory,
)

MODEL = "policy"
"""What agents call the model."""


class ProgramRunner:
    """Runs leased tasks with a program, or, where that is None, with agents outside.

    Example: ``await ProgramRunner(program, tasks=tasks, chat=chat, environment=environment,
    rewards=rewards).sampled(lease, backend, sampling, rollout_id=7)``; the gateway starts with the first.
    """

    def __init__(
        self,
        program: Program | None,
        *,
        tasks: TaskSource,
        chat: Chat,
        environment: EnvironmentConfig,
        rewards: RewardConfig,
        malformed_calls: str = "keep",
        redactor: Redactor | None = None,
        port: int = 0,
        patience_s: float = 60.0,
    ) -> None:
        """Give each task of `tasks` to `program`, with the bounds of `environment`.

        malformed_calls: as in AgentConfig; port: of the gateway, 0 for a free one; patience_s: how long a
        task waits for an agent outside.
        """
        self._tasks, self._rewards, self._port = tasks, rewards, port
        self._penalty = rewards.invalid_penalty if malformed_calls == "penalise" else 0.0
        self.redactor = redactor or Redactor.of_process()
        """What the policy is shown and what is recorded goes through it."""
        self._rollouts = Rollouts(
            chat,
            max_tokens=environment.max_tokens,
            max_calls=environment.max_turns,
            mask_malformed=malformed_calls == "mask",
            redact=self.redactor.text,
        )
        seconds = environment.timeout_s
        self._player: Player = (
            OutsidePlayer(self._rollouts, timeout_s=seconds, patience_s=patience_s)
            if program is None
            else ProgramPlayer(program, timeout_s=seconds)
        )
        self._server: GatewayServer | None = None
        self._starting = asyncio.Lock()

    async def sampled(
        self, lease: Lease, backend: InferenceBackend, sampling: Sampling, *, rollout_id: int
    ) -> Trajectory:
        """Run one leased task with a backend; what the rollout held is released whatever happens."""
        FLIGHT.beat()
        url = await self.start()
        task = self._tasks.task(lease.split, lease.attempt.task)
        started_s, began = time.time(), time.monotonic()
        told = {"question": task.question, "data": dict(task.data), "split": task.split, "index": task.index}
        rollout = self._rollouts.open(backend, sampling, number=rollout_id, task=told)
        try:
            end = await self._player.play(task, rollout, url)
        finally:
            self._rollouts.finish(rollout)
            self._rollouts.forget(rollout)
        ended = time.monotonic()
        seconds = ended - began
        # What an answer led to has come when the agent asks again.
        asked = [*(asked for asked, _ in rollout.spans[1:]), ended]
        marks = [mark for span, then in zip(rollout.spans, asked, strict=False) for mark in (*span, then)]
        timings = Timings(
            started_s=started_s,
            finished_s=time.time(),
            generate_s=rollout.generate_s,
            tools_s=max(0.0, seconds - rollout.generate_s),
            marks_ms=marks_ms(marks, began),
        )
        return self._trajectory(lease, rollout, end, sampling, timings)

    async def close(self) -> None:
        """Stop the gateway."""
        if self._server is not None:
            await self._server.stop()

    async def start(self) -> str:
        """Start the gateway and return its address; raises AddressError."""
        async with self._starting:
            if self._server is None:
                app = Gateway(self._rollouts, model=MODEL, opener=self._player.opened).app
                self._server = GatewayServer(app, port=self._port)
                await self._server.start()
        return self._server.url

    def _trajectory(
        self, lease: Lease, rollout: Rollout, end: End, sampling: Sampling, timings: Timings
    ) -> Trajectory:
        samples = list(rollout.graph.samples())
        trained = [index for sample in samples for index in sample.trained]
        faults = {index: len(answer.faults) for index, answer in rollout.said}
        lost = [-self._penalty * faults[index] for index in trained]
        scores = self._scores(end, sum(faults[index] for index in trained))
        lengths = [len(sample.token_ids) for sample in samples]
        return Trajectory(
            identity=UNSENT,
            attempt=lease.attempt,
            split=lease.split,
            evaluation=lease.evaluation,
            issue=lease.issue,
            stage=lease.stage,
            **_joined(samples),
            turn_rewards=turn_rewards(lost, scores, self._rewards),
            scores=scores,
            outcome=end.outcome,
            tool_calls=self._calls(rollout, trained),
            sampling=sampling,
            timings=timings,
            note=self.redactor.text(end.note),
            segments=tuple(accumulate(lengths[:-1])),
            samplers=rollout.graph.samplers(trained),
        )

    def _scores(self, end: End, faults: int) -> tuple[Score, ...]:
        """Return the agent's judgement, and what malformed calls cost beside it."""
        if end.outcome is Outcome.INFRASTRUCTURE_FAILURE:
            return ()
        if not self._penalty:
            return (_score(end.reward),)
        cost = Score(name="malformed", kind=ScoreKind.PENALTY, weight=-self._penalty, value=float(faults))
        return (_score(end.reward), cost)

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
