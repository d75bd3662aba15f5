"""Floor 4. The one tool call of a message; experts and demonstrations write theirs as Hermes does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from slipstream.call_formats import HERMES, NOT_CLOSED, OPEN, CallFormat
from slipstream.interfaces import AssistantMessage, ToolSpec
from slipstream.tools import wording

_SAY_NO_MORE: Final = {"type", "title", "description"}
"""Keys of a schema with which any string will do."""
_LONGEST_REASON: Final = 200

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


def parse_call(
    text: str, tools: Sequence[ToolSpec], calls: CallFormat = HERMES, *, plain: bool = False
) -> AssistantMessage:
    """Read the one call in `text`; `error` says what is wrong in the words the policy is shown.

    plain: whether a message without a call is one too.
    """
    attempts = calls.read(text, tools)
    if not attempts and plain:
        return AssistantMessage(text=text)
    if not attempts or attempts[0].fault == NOT_CLOSED:
        return AssistantMessage(text=text, error=wording.NO_CALL)
    if len(attempts) > 1 or text.count(OPEN) > 1:
        return AssistantMessage(text=text, error=wording.MORE_THAN_ONE)
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
        return wording.UNKNOWN_TOOL
    arguments = call.get("arguments")
    if not isinstance(arguments, dict):
        return wording.NO_OBJECT
    schema = tools[call["name"]].parameters
    missing = [name for name in schema.get("required", ()) if name not in arguments]
    if missing:
        return wording.MISSING.format(missing[0])
    known = schema.get("properties", {})
    unknown = [name for name in arguments if name not in known]
    if unknown:
        return wording.UNKNOWN_ARGUMENT
    for name, value in arguments.items():
        wanted = known[name]
        if wanted.get("type") == "string" and wanted.keys() <= _SAY_NO_MORE:
            if not isinstance(value, str):
                return wording.NO_STRING
        elif reason := _mismatch(value, wanted):
            return f"argument {name}: {reason}"
    spelled = json.dumps(arguments, ensure_ascii=False)
    return wording.NO_TEXT if _SURROGATE.search(spelled) else ""


def _mismatch(value: Any, schema: Mapping[str, Any]) -> str:
    """Return in what a value is not as its JSON schema says, or an empty string."""
    faults = best_match(_validator(json.dumps(schema)).iter_errors(value))
    return "" if faults is None else " ".join(faults.message.split())[:_LONGEST_REASON]


@lru_cache(maxsize=4096)
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(schema))
