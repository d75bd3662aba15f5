"""Floor 4. Anthropic's messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from slipstream.gateway.calls import read_tools
from slipstream.gateway.completions import model_of, most_tokens
from slipstream.gateway.dialect import Asked, bearer, event
from slipstream.gateway.messages import Call, Message, RequestError, canonical
from slipstream.gateway.prompts import read_stops
from slipstream.gateway.rollouts import Answered, Rollout

_KINDS: Final = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}


class AnthropicMessages:
    """POST /v1/messages."""

    path = "/v1/messages"
    keep_alive = 'event: ping\ndata: {"type": "ping"}\n\n'

    def key(self, headers: Mapping[str, str]) -> str:
        """Return the x-api-key header, or a bearer token."""
        return headers.get("x-api-key", "") or bearer(headers)

    def read(self, given: Any, rollout: Rollout) -> Asked:
        """Return what is asked for; raises RequestError."""
        model = model_of(given)
        if given.get("max_tokens") is None:
            raise RequestError("max_tokens: expected a whole number of at least 1, got nothing")
        return Asked(
            model=model,
            messages=read_conversation(given),
            tools=_tools(given),
            max_tokens=most_tokens(given["max_tokens"], "max_tokens"),
            stops=read_stops(given.get("stop_sequences"), "stop_sequences"),
            stream=bool(given.get("stream")),
        )

    def body(self, asked: Asked, answered: Answered, key: str) -> dict[str, Any]:
        """Return the answer."""
        turn, answer = answered.turn, answered.answer
        identity = f"{key}-{turn.index}"
        content: list[dict[str, Any]] = [{"type": "text", "text": answer.text}] if answer.text else []
        content += [
            {"type": "tool_use", "id": f"toolu-{identity}-{index}", "name": name,
             "input": json.loads(arguments)}
            for index, (name, arguments) in enumerate(answer.calls)
        ]  # fmt: skip
        reason = "end_turn" if turn.completion.stopped else "max_tokens"
        if answered.cut:
            reason = "stop_sequence"
        return {
            "id": f"msg-{identity}",
            "type": "message",
            "role": "assistant",
            "model": asked.model,
            "content": content,
            "stop_reason": "tool_use" if answer.calls else reason,
            "stop_sequence": answered.cut or None,
            "usage": {
                "input_tokens": len(turn.prompt_P), "output_tokens": len(turn.completion.token_ids)
            },
        }  # fmt: skip

    def events(self, asked: Asked, body: Mapping[str, Any]) -> Iterator[str]:
        """Yield the answer block by block."""

        def told(name: str, **fields: Any) -> str:
            return event({"type": name, **fields}, name)

        usage = {**body["usage"], "output_tokens": 0}
        begun = {**body, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield told("message_start", message=begun)
        for index, block in enumerate(body["content"]):
            if block["type"] == "text":
                empty: dict[str, Any] = {**block, "text": ""}
                delta = {"type": "text_delta", "text": block["text"]}
            else:
                empty = {**block, "input": {}}
                delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
            yield told("content_block_start", index=index, content_block=empty)
            yield told("content_block_delta", index=index, delta=delta)
            yield told("content_block_stop", index=index)
        ended = {key: body[key] for key in ("stop_reason", "stop_sequence")}
        yield told("message_delta", delta=ended, usage={"output_tokens": body["usage"]["output_tokens"]})
        yield told("message_stop")

    def problem(self, status: int, code: str, message: str) -> dict[str, Any]:
        """Return a refusal."""
        kind = "overloaded_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}


def read_conversation(given: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return system and messages of a request; raises RequestError."""
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: expected a list of at least one message")
    system = given.get("system")
    opening = [Message(role="system", text=_words(system, "system"))] if system else []
    for index, one in enumerate(messages):
        opening += _messages(one, f"messages[{index}]")
    return tuple(opening)


def _messages(given: Any, where: str) -> list[Message]:
    """Return one message, and a tool's result each as a message of its own, in their order."""
    if not isinstance(given, Mapping) or given.get("role") not in ("user", "assistant"):
        raise RequestError(f"{where}.role: expected user or assistant")
    content = given.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list):
        raise RequestError(f"{where}.content: expected text or a list of blocks")
    role, texts, calls, results = str(given["role"]), list[str](), list[Call](), list[Message]()
    for number, block in enumerate(blocks):
        place = f"{where}.content[{number}]"
        match block.get("type") if isinstance(block, Mapping) else None:
            case "text" if isinstance(block.get("text"), str):
                texts.append(block["text"])
            case "tool_use" if role == "assistant" and isinstance(block.get("name"), str):
                arguments = canonical(json.dumps(block.get("input") or {}))
                calls.append(Call(name=block["name"], arguments=arguments))
            case "tool_result" if role == "user":
                results.append(Message(role="tool", text=_words(block.get("content") or "", place)))
            case kind:
                raise RequestError(
                    f"{place}: expected a block of text, tool_use or tool_result, got {kind!r}"
                )
    said = (
        [Message(role=role, text="".join(texts), calls=tuple(calls))] if texts or calls or not results else []
    )
    return [*results, *said]


def _words(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where}: expected text or a list of blocks of text")
    texts = [block.get("text") if isinstance(block, Mapping) else None for block in content]
    if not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{where}: expected blocks of text only")
    return "".join(str(text) for text in texts)


def _tools(given: Mapping[str, Any]) -> Any:
    tools = given.get("tools")
    choice = given.get("tool_choice")
    if tools is None or (isinstance(choice, Mapping) and choice.get("type") == "none"):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError("tools: expected a list of objects with name and input_schema")
    functions = [
        {
            "name": tool.get("name"),
            "description": tool.get("description"),
            "parameters": tool.get("input_schema"),
        }
        for tool in tools
    ]
    return read_tools([{"type": "function", "function": function} for function in functions])
