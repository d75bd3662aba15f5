"""Floor 4. Hermes-style tool calls: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.interfaces import AssistantMessage, ToolSpec

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
# JSON can escape half a character; no database and no wire format takes that.
_SURROGATE = re.compile("[\ud800-\udfff]")


def format_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Return the text of one call.

    Example: ``<tool_call>{"name": "open", "arguments": {"document": "17"}}</tool_call>``.
    """
    return f"{OPEN}{json.dumps({'name': name, 'arguments': dict(arguments)}, ensure_ascii=False)}{CLOSE}"


def parse_call(text: str, tools: Sequence[ToolSpec]) -> AssistantMessage:
    """Read the one call in `text`; `error` says what is wrong in the words the policy is shown."""
    start, end = text.find(OPEN), text.find(CLOSE)
    if start < 0 or end < start:
        return AssistantMessage(text=text, error="no tool call")
    if text.find(OPEN, start + 1) >= 0:
        return AssistantMessage(text=text, error="more than one tool call")
    try:
        call = json.loads(text[start + len(OPEN) : end])
    except (ValueError, RecursionError):
        return AssistantMessage(text=text, error="call is not JSON")
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
