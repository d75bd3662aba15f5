"""Floor 4. Rollouts of agents outside: who holds which key, and what each of its calls became.

opened ── calls … ── finished ── forgotten

A key is one rollout. Its calls are answered one after another, in the order in which they came; whatever was
sampled stands in its graph before the agent reads it. Of a rollout that is forgotten the key is still known
for a while, so that a late call is told so.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from slipstream.chat import Chat, Said
from slipstream.errors import UserError
from slipstream.gateway.calls import Answer, read_answer, written
from slipstream.gateway.graph import Graph, Turn
from slipstream.gateway.messages import Call, Message, RequestError
from slipstream.gateway.prompts import RawPrompt, cut, prompt_tokens
from slipstream.interfaces import InferenceBackend, ToolSpec
from slipstream.types import Completion, Int32Array, Sampling

_REMEMBERED: Final = 256
"""Answers that a repeated request is given again."""
_KEYS_KNOWN: Final = 1 << 16
"""Of rollouts that are over."""


class FinishedError(RequestError):
    """The rollout has ended; the gateway answers 409."""


class TooLongError(RequestError):
    """The prompt leaves no room for an answer; the gateway answers 400, context_length_exceeded."""


class NoTaskError(UserError):
    """There is no task for an agent outside; the gateway answers 503."""


class TooManyCallsError(RequestError):
    """The rollout has had all its calls; the gateway answers 400, too_many_calls."""


@dataclass(slots=True, kw_only=True, eq=False)
class Rollout:
    """One agent's episode."""

    key: str
    task: Mapping[str, Any]
    """What an agent outside is told of its task."""
    backend: InferenceBackend
    sampling: Sampling
    """As the trainer says, whatever the agent asks for."""
    number: int
    """Keys the backend's cache and random numbers."""
    graph: Graph = field(default_factory=Graph)
    rewards: list[float] = field(default_factory=list)
    finished: bool = False
    said: list[tuple[int, Answer]] = field(default_factory=list)
    """(call, what was read out of its answer)."""
    denied: str = ""
    """"too long" or "too many calls": why the agent could not go on."""
    generate_s: float = 0.0
    """Seconds in which the policy sampled for it."""
    spans: list[tuple[float, float]] = field(default_factory=list)
    """When each call was handed to the policy and when it was answered, on the monotonic clock."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    answered: OrderedDict[str, asyncio.Task[dict[str, Any]]] = field(default_factory=OrderedDict)
    """Idempotency key -> the answer that is or was being made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A call of the policy, and what was read out of it."""

    turn: Turn
    answer: Answer
    cut: str = ""
    """The text at which it ended, where the agent named one."""
    pieces: tuple[str, ...] = ()
    """Of a raw prompt's answer: the text of each token."""


class Rollouts:
    """Opens, finds and serves rollouts in one chat format.

    Example: ``rollout = rollouts.open(backend, sampling, number=0)``; ``await rollouts.ask(rollout, messages,
    tools, max_tokens=64)``.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        max_tokens: int,
        max_calls: int,
        mask_malformed: bool = False,
        redact: Callable[[str], str] = str,
    ) -> None:
        """Bound each prompt with its answer by `max_tokens`, and a rollout's calls by `max_calls`.

        With `mask_malformed` the tokens of calls that are none are not trained; `redact` takes secrets out
        of what the policy is shown.
        """
        self._chat, self._max_tokens, self._max_calls = chat, max_tokens, max_calls
        self._mask_malformed = mask_malformed
        self._redact = redact
        self._rollouts: dict[str, Rollout] = {}
        self._over: OrderedDict[str, None] = OrderedDict()

    def open(
        self,
        backend: InferenceBackend,
        sampling: Sampling,
        *,
        number: int,
        key: str = "",
        task: Mapping[str, Any] | None = None,
    ) -> Rollout:
        """Begin a rollout under a key, or a new random one; raises FinishedError for a key in use."""
        key = key or f"rollout-{secrets.token_urlsafe(16)}"
        if key in self._rollouts or key in self._over:
            raise FinishedError(f"rollout {key}: its key is taken; give another, or none")
        rollout = Rollout(key=key, task=task or {}, backend=backend, sampling=sampling, number=number)
        self._rollouts[key] = rollout
        return rollout

    def rename(self, rollout: Rollout, key: str) -> None:
        """Give a rollout another key; raises FinishedError for one in use."""
        if key in self._rollouts or key in self._over:
            raise FinishedError(f"rollout {key}: its key is taken; give another, or none")
        self._rollouts[key] = self._rollouts.pop(rollout.key)
        rollout.key = key

    def find(self, key: str) -> Rollout | None:
        """Return the rollout of a key, or None; raises FinishedError for one that is over."""
        if key in self._over:
            raise FinishedError(f"rollout {key}: it is finished; open another")
        return self._rollouts.get(key)

    def finish(self, rollout: Rollout) -> None:
        """End a rollout: it is asked nothing more."""
        rollout.finished = True
        rollout.ended.set()
        rollout.backend.release(rollout.number)

    def forget(self, rollout: Rollout) -> None:
        """Let a finished rollout go; its key stays known for a while."""
        self._rollouts.pop(rollout.key, None)
        self._over[rollout.key] = None
        while len(self._over) > _KEYS_KNOWN:
            self._over.popitem(last=False)

    async def ask(
        self,
        rollout: Rollout,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
        *,
        max_tokens: int,
        stops: Sequence[str] = (),
    ) -> Answered:
        """Let the policy answer a conversation up to one of `stops`, and note it.

        Raises FinishedError, TooLongError, TooManyCallsError.
        """
        async with self._turn_of(rollout):
            prompt_P = self._prompt(rollout.graph, messages, tools)
            sampled = await self._sampled(rollout, prompt_P, "messages", max_tokens)
            completion, text, stop = cut(sampled, stops, self._chat)
            answer = read_answer(text, tools, self._chat.calls)
            said = Message(
                role="assistant",
                text=answer.text,
                calls=tuple(Call(name=name, arguments=arguments) for name, arguments in answer.calls),
            )
            faulty = answer.faulty if self._mask_malformed else ()
            masked = [self._chat.span(completion.token_ids, *place) for place in faulty]
            turn = rollout.graph.add(prompt_P, completion, [*messages, said], untrained=masked)
            rollout.said.append((turn.index, answer))
            return Answered(turn=turn, answer=answer, cut=stop)

    async def complete(
        self, rollout: Rollout, prompt: RawPrompt, *, max_tokens: int, stops: Sequence[str] = ()
    ) -> Answered:
        """Let the policy go on from a raw prompt up to one of `stops`, and note it.

        Raises RequestError for tokens the model does not know, FinishedError, TooLongError,
        TooManyCallsError.
        """
        async with self._turn_of(rollout):
            prompt_P = prompt_tokens(prompt, rollout.graph, self._chat, redact=self._redact)
            sampled = await self._sampled(rollout, prompt_P, "prompt", max_tokens)
            completion, text, stop = cut(sampled, stops, self._chat)
            turn = rollout.graph.add(prompt_P, completion, (), raw=prompt if isinstance(prompt, str) else "")
            answer = Answer(text=text)
            rollout.said.append((turn.index, answer))
            pieces = tuple(self._chat.decode(token) for token in completion.token_ids[:, None])
            return Answered(turn=turn, answer=answer, cut=stop, pieces=pieces)

    def count(self, rollout: Rollout, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> int:
        """Return the tokens of the prompt that these messages would make."""
        return len(self._prompt(rollout.graph, messages, tools))

    @asynccontextmanager
    async def _turn_of(self, rollout: Rollout) -> AsyncIterator[None]:
        """Wait until the rollout's earlier calls are answered; raises FinishedError."""
        async with rollout.lock:
            if rollout.finished:
                raise FinishedError(f"rollout {rollout.key}: it is finished; open another")
            yield

    async def _sampled(
        self, rollout: Rollout, prompt_P: Int32Array, asked: str, max_tokens: int
    ) -> Completion:
        """Let the policy sample, within all bounds; `asked` names what a prompt too long was made of."""
        room = self._room(rollout, prompt_P, asked)
        most = max(1, min(max_tokens, rollout.sampling.max_tokens, room))
        sampling = replace(rollout.sampling, max_tokens=most)
        began = time.monotonic()
        completion = await rollout.backend.generate(prompt_P, sampling, rollout_id=rollout.number)
        rollout.spans.append((began, time.monotonic()))
        rollout.generate_s += rollout.spans[-1][1] - began
        return completion

    def _room(self, rollout: Rollout, prompt_P: Int32Array, asked: str) -> int:
        """Return how many tokens an answer may have; raises TooLongError, TooManyCallsError."""
        if len(rollout.graph.turns) >= self._max_calls:
            rollout.denied = "too many calls"
            raise TooManyCallsError(
                f"rollout {rollout.key}: it has had its {self._max_calls} calls (environment.max_turns); "
                f"finish it"
            )
        room = self._max_tokens - len(prompt_P)
        if room < 2:
            rollout.denied = "too long"
            raise TooLongError(
                f"{asked}: {len(prompt_P)} tokens leave no room for an answer, expected at most "
                f"{self._max_tokens - 2}; shorten what is sent"
            )
        return room

    def _prompt(self, graph: Graph, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Int32Array:
        """Return the tokens of a conversation: what was sampled verbatim, and only the rest rendered."""
        before, told = graph.latest_before(messages)
        if before is None:
            return self._chat.conversation(self._said(messages), tools)
        more = self._chat.continuation(self._said(messages[told:]))
        stop = [] if before.completion.stopped else [self._chat.stop_token]
        return np.concatenate([before.tokens_T, np.array(stop, np.int32), more])

    def remember(self, rollout: Rollout, idempotency: str, answer: asyncio.Task[dict[str, Any]]) -> None:
        """Keep an answer for a request that comes again."""
        rollout.answered[idempotency] = answer
        while len(rollout.answered) > _REMEMBERED:
            rollout.answered.popitem(last=False)

    def _said(self, messages: Sequence[Message]) -> list[Said]:
        return [Said(role=one.role, text=self._redact(written(one, self._chat.calls))) for one in messages]
