"""Floor 4. One episode: policy and environment in turn until a typed end.

Tokens only ever grow: prompt, then (sampled message, bridge) for each turn. What was sampled is what is
trained.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypedDict

import numpy as np

from slipstream.call_formats import CallFormat
from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory
from slipstream.errors import InfrastructureError, MonitorError
from slipstream.flight_recorder import FLIGHT
from slipstream.ground import Ground
from slipstream.interfaces import Environment, InferenceBackend, Observation, ToolSpec, Transition
from slipstream.redaction import Redactor
from slipstream.retries import Backoff
from slipstream.rewards import leniently, turn_rewards
from slipstream.tools.hermes import parse_call, rewritten
from slipstream.types import (
    MARKED_MESSAGES,
    Completion,
    Float32Array,
    Int16Array,
    Int32Array,
    Lease,
    Outcome,
    Sampling,
    Score,
    ScoreKind,
    Timings,
    ToolCall,
    Trajectory,
    TrajectoryId,
    UInt8Array,
)

UNSENT = TrajectoryId(run="", actor="", epoch=0, seq=0)
"""Identity of a trajectory nobody has sent yet; the actor's client assigns the real one."""

MAX_NOTE = 500
"""Most characters of a trajectory's note."""

Speaker = Callable[[Int32Array, str], Awaitable[Completion]]
"""Says the next message, given all tokens so far and the last observation's text."""


class ChatFormat(Protocol):
    """Turns messages into tokens and back: `slipstream.chat.Chat`, or what plays without a tokenizer."""

    calls: CallFormat
    stop_token: int

    def prompt(
        self,
        observation: Observation,
        tools: Sequence[ToolSpec],
        *,
        schemas: bool = False,
        converses: bool = False,
    ) -> Int32Array:
        """Return the [T] tokens up to the policy's first message."""

    def message(self, text: str) -> Int32Array:
        """Return the tokens of a message of the policy, stop token included."""

    def text(self, token_ids: Int32Array) -> str:
        """Decode sampled tokens, without the stop token."""

    @property
    def bridge(self) -> Callable[[str, str], Int32Array]:
        """Gives the tokens from a stop token to the policy's next message, for a result and who says it."""


class TokenArrays(TypedDict):
    """The per-token members of a `Trajectory`, [T] each."""

    token_ids: Int32Array
    loss_mask: UInt8Array
    behavior_logprobs: Float32Array
    versions: Int32Array
    turns: Int16Array


class Recorder:
    """Grows one rollout's tokens and books what happens; holds exactly what a trajectory needs."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._tokens: list[Int32Array] = [np.zeros(0, dtype=np.int32)]
        self._completions: list[tuple[int, Completion]] = []
        self._earned: list[float] = []
        self.calls: list[ToolCall] = []
        self.length = 0

    @property
    def turns(self) -> int:
        """Messages of the policy so far."""
        return len(self._completions)

    def tokens(self) -> Int32Array:
        """Return the [T] tokens so far."""
        if len(self._tokens) > 1:
            self._tokens = [np.concatenate(self._tokens)]
        return self._tokens[0]

    def say(self, completion: Completion) -> None:
        """Append a sampled message."""
        self._completions.append((self.length, completion))
        self.show(completion.token_ids)

    def show(self, tokens: Int32Array) -> None:
        """Append tokens as they are; those that no message brought were not sampled by the policy."""
        self._tokens.append(tokens)
        self.length += len(tokens)

    def book(self, transition: Transition) -> None:
        """Note what the last message led to."""
        self._earned.append(transition.reward)
        if transition.call is not None:
            arguments = self._redactor.data(transition.call.arguments)
            self.calls.append(replace(transition.call, arguments=arguments))

    def earned(self) -> list[float]:
        """Return what each turn earned; one that was cut before its result earned nothing."""
        return self._earned + [0.0] * (self.turns - len(self._earned))

    def samplers(self) -> tuple[tuple[str, int], ...]:
        """Return which servers sampled under which serials."""
        return tuple(
            sorted(frozenset[tuple[str, int]]().union(*(said.samplers for _, said in self._completions)))
        )

    def arrays(self) -> TokenArrays:
        """Return the per-token arrays of a `Trajectory`."""
        mask = np.zeros(self.length, dtype=np.uint8)
        logprobs = np.zeros(self.length, dtype=np.float32)
        versions = np.full(self.length, -1, dtype=np.int32)
        turns = np.full(self.length, -1, dtype=np.int16)
        for turn, (start, completion) in enumerate(self._completions):
            span = slice(start, start + len(completion.token_ids))
            mask[span], turns[span] = 1, turn
            logprobs[span], versions[span] = completion.logprobs, completion.versions
        return TokenArrays(
            token_ids=self.tokens().astype(np.int32),
            loss_mask=mask,
            behavior_logprobs=logprobs,
            versions=versions,
            turns=turns,
        )


class _Clock:
    """Adds up where an episode's seconds went, and notes when."""

    def __init__(self) -> None:
        self._started_s, self._began = time.time(), time.monotonic()
        self._marks: list[float] = []
        self._seconds = {"generate": 0.0, "tools": 0.0}

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Book the body's seconds under `kind`."""
        began = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            self._seconds[kind] += ended - began
            self._marks += (began, ended) if kind == "generate" else (ended,)

    def timings(self) -> Timings:
        """Return the bookings up to now."""
        return Timings(
            started_s=self._started_s,
            finished_s=time.time(),
            generate_s=self._seconds["generate"],
            tools_s=self._seconds["tools"],
            marks_ms=marks_ms(self._marks, self._began),
        )


def marks_ms(marks: Sequence[float], began: float) -> tuple[int, ...]:
    """Return `Timings.marks_ms` of marks and a beginning on one monotonic clock.

    A message that led to nothing any more has its own end for the third mark.
    """
    whole = [*marks, marks[-1]] if len(marks) % 3 == 2 else marks
    return tuple(max(0, round(1000 * (mark - began))) for mark in whole[: 3 * MARKED_MESSAGES])


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRunner:
    """Runs episodes of one environment with one chat format."""

    factory: EnvironmentFactory
    chat: ChatFormat
    environment: EnvironmentConfig
    rewards: RewardConfig
    redactor: Redactor = field(default_factory=Redactor.of_process)
    """What the policy is shown and what is recorded goes through it."""
    backoff: Backoff | None = None
    """Between retries; as configured when None."""
    tools: tuple[str, ...] = ()
    """The only tools there are; empty: all."""
    lenient: float = 0.0
    """Progress that counts as a success; 0: none does."""

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

    async def start(self) -> str:
        """Return "": no agent looks for it."""
        return ""

    async def close(self) -> None:
        """End what the environments share."""
        self.factory.close()

    async def scripted(self, lease: Lease, script: Generator[str, str, None]) -> Trajectory:
        """Run one episode with a script in the policy's place."""
        opening = next(script)

        async def speak(tokens: Int32Array, observation: str) -> Completion:
            text = script.send(observation) if observation else opening
            said = self.chat.message(rewritten(text, self.chat.calls))
            blank = np.zeros(len(said), dtype=np.float32)
            return Completion(
                token_ids=said, logprobs=blank, versions=np.full(len(said), -1, np.int32), stopped=True
            )

        sampling = Sampling(max_tokens=self.environment.max_tokens)
        return await self.run(lease, speak, sampling, make=self.factory.rehearse)

    async def run(
        self,
        lease: Lease,
        speak: Speaker,
        sampling: Sampling,
        *,
        make: Callable[[], Environment] | None = None,
    ) -> Trajectory:
        """Run one episode with any speaker, in an environment of `make`, or else of the factory's.

        When the environment's ground fails (InfrastructureError, OSError) the trajectory holds what
        happened until then and no scores: a failure that says nothing about the policy is no reward.
        """
        FLIGHT.beat()
        clock, recorder = _Clock(), Recorder(self.redactor)
        ground = Ground((make or self.factory.make)(), self.environment, self.backoff, only=self.tools)
        scores: Sequence[Score] = ()
        try:
            outcome, note = await self._played(lease, ground, recorder, speak, clock)
            judged = await ground.score()
            _heed(judged, lease)
            scores = leniently(judged, self.lenient)
        except InfrastructureError as error:
            outcome, note = Outcome.INFRASTRUCTURE_FAILURE, one_line(error)
        finally:
            await ground.close()
        return Trajectory(
            identity=UNSENT,
            attempt=lease.attempt,
            split=lease.split,
            evaluation=lease.evaluation,
            issue=lease.issue,
            stage=lease.stage,
            **recorder.arrays(),
            turn_rewards=turn_rewards(recorder.earned(), scores, self.rewards),
            scores=scores,
            outcome=outcome,
            tool_calls=recorder.calls,
            samplers=recorder.samplers(),
            sampling=sampling,
            timings=clock.timings(),
            note=self.redactor.text(note),
        )

    async def _played(
        self, lease: Lease, ground: Ground, recorder: Recorder, speak: Speaker, clock: _Clock
    ) -> tuple[Outcome, str]:
        """Play an episode to its end or its time-out; return the outcome and a note on it."""
        limit_s = self.environment.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                task = self.factory.tasks.task(lease.split, lease.attempt.task)
                opening = await ground.reset(task, lease.attempt)
                shown = Observation(
                    system=self.redactor.text(opening.system), user=self.redactor.text(opening.user)
                )
                prompt = self.chat.prompt(
                    shown, ground.tools, schemas=self.environment.tool_schemas, converses=ground.converses
                )
                recorder.show(prompt)
                return await self._converse(ground, recorder, speak, clock), ""
        except TimeoutError as error:
            note = f"no end within environment.timeout_s = {limit_s:g} s, {recorder.turns} turns done"
            if not recorder.length:
                raise InfrastructureError(f"reset: {note}") from error
            return Outcome.TIMED_OUT, note

    async def _converse(self, ground: Ground, recorder: Recorder, speak: Speaker, clock: _Clock) -> Outcome:
        """Alternate messages and tool results until the episode ends."""
        invalid, observation = 0, ""
        # A message needs room for at least one token beside the stop token.
        while recorder.length + 2 <= self.environment.max_tokens:
            with clock.spending("generate"):
                completion = await speak(recorder.tokens(), observation)
            recorder.say(completion)
            text = self.chat.text(completion.token_ids)
            message = parse_call(text, ground.tools, self.chat.calls, plain=ground.converses)
            with clock.spending("tools"):
                transition = await ground.step(message, recorder.turns - 1)
            recorder.book(transition)
            invalid += bool(message.error)
            if transition.done:
                return Outcome.COMPLETED
            if invalid > self.environment.max_invalid:
                return Outcome.INVALID_ACTION
            if recorder.turns >= self.environment.max_turns:
                return Outcome.TRUNCATED
            observation = self.redactor.text(transition.observation)
            bridge = self.chat.bridge(observation, transition.role)
            if not completion.stopped:
                bridge = np.concatenate([np.array([self.chat.stop_token], np.int32), bridge])
            if recorder.length + len(bridge) + 2 > self.environment.max_tokens:
                return Outcome.TRUNCATED
            recorder.show(bridge)
        return Outcome.TRUNCATED


def _heed(scores: Sequence[Score], lease: Lease) -> None:
    """Raise MonitorError when a monitor wants the run to end."""
    for score in scores:
        if score.kind is ScoreKind.HALT and score.value:
            raise MonitorError(
                f"monitor {score.name.rpartition('/')[2]} ends the run at task {lease.attempt.task} of "
                f"{lease.split}, attempt {lease.attempt.attempt}: {score.invalid}; mend the environment, or "
                "give the monitor another action, and go on with --resume"
            )


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of at most MAX_NOTE characters."""
    return " ".join(str(error).split())[:MAX_NOTE]
