"""Floor 4. What an interface that agents speak is to the gateway: a way to ask, to answer and to refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from slipstream.gateway.messages import Message
from slipstream.gateway.prompts import RawPrompt
from slipstream.gateway.rollouts import Answered, Rollout
from slipstream.interfaces import ToolSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request for the policy's next message; how it is sampled is the trainer's business."""

    model: str
    messages: tuple[Message, ...] = ()
    tools: tuple[ToolSpec, ...] = ()
    prompt: RawPrompt | None = None
    """In place of messages."""
    max_tokens: int
    stops: tuple[str, ...] = ()
    """Texts at which the answer ends."""
    stream: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the same dialect's answer needs."""


class Dialect(Protocol):
    """One interface."""

    path: str
    keep_alive: str
    """What a stream holds while the answer is being made."""

    def key(self, headers: Mapping[str, str]) -> str:
        """Return the rollout's key, or "" where there is none."""

    def read(self, given: Any, rollout: Rollout) -> Asked:
        """Return what a request's JSON asks for; raises RequestError."""

    def body(self, asked: Asked, answered: Answered, key: str) -> dict[str, Any]:
        """Return the answer as JSON."""

    def events(self, asked: Asked, body: Mapping[str, Any]) -> Iterator[str]:
        """Yield an answer as server-sent events, as if it had been sampled word by word."""

    def problem(self, status: int, code: str, message: str) -> dict[str, Any]:
        """Return a refusal as JSON."""


def bearer(headers: Mapping[str, str]) -> str:
    """Return the key of an Authorization header."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" else ""


def event(body: Mapping[str, Any], name: str = "") -> str:
    """Return one server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(body, ensure_ascii=False)}\n\n"
