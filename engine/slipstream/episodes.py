"""Floor 4. One episode: policy and environment in turn until a typed end.

Tokens only ever grow: prompt, then (sampled message, bridge) for each turn. What was sampled is what is
trained.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from slipstream.chat import Chat
from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory
from slipstream.interfaces import Environment, InferenceBackend
from slipstream.rewards import turn_rewards
from slipstream.tools.hermes import parse_call
from slipstream.types import (
    Completion,
    Int32Array,
    Lease,
    Outcome,
    Sampling,
    Timings,
    ToolCall,
    Trajectory,
    TrajectoryId,
)

UNSENT = TrajectoryId(run="", actor="", epoch=0, seq=0)
"""Identity of a trajectory nobody has sent yet; the actor's client assigns the real one."""

Speaker = Callable[[Int32Array, str], Awaitable[Completion]]
"""Says the next message, given all tokens so far and the last observation's text."""


class Recorder:
    """Grows one rollout's tokens; holds exactly what a trajectory needs."""

    def __init__(self, prompt: Int32Array) -> None:
        self._tokens = [prompt]
        self._completions: list[tuple[int, Completion]] = []
        self.length = len(prompt)
        self.turns = 0

    def tokens(self) -> Int32Array:
        """Return the [T] tokens so far."""
        if len(self._tokens) > 1:
            self._tokens = [np.concatenate(self._tokens)]
        return self._tokens[0]

    def say(self, completion: Completion) -> None:
        """Append a sampled message."""
        self._completions.append((self.length, completion))
        self._append(completion.token_ids)
        self.turns += 1

    def observe(self, bridge: Int32Array) -> None:
        """Append tokens the policy did not sample."""
        self._append(bridge)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the per-token arrays of a `Trajectory`."""
        mask = np.zeros(self.length, dtype=np.uint8)
        logprobs = np.zeros(self.length, dtype=np.float32)
        versions = np.full(self.length, -1, dtype=np.int32)
        turns = np.full(self.length, -1, dtype=np.int16)
        for turn, (start, completion) in enumerate(self._completions):
            span = slice(start, start + len(completion.token_ids))
            mask[span], turns[span] = 1, turn
            logprobs[span], versions[span] = completion.logprobs, completion.versions
        return {
            "token_ids": self.tokens().astype(np.int32),
            "loss_mask": mask,
            "behavior_logprobs": logprobs,
            "versions": versions,
            "turns": turns,
        }

    def _append(self, tokens: Int32Array) -> None:
        self._tokens.append(tokens)
        self.length += len(tokens)


class _Clock:
    """Adds up where an episode's seconds went."""

    def __init__(self) -> None:
        self._started_s = time.time()
        self._seconds = {"generate": 0.0, "tools": 0.0}

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Book the body's seconds under `kind`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[kind] += time.monotonic() - began

    def timings(self) -> Timings:
        """Return the bookings up to now."""
        return Timings(
            started_s=self._started_s,
            finished_s=time.time(),
            generate_s=self._seconds["generate"],
            tools_s=self._seconds["tools"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRunner:
    """Runs episodes of one environment with one chat format."""

    factory: EnvironmentFactory
    chat: Chat
    environment: EnvironmentConfig
    rewards: RewardConfig

    async def sampled(
        self, lease: Lease, backend: InferenceBackend, sampling: Sampling, *, rollout_id: int
    ) -> Trajectory:
        """Run one leased episode with a backend; the row is given back whatever happens."""

        async def speak(tokens: Int32Array, observation: str) -> Completion:
            return await backend.generate(tokens, sampling, rollout_id=rollout_id)

        try:
            return await self.run(lease, speak, sampling)
        finally:
            backend.release(rollout_id)

    async def scripted(self, lease: Lease, script: Generator[str, str, str | None]) -> Trajectory:
        """Run one episode with a script in the policy's place."""
        opening = next(script)

        async def speak(tokens: Int32Array, observation: str) -> Completion:
            text = script.send(observation) if observation else opening
            said = self.chat.message(text)
            blank = np.zeros(len(said), dtype=np.float32)
            return Completion(
                token_ids=said, logprobs=blank, versions=np.full(len(said), -1, np.int32), stopped=True
            )

        return await self.run(lease, speak, Sampling(max_tokens=self.environment.max_tokens))

    async def run(self, lease: Lease, speak: Speaker, sampling: Sampling) -> Trajectory:
        """Run one episode with any speaker."""
        clock = _Clock()
        environment = self.factory.make()
        calls: list[ToolCall] = []
        earned: list[float] = []
        task = self.factory.tasks.task(lease.split, lease.attempt.task)
        recorder = Recorder(self.chat.prompt(await environment.reset(task, lease.attempt), environment.tools))
        try:
            async with asyncio.timeout(self.environment.timeout_s):
                outcome = await self._converse(environment, recorder, speak, calls, earned, clock)
        except TimeoutError:
            outcome = Outcome.TIMED_OUT
        scores = await environment.score()
        # A time-out can fall between a message and its result: that turn earned nothing.
        earned += [0.0] * (recorder.turns - len(earned))
        return Trajectory(
            identity=UNSENT,
            attempt=lease.attempt,
            split=lease.split,
            evaluation=lease.evaluation,
            issue=lease.issue,
            **recorder.arrays(),
            turn_rewards=turn_rewards(earned, scores, self.rewards),
            scores=scores,
            outcome=outcome,
            tool_calls=calls,
            sampling=sampling,
            timings=clock.timings(),
        )

    async def _converse(
        self,
        environment: Environment,
        recorder: Recorder,
        speak: Speaker,
        calls: list[ToolCall],
        earned: list[float],
        clock: _Clock,
    ) -> Outcome:
        """Alternate messages and tool results until the episode ends."""
        invalid, observation = 0, ""
        while True:
            with clock.spending("generate"):
                completion = await speak(recorder.tokens(), observation)
            recorder.say(completion)
            message = parse_call(self.chat.text(completion.token_ids), environment.tools)
            with clock.spending("tools"):
                transition = await environment.step(message)
            earned.append(transition.reward)
            if transition.call is not None:
                calls.append(transition.call)
            invalid += bool(message.error)
            if transition.done:
                return Outcome.COMPLETED
            if invalid > self.environment.max_invalid:
                return Outcome.INVALID_ACTION
            observation = transition.observation
            bridge = self.chat.bridge(observation)
            if not completion.stopped:
                bridge = np.concatenate([np.array([self.chat.stop_token], np.int32), bridge])
            if recorder.turns >= self.environment.max_turns:
                return Outcome.TRUNCATED
            # A message needs room for at least one token beside the stop token.
            if recorder.length + len(bridge) + 2 > self.environment.max_tokens:
                return Outcome.TRUNCATED
            recorder.observe(bridge)
