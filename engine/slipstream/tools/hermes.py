"""Floor 4. The one tool call of a message; experts and demonstrations write theirs as Hermes does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.call_formats import HERMES, NOT_CLOSED, OPEN, CallFormat
from slipstream.interfaces import AssistantMessage, ToolSpec

# JSON can escape half a character; no database and no wire format takes that.
_SURROGATE = re.compile("[\ud800-\udfff]")


def format_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Return the text of one call.

    Example: ``<tool_call>{"name": "open", "arguments": {"document": "17"}}</tool_call>``.
    """
    return HERMES.write(name, arguments)


def rewritten(text: str, calls: CallFormat) -> str:
    """Return a message of an expert with its calls as `calls` writes them."""
    if calls is HERMES:
        return text
    for attempt in reversed(HERMES.read(text)):
        written = calls.write(attempt.call["name"], attempt.call["arguments"])
        text = text[: attempt.start] + written + text[attempt.end :]
    return text


def parse_call(text: str, tools: Sequence[ToolSpec], calls: CallFormat = HERMES) -> AssistantMessage:
    """Read the one call in `text`; `error` says what is wrong in the words the policy is shown."""
    attempts = calls.read(text, tools)
    if not attempts or attempts[0].fault == NOT_CLOSED:
        return AssistantMessage(text=text, error="no tool call")
    if len(attempts) > 1 or text.count(OPEN) > 1:
        return AssistantMessage(text=text, error="more than one tool call")
    if attempts[0].fault:
        return AssistantMessage(text=text, error=f"call is {attempts[0].fault}")
    call = attempts[0].call
    error = _fault(call, {tool.name: tool for tool in tools})
    if error:
        return AssistantMessage(text=text, error=error)
    return AssistantMessage(text=text, name=call["name"], arguments=call["arguments"])


def _fault(call: Any, tools: Mapping[str, ToolSpec]) -> str:
    """Return what is wrong with a decoded call, or an empty string."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or call["name"] not in tools:
        return "unknown tool"
    arguments = call.get("arguments")
    if not isinstance(arguments, dict):
        return "arguments are not an object"
    schema = tools[call["name"]].parameters
    missing = [name for name in schema["required"] if name not in arguments]
    if missing:
        return f"missing argument {missing[0]}"
    unknown = [name for name in arguments if name not in schema["properties"]]
    if unknown:
        return "unknown argument"
    if not all(isinstance(value, str) for value in arguments.values()):
        return "argument is not a string"
    if any(_SURROGATE.search(value) for value in arguments.values()):
        return "argument is not valid text"
    return ""
