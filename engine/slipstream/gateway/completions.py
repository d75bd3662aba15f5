"""Floor 4. OpenAI's chat completions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from slipstream.gateway.calls import read_tools
from slipstream.gateway.dialect import Asked, bearer, event
from slipstream.gateway.messages import RequestError, read_messages
from slipstream.gateway.prompts import read_stops
from slipstream.gateway.rollouts import Answered, Rollout

MOST_TOKENS: Final = 1 << 30
DONE: Final = "data: [DONE]\n\n"


class ChatCompletions:
    """POST /v1/chat/completions; beside OpenAI's fields the answer tells its tokens and weights."""

    path = "/v1/chat/completions"
    keep_alive = ": waiting\n\n"

    def key(self, headers: Mapping[str, str]) -> str:
        """Return the bearer token."""
        return bearer(headers)

    def read(self, given: Any, rollout: Rollout) -> Asked:
        """Return what is asked for; raises RequestError."""
        model = model_of(given)
        single(given, "n")
        most = given.get("max_completion_tokens", given.get("max_tokens"))
        return Asked(
            model=model,
            messages=read_messages(given.get("messages")),
            tools=() if given.get("tool_choice") == "none" else read_tools(given.get("tools")),
            max_tokens=most_tokens(most, "max_tokens"),
            stops=read_stops(given.get("stop"), "stop"),
            stream=bool(given.get("stream")),
            options={"usage": wants_usage(given)},
        )

    def body(self, asked: Asked, answered: Answered, key: str) -> dict[str, Any]:
        """Return the answer."""
        turn, answer = answered.turn, answered.answer
        completion, identity = turn.completion, f"{key}-{turn.index}"
        calls = [
            {"id": f"call-{identity}-{index}", "type": "function",
             "function": {"name": name, "arguments": arguments}}
            for index, (name, arguments) in enumerate(answer.calls)
        ]  # fmt: skip
        message: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
        reason = "tool_calls" if calls else "stop" if completion.stopped or answered.cut else "length"
        sampled, prompt = len(completion.token_ids), len(turn.prompt_P)
        return {
            "id": f"chatcmpl-{identity}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": asked.model,
            "choices": [
                {"index": 0, "message": message, "finish_reason": reason, "logprobs": None,
                 "token_ids": completion.token_ids.tolist()}
            ],
            "usage": {
                "prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled
            },
            "prompt_token_ids": turn.prompt_P.tolist(),
            "weight_versions": sorted({int(serial) for serial in completion.versions}),
        }  # fmt: skip

    def events(self, asked: Asked, body: Mapping[str, Any]) -> Iterator[str]:
        """Yield the answer as chunks."""
        (choice,) = body["choices"]
        message = choice["message"]
        shared = {key: body[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}

        def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
            choices = [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]
            return event({**shared, "choices": choices})

        yield chunk({"role": "assistant", "content": ""})
        if message["content"]:
            yield chunk({"content": message["content"]})
        for index, call in enumerate(message.get("tool_calls", ())):
            yield chunk({"tool_calls": [{"index": index, **call}]})
        yield chunk({}, choice["finish_reason"])
        if asked.options["usage"]:
            yield event({**shared, "choices": [], "usage": body["usage"]})
        yield DONE

    def problem(self, status: int, code: str, message: str) -> dict[str, Any]:
        """Return a refusal."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        return {"error": {"message": message, "type": kind, "code": code, "param": None}}


def model_of(given: Any) -> str:
    """Return the model a request names; raises RequestError."""
    if not isinstance(given, Mapping):
        raise RequestError("body: expected a JSON object")
    model = given.get("model")
    if not isinstance(model, str):
        raise RequestError("model: expected the name of a model; GET /v1/models lists them")
    return model


def single(given: Mapping[str, Any], name: str) -> None:
    """Raise RequestError when a request wants several answers at once."""
    if given.get(name) not in (None, 1):
        raise RequestError(f"{name}: expected 1, got {given[name]!r:.60}; ask again for another answer")


def wants_usage(given: Mapping[str, Any]) -> bool:
    """Return whether a stream ends with the count of its tokens."""
    options = given.get("stream_options")
    return isinstance(options, Mapping) and bool(options.get("include_usage"))


def most_tokens(given: Any, name: str) -> int:
    """Return a bound of tokens, none where nothing is given; raises RequestError."""
    if given is None:
        return MOST_TOKENS
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise RequestError(f"{name}: expected a whole number of at least 1, got {given!r}")
    return given
