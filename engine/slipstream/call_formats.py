"""Floor 2. How models write tool calls: each way reads what was sampled and writes what would have been.

name          call
hermes        <tool_call>{"name": "open", "arguments": {"document": "17"}}</tool_call>
qwen3.5       <tool_call><function=open><parameter=document>17</parameter></function></tool_call>, a line each
llama3        {"name": "open", "parameters": {"document": "17"}}, the whole message; several behind semicolons

A reader finds every attempt, those that fail too, and where in the text it stands. It judges the syntax only:
whether there is such a tool, with such arguments, is for whoever runs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from slipstream.interfaces import ToolSpec

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"
NOT_JSON: Final = "not JSON"
NOT_CLOSED: Final = "not closed"
NO_FUNCTION: Final = "without a function"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What begins as a call."""

    start: int
    end: int
    """Behind its last character."""
    call: Any = None
    """As decoded, normally {"name", "arguments"}."""
    fault: str = ""
    """Why it could not be decoded."""


class CallFormat(Protocol):
    """One way to write calls."""

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return a call's text."""

    def read(self, text: str, tools: Sequence[ToolSpec] = ()) -> list[Attempt]:
        """Return all attempts in their order; `tools` say of which type arguments are."""


class Hermes:
    """JSON between tags."""

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return a call's text."""
        body = json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False)
        return f"{OPEN}{body}{CLOSE}"

    def read(self, text: str, tools: Sequence[ToolSpec] = ()) -> list[Attempt]:
        """Return all attempts."""
        return [
            Attempt(start=start, end=end, **_decoded(body)) if closed else _unclosed(start, end)
            for start, end, body, closed in _tagged(text)
        ]


class Qwen35:
    """Tags for the function and each parameter; a value is text, or JSON where its schema is no string."""

    _FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
    _PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return a call's text."""
        values = {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in arguments.items()
        }
        lines = [f"<parameter={key}>\n{value}\n</parameter>" for key, value in values.items()]
        return "\n".join([OPEN, f"<function={name}>", *lines, "</function>", CLOSE])

    def read(self, text: str, tools: Sequence[ToolSpec] = ()) -> list[Attempt]:
        """Return all attempts."""
        known = {tool.name: tool.parameters.get("properties", {}) for tool in tools}
        return [
            self._attempt(start, end, body, known) if closed else _unclosed(start, end)
            for start, end, body, closed in _tagged(text)
        ]

    def _attempt(self, start: int, end: int, body: str, known: Mapping[str, Any]) -> Attempt:
        found = self._FUNCTION.fullmatch(body)
        if found is None:
            return Attempt(start=start, end=end, fault=NO_FUNCTION)
        types = known.get(found[1], {})
        arguments = {key: _value(text, types.get(key)) for key, text in self._PARAMETER.findall(found[2])}
        return Attempt(start=start, end=end, call={"name": found[1], "arguments": arguments})


class Llama3:
    """A message that is JSON and nothing else."""

    _TAG = "<|python_tag|>"

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return a call's text."""
        return json.dumps({"name": name, "parameters": dict(arguments)}, ensure_ascii=False)

    def read(self, text: str, tools: Sequence[ToolSpec] = ()) -> list[Attempt]:
        """Return all attempts; an object that names no function is an answer, not one of them."""
        attempts: list[Attempt] = []
        at = len(text) - len(text.lstrip().removeprefix(self._TAG).lstrip())
        decoder = json.JSONDecoder()
        while text.startswith("{", at):
            try:
                call, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError):
                return [*attempts, Attempt(start=at, end=len(text), fault=NOT_JSON)]
            if "name" not in call:
                return attempts
            arguments = call.get("parameters", call.get("arguments"))
            attempts.append(Attempt(start=at, end=end, call={"name": call["name"], "arguments": arguments}))
            behind = text[end:].lstrip("; \n")
            at = len(text) - len(behind)
        return attempts


HERMES: Final = Hermes()
CALL_FORMATS: Final[Mapping[str, CallFormat]] = {"hermes": HERMES, "qwen3.5": Qwen35(), "llama3": Llama3()}


def _tagged(text: str) -> list[tuple[int, int, str, bool]]:
    """Return (start, end, body, closed) of each pair of tags; one that is not closed is the last."""
    found: list[tuple[int, int, str, bool]] = []
    start = text.find(OPEN)
    while start >= 0:
        inner = start + len(OPEN)
        close = text.find(CLOSE, inner)
        if close < 0:
            return [*found, (start, len(text), text[inner:], False)]
        end = close + len(CLOSE)
        found.append((start, end, text[inner:close], True))
        start = text.find(OPEN, end)
    return found


def _decoded(body: str) -> dict[str, Any]:
    try:
        return {"call": json.loads(body)}
    except (ValueError, RecursionError):
        return {"fault": NOT_JSON}


def _unclosed(start: int, end: int) -> Attempt:
    return Attempt(start=start, end=end, fault=NOT_CLOSED)


def _value(text: str, schema: Any) -> Any:
    """Return a parameter's value; text that is no JSON stays text, for the tool to refuse."""
    if not isinstance(schema, Mapping) or schema.get("type") in (None, "string"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
