"""Floor 4. Rollouts of agents outside: who holds which key, and what each of its calls became.

opened ── calls … ── finished          A key is one rollout. Its calls are answered one after another,
   │                                   in the order in which they came; whatever was sampled stands in
   └── abandoned after `longest_s`     its graph before the agent reads it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from slipstream.chat import Chat, Said
from slipstream.gateway.calls import Answer, read_answer, written
from slipstream.gateway.graph import Graph, Turn
from slipstream.gateway.messages import Call, Message, RequestError
from slipstream.interfaces import InferenceBackend, ToolSpec
from slipstream.types import Int32Array, Sampling

_REMEMBERED: Final = 256
"""Answers that a repeated request is given again."""


class FinishedError(RequestError):
    """The rollout has ended; the gateway answers 409."""


class TooLongError(RequestError):
    """The prompt leaves no room for an answer; the gateway answers 400, context_length_exceeded."""


@dataclass(slots=True, kw_only=True, eq=False)
class Rollout:
    """One agent's episode."""

    key: str
    number: int
    """Keys the backend's cache and random numbers."""
    graph: Graph = field(default_factory=Graph)
    rewards: list[float] = field(default_factory=list)
    finished: bool = False
    opened_s: float = field(default_factory=time.monotonic)
    faults: list[tuple[int, str]] = field(default_factory=list)
    """(call, why what looked like a tool call was none)."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    answered: OrderedDict[str, asyncio.Task[dict[str, Any]]] = field(default_factory=OrderedDict)
    """Idempotency key -> the answer that is or was being made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A call of the policy, and what was read out of it."""

    turn: Turn
    answer: Answer


class Rollouts:
    """Opens, finds and serves rollouts over one backend.

    Example: ``rollout = rollouts.open()``; ``await rollouts.ask(rollout, messages, tools, max_tokens=64)``.
    """

    def __init__(self, chat: Chat, backend: InferenceBackend, *, sampling: Sampling, max_tokens: int) -> None:
        """Sample as `sampling` says, whatever agents ask for; `max_tokens` of a prompt and its answer."""
        self._chat, self._backend, self._sampling, self._max_tokens = chat, backend, sampling, max_tokens
        self._rollouts: dict[str, Rollout] = {}
        self._next = 0

    def open(self, key: str = "") -> Rollout:
        """Begin a rollout under a key, or a new random one; raises RequestError for a key in use."""
        key = key or f"rollout-{secrets.token_urlsafe(16)}"
        if key in self._rollouts:
            raise FinishedError(f"rollout {key}: it exists; open another, or finish it first")
        rollout = Rollout(key=key, number=self._next)
        self._next += 1
        self._rollouts[key] = rollout
        return rollout

    def find(self, key: str) -> Rollout | None:
        """Return the rollout of a key."""
        return self._rollouts.get(key)

    def finish(self, rollout: Rollout) -> None:
        """End a rollout: it is asked nothing more."""
        rollout.finished = True
        self._backend.release(rollout.number)

    def forget(self, rollout: Rollout) -> None:
        """Let a finished rollout's key go."""
        self._rollouts.pop(rollout.key, None)

    async def ask(
        self, rollout: Rollout, messages: Sequence[Message], tools: Sequence[ToolSpec], *, max_tokens: int
    ) -> Answered:
        """Let the policy answer a conversation, and note it; raises FinishedError, TooLongError."""
        async with rollout.lock:
            if rollout.finished:
                raise FinishedError(f"rollout {rollout.key}: it is finished; open another")
            prompt_P = self._prompt(rollout.graph, messages, tools)
            room = self._max_tokens - len(prompt_P)
            if room < 2:
                raise TooLongError(
                    f"messages: {len(prompt_P)} tokens leave no room for an answer, expected at most "
                    f"{self._max_tokens - 2}; shorten the conversation"
                )
            sampling = Sampling(
                temperature=self._sampling.temperature,
                top_p=self._sampling.top_p,
                max_tokens=max(1, min(max_tokens, self._sampling.max_tokens, room)),
            )
            completion = await self._backend.generate(prompt_P, sampling, rollout_id=rollout.number)
            answer = read_answer(self._chat.text(completion.token_ids), tools)
            said = Message(
                role="assistant",
                text=answer.text,
                calls=tuple(Call(name=name, arguments=arguments) for name, arguments in answer.calls),
            )
            turn = rollout.graph.add(prompt_P, completion, [*messages, said])
            rollout.faults += [(turn.index, fault) for fault in answer.faults]
            return Answered(turn=turn, answer=answer)

    def count(self, rollout: Rollout, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> int:
        """Return the tokens of the prompt that these messages would make."""
        return len(self._prompt(rollout.graph, messages, tools))

    def _prompt(self, graph: Graph, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Int32Array:
        """Return the tokens of a conversation: what was sampled verbatim, and only the rest rendered."""
        before = graph.latest_before(messages)
        if before is None:
            return self._chat.conversation(_said(messages), tools)
        more = self._chat.continuation(_said(messages[len(before.conversation) :]))
        stop = [] if before.completion.stopped else [self._chat.stop_token]
        return np.concatenate([before.tokens_T, np.array(stop, np.int32), more])

    def remember(self, rollout: Rollout, idempotency: str, answer: asyncio.Task[dict[str, Any]]) -> None:
        """Keep an answer for a request that comes again."""
        rollout.answered[idempotency] = answer
        while len(rollout.answered) > _REMEMBERED:
            rollout.answered.popitem(last=False)


def _said(messages: Sequence[Message]) -> list[Said]:
    return [Said(role=one.role, text=written(one)) for one in messages]
