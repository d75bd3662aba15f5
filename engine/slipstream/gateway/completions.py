"""Floor 4. OpenAI's chat completions: what a request asks for, and its answer whole or as events."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from slipstream.gateway.calls import read_tools
from slipstream.gateway.messages import Message, RequestError, read_messages
from slipstream.gateway.rollouts import Answered
from slipstream.interfaces import ToolSpec

_MOST_TOKENS: Final = 1 << 30
_DONE: Final = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A chat completion that is asked for; how it is sampled is the trainer's business."""

    model: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    max_tokens: int
    stream: bool
    usage: bool
    """Whether a stream ends with the usage."""


def read_request(given: Any) -> Request:
    """Return a request; raises RequestError."""
    if not isinstance(given, Mapping):
        raise RequestError("body: expected a JSON object")
    if not isinstance(given.get("model"), str):
        raise RequestError("model: expected the name of a model; GET /v1/models lists them")
    if given.get("n") not in (None, 1):
        raise RequestError(f"n: expected 1, got {given['n']!r}; ask again for another answer")
    most = given.get("max_completion_tokens", given.get("max_tokens"))
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise RequestError(f"max_tokens: expected a whole number of at least 1, got {most!r}")
    options = given.get("stream_options") or {}
    return Request(
        model=given["model"],
        messages=read_messages(given.get("messages")),
        tools=() if given.get("tool_choice") == "none" else read_tools(given.get("tools")),
        max_tokens=_MOST_TOKENS if most is None else most,
        stream=bool(given.get("stream")),
        usage=isinstance(options, Mapping) and bool(options.get("include_usage")),
    )


def response(request: Request, answered: Answered, rollout: str) -> dict[str, Any]:
    """Return the body of an answer."""
    turn, answer = answered.turn, answered.answer
    completion = turn.completion
    identity = f"{rollout}-{turn.index}"
    calls = [
        {"id": f"call-{identity}-{index}", "type": "function",
         "function": {"name": name, "arguments": arguments}}
        for index, (name, arguments) in enumerate(answer.calls)
    ]  # fmt: skip
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if calls else "")}
    if calls:
        message["tool_calls"] = calls
    reason = "tool_calls" if calls else "stop" if completion.stopped else "length"
    sampled, prompt = len(completion.token_ids), len(turn.prompt_P)
    return {
        "id": f"chatcmpl-{identity}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [
            {"index": 0, "message": message, "finish_reason": reason, "logprobs": None,
             "token_ids": completion.token_ids.tolist()}
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled},
        "prompt_token_ids": turn.prompt_P.tolist(),
        "weight_versions": sorted({int(serial) for serial in completion.versions}),
    }  # fmt: skip


def events(body: Mapping[str, Any], *, usage: bool) -> Iterator[str]:
    """Yield an answer as server-sent events, as if it had been sampled word by word."""
    (choice,) = body["choices"]
    message = choice["message"]
    shared = {key: body[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]
        return _event({**shared, "choices": choices})

    yield chunk({"role": "assistant", "content": ""})
    if message["content"]:
        yield chunk({"content": message["content"]})
    for index, call in enumerate(message.get("tool_calls", ())):
        yield chunk({"tool_calls": [{"index": index, **call}]})
    yield chunk({}, choice["finish_reason"])
    if usage:
        yield _event({**shared, "choices": [], "usage": body["usage"]})
    yield _DONE


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
