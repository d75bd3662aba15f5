"""Floor 4. Tool calls in what the policy sampled, for the tools that a request brought.

A call is written as the policy writes it (call_formats.py). What is no valid call stays text that the agent
reads, with the reason beside it: a policy that cannot call is judged by its agent, not by the parser alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slipstream.call_formats import Attempt, CallFormat
from slipstream.gateway.messages import Message, RequestError, canonical
from slipstream.interfaces import ToolSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One sampled message, read."""

    text: str
    """What stands outside of valid calls."""
    calls: tuple[tuple[str, str], ...] = ()
    """Name, and arguments as JSON, of each valid call."""
    faults: tuple[str, ...] = ()
    """Why something that begins as a call is none."""
    faulty: tuple[tuple[int, int], ...] = ()
    """Where in the sampled text each of these stands."""


def read_tools(given: Any) -> tuple[ToolSpec, ...]:
    """Return the tools of an OpenAI chat request; raises RequestError."""
    if given is None:
        return ()
    if not isinstance(given, list):
        raise RequestError("tools: expected a list of functions")
    return tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(given))


def read_answer(text: str, tools: Sequence[ToolSpec], form: CallFormat) -> Answer:
    """Return text and calls of a sampled message."""
    known = {tool.name: tool for tool in tools}
    calls: list[tuple[str, str]] = []
    faults: list[str] = []
    faulty: list[tuple[int, int]] = []
    outside, kept = "", 0
    for attempt in form.read(text, tools):
        name, arguments, fault = _call(attempt, known)
        if fault:
            faults.append(fault)
            faulty.append((attempt.start, attempt.end))
            continue
        calls.append((name, arguments))
        outside, kept = outside + text[kept : attempt.start], attempt.end
    outside += text[kept:]
    return Answer(text=outside.strip(), calls=tuple(calls), faults=tuple(faults), faulty=tuple(faulty))


def written(message: Message, form: CallFormat) -> str:
    """Return a message's text as the policy would have said it, calls behind the words."""
    calls = [form.write(call.name, _object(call.arguments)) for call in message.calls]
    return "\n".join([*([message.text] if message.text else []), *calls])


def _tool(given: Any, where: str) -> ToolSpec:
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where}: expected type function with function.name and function.parameters")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping) or not isinstance(parameters.get("properties", {}), Mapping):
        raise RequestError(f"{where}.function.parameters: expected a JSON schema of an object")
    schema = {"properties": {}, "required": [], **parameters}
    return ToolSpec(
        name=function["name"], description=str(function.get("description") or ""), parameters=schema
    )


def _call(attempt: Attempt, tools: Mapping[str, ToolSpec]) -> tuple[str, str, str]:
    """Return name, arguments and an empty fault, or why it is no call."""
    if attempt.fault:
        return "", "", attempt.fault
    call = attempt.call
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        return "", "", "without arguments"
    name = call.get("name")
    if not isinstance(name, str) or name not in tools:
        return "", "", "an unknown tool"
    missing = [key for key in tools[name].parameters["required"] if key not in call["arguments"]]
    if missing:
        return "", "", f"without {missing[0]}"
    return name, canonical(json.dumps(call["arguments"])), ""


def _object(arguments: str) -> dict[str, Any]:
    try:
        read = json.loads(arguments)
    except (ValueError, RecursionError):
        return {"arguments": arguments}
    return read if isinstance(read, dict) else {"arguments": read}
