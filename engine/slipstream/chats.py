"""Floor 4. A warm start from conversations of one's own: JSONL in OpenAI's form, as the run renders its own.

    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": "Where is 17?"},
                  {"role": "assistant", "tool_calls": [{"function": {"name": "track", "arguments": "..."}}]},
                  {"role": "tool", "content": "Oslo"},
                  {"role": "assistant", "content": "In Oslo."}]}

Only what the assistant said is trained, its stop tokens included. Calls are written as the policy writes
them and checked against the tools of the environment, whose list stands in the prompt: nothing is imitated
that an episode would refuse. What follows the last message of the assistant is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from slipstream import plain_json
from slipstream.chat import Chat, Said
from slipstream.config import EnvironmentConfig
from slipstream.episodes import UNSENT
from slipstream.errors import ConfigurationError
from slipstream.interfaces import Conversing, Environment, Observation
from slipstream.tools.hermes import parse_call
from slipstream.types import Int32Array, Outcome, Sampling, Split, TaskAttempt, Trajectory

KEY: Final = "warmup.chats"
ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message."""

    role: str
    text: str
    call: tuple[str, dict[str, Any]] | None = None
    """Name and arguments of the tool that an assistant's message calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One line of the file."""

    place: str
    messages: tuple[Message, ...]
    """[system,] user, assistant, (tool or user, one or more, assistant)..."""

    def texts(self) -> Iterator[str]:
        """Yield its text, for a tokenizer to be trained on."""
        for message in self.messages:
            yield message.text


def read_chats(path: str | Path) -> list[Conversation]:
    """Return the conversations of a file; raises ConfigurationError naming file, line and message."""
    file = Path(path)
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigurationError(f"{KEY}: {file} cannot be read: {error.strerror}") from None
    found = [
        _conversation(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not found:
        raise ConfigurationError(f"{KEY}: expected conversations in {file}, found none")
    return found


def rendered(
    conversations: Sequence[Conversation], chat: Chat, environment: Environment, config: EnvironmentConfig
) -> list[Trajectory]:
    """Return each conversation as an episode of the environment, its assistant's tokens marked as sampled.

    Raises ConfigurationError for a call that the environment would refuse, and for one that is too long.
    """
    return [_rendered(one, chat, environment, config) for one in conversations]


def _rendered(
    one: Conversation, chat: Chat, environment: Environment, config: EnvironmentConfig
) -> Trajectory:
    converses = isinstance(environment, Conversing) and environment.converses
    opening = 1 if one.messages[0].role == "user" else 2
    system = one.messages[0].text if opening == 2 else ""
    shown = Observation(system=system, user=one.messages[opening - 1].text)
    prompt = chat.prompt(shown, environment.tools, schemas=config.tool_schemas, converses=converses)
    parts: list[tuple[Int32Array, int]] = [(prompt, -1)]
    between, turn = list[Said](), 0
    for number, message in enumerate(one.messages[opening:], opening):
        if message.role != "assistant":
            between.append(Said(role=message.role, text=message.text))
            continue
        if between:
            parts.append((_bridged(chat, between), -1))
            between = []
        text = message.text + (chat.calls.write(*message.call) if message.call else "")
        error = parse_call(text, environment.tools, chat.calls, plain=converses).error
        if error:
            raise ConfigurationError(
                f"{one.place}: message {number} would be refused in an episode ({error}); correct it, or "
                "remove the line"
            )
        parts.append((chat.message(text), turn))
        turn += 1
    return _trajectory(one, parts, turn, config)


def _bridged(chat: Chat, said: Sequence[Said]) -> Int32Array:
    if len(said) == 1:
        return chat.bridge(said[0].text, said[0].role)
    return chat.continuation(said)


def _trajectory(
    one: Conversation, parts: Sequence[tuple[Int32Array, int]], turns: int, config: EnvironmentConfig
) -> Trajectory:
    turn_T = np.concatenate([np.full(len(tokens), turn, np.int16) for tokens, turn in parts])
    if len(turn_T) > config.max_tokens:
        raise ConfigurationError(
            f"{one.place}: expected at most environment.max_tokens = {config.max_tokens} tokens, got "
            f"{len(turn_T)}; raise that, or remove the line"
        )
    sampled = turn_T >= 0
    return Trajectory(
        identity=UNSENT,
        attempt=TaskAttempt(task=0, seed=0, group=0, attempt=0),
        split=Split.TRAIN,
        evaluation=-1,
        issue=0,
        token_ids=np.concatenate([tokens for tokens, _ in parts]).astype(np.int32),
        loss_mask=sampled.astype(np.uint8),
        behavior_logprobs=np.zeros(len(turn_T), dtype=np.float32),
        versions=np.where(sampled, 0, -1).astype(np.int32),
        turns=turn_T,
        turn_rewards=np.zeros(turns, dtype=np.float32),
        scores=(),
        outcome=Outcome.COMPLETED,
        tool_calls=(),
        sampling=Sampling(),
    )


def _conversation(line: bytes, place: str) -> Conversation:
    try:
        said = plain_json.parse(line)
    except ValueError as error:
        raise ConfigurationError(
            f"{place}: expected a JSON object, got a line that is none ({error})"
        ) from None
    messages = said.get("messages") if isinstance(said, dict) else None
    if not isinstance(messages, list):
        raise ConfigurationError(f'{place}: expected a list under "messages", got {type(messages).__name__}')
    read = [_message(one, f"{place}: message {number}") for number, one in enumerate(messages)]
    while read and read[-1].role != "assistant":
        read.pop()
    roles = [message.role for message in read]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if body[:2] != ["user", "assistant"] or "system" in body:
        raise ConfigurationError(
            f"{place}: expected messages of (system,) user, assistant and then others, got "
            f"{', '.join(roles) or 'none of the assistant'}"
        )
    if any(one == other == "assistant" for one, other in pairwise(body)):
        raise ConfigurationError(
            f"{place}: expected somebody between two messages of the assistant, got nobody"
        )
    return Conversation(place=place, messages=tuple(read))


def _message(one: Any, place: str) -> Message:
    role = ROLES.get(str(one.get("role"))) if isinstance(one, Mapping) else None
    if role is None:
        raise ConfigurationError(f"{place}: expected a role of {', '.join(ROLES)}, got {_short(one)}")
    text = _text(one.get("content"), place)
    calls = one.get("tool_calls") or []
    if not isinstance(calls, list) or len(calls) > 1 or (calls and role != "assistant"):
        raise ConfigurationError(
            f"{place}: expected at most one tool call, and of the assistant, as a policy makes them, got "
            f"{_short(calls)}"
        )
    return Message(role=role, text=text, call=_call(calls[0], place) if calls else None)


def _text(content: Any, place: str) -> str:
    """Return text, or that of OpenAI's parts of text."""
    if content is None:
        return ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or any(
        not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str)
        for part in parts
    ):
        raise ConfigurationError(f"{place}: expected text as content, got {_short(content)}")
    return "".join(part["text"] for part in parts)


def _call(call: Any, place: str) -> tuple[str, dict[str, Any]]:
    function = call.get("function") if isinstance(call, Mapping) else None
    try:
        name, arguments = function["name"], function["arguments"]  # type: ignore[index]
        arguments = plain_json.parse(arguments) if isinstance(arguments, str) else arguments
    except (TypeError, KeyError, ValueError):
        name, arguments = None, None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ConfigurationError(
            f'{place}: expected a call of "function" with "name" and "arguments" in JSON, got {_short(call)}'
        )
    return name, arguments


def _short(value: object) -> str:
    return repr(value)[:80]
