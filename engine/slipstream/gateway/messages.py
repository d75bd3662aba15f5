"""Floor 4. Messages of a chat as a client sends them, in the one form in which two can be compared.

Clients send back what they were given, but not byte for byte: arguments of calls are parsed and written
again, contents come as a string or as parts, empty ones as null, ids of calls are made up anew. Some break
what spells a control token, such as <|end|>, with a zero-width joiner that no reader sees; some take thoughts
out of their tags and put them back with other blanks around; some leave out an answer that says nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from slipstream.errors import UserError

ROLES: Final = frozenset({"system", "user", "assistant", "tool"})
_JOINER: Final = "\u200d"
_THOUGHTS: Final = re.compile(r"\s*(</?think>)\s*")
_SAME_ROLE: Final = {"developer": "system", "function": "tool"}


class RequestError(UserError):
    """A request that is not what the interface says; the gateway answers 400 with the sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A tool call of the policy."""

    name: str
    arguments: str
    """JSON with sorted keys and no spaces; what is no JSON as it was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message; equal messages say the same, whatever their bytes were."""

    role: str
    text: str = ""
    calls: tuple[Call, ...] = ()


def read_messages(given: Any) -> tuple[Message, ...]:
    """Return the messages of an OpenAI chat request; raises RequestError."""
    if not isinstance(given, list) or not given:
        raise RequestError(f"messages: expected a list of at least one message, got {_short(given)}")
    return tuple(_message(one, f"messages[{index}]") for index, one in enumerate(given))


def canonical(arguments: str) -> str:
    """Return a call's arguments in the form in which equal ones are equal."""
    try:
        read = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return json.dumps(read, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def told_again(conversation: Sequence[Message], messages: Sequence[Message]) -> int:
    """Return how many of `messages` tell a conversation, which ends with an answer, again.

    0 where they do not go on from it. An answer that says nothing may be left out where others go on.
    """
    *asked, answer = conversation
    if not _begins(messages, asked):
        return 0
    if _begins(messages[len(asked) :], [answer]):
        return len(conversation)
    next_role = messages[len(asked)].role if len(messages) > len(asked) else "assistant"
    return len(asked) if not answer.text and not answer.calls and next_role != "assistant" else 0


def _begins(messages: Sequence[Message], conversation: Sequence[Message]) -> bool:
    return len(conversation) <= len(messages) and all(
        one == other or _as_read(one) == _as_read(other)
        for one, other in zip(conversation, messages, strict=False)
    )


def _as_read(message: Message) -> Message:
    """Return what the policy said as a reader sees it; what others say is compared as it stands."""
    if message.role != "assistant":
        return message
    calls = tuple(replace(call, arguments=call.arguments.replace(_JOINER, "")) for call in message.calls)
    text = _THOUGHTS.sub(r"\1", message.text.replace(_JOINER, ""))
    return replace(message, text=text, calls=calls)


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, Mapping):
        raise RequestError(f"{where}: expected an object with role and content, got {_short(given)}")
    role = given.get("role")
    role = _SAME_ROLE.get(str(role), role)
    if role not in ROLES:
        raise RequestError(f"{where}.role: expected one of {', '.join(sorted(ROLES))}, got {_short(role)}")
    calls = given.get("tool_calls") or []
    if not isinstance(calls, list) or (calls and role != "assistant"):
        raise RequestError(f"{where}.tool_calls: expected a list, in an assistant's message only")
    return Message(
        role=role,
        text=_text(given.get("content"), f"{where}.content"),
        calls=tuple(_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)),
    )


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where}: expected text or a list of parts, got {_short(content)}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{index}]: expected a part of type text, got {_short(kind or part)}")
        texts.append(part["text"])
    return "".join(texts)


def _call(given: Any, where: str) -> Call:
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where}.function: expected an object with name and arguments")
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    return Call(name=function["name"], arguments=canonical(arguments))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
