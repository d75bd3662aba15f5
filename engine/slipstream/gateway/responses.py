"""Floor 4. OpenAI's responses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from slipstream.gateway.calls import read_tools
from slipstream.gateway.completions import ChatCompletions, model_of, most_tokens
from slipstream.gateway.dialect import Asked, event
from slipstream.gateway.messages import Call, Message, RequestError, canonical, read_messages
from slipstream.gateway.rollouts import Answered, Rollout

_PREFIX: Final = "resp-"


class Responses(ChatCompletions):
    """POST /v1/responses; a conversation is sent whole, or goes on from an earlier answer's id."""

    path = "/v1/responses"

    def read(self, given: Any, rollout: Rollout) -> Asked:
        """Return what is asked for; raises RequestError."""
        model = model_of(given)
        messages = _before(given, rollout) + _input(given.get("input"))
        if isinstance(given.get("instructions"), str):
            # Those of an earlier answer do not carry over.
            messages = [Message(role="system", text=given["instructions"]), *_without_system(messages)]
        tools = given.get("tools") or []
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise RequestError("tools: expected a list of functions")
        functions = [tool for tool in tools if tool.get("type") == "function"]
        if len(functions) < len(tools):
            other = next(tool.get("type") for tool in tools if tool.get("type") != "function")
            raise RequestError(f"tools: expected type function, got {other!r}; no tool runs here")
        return Asked(
            model=model,
            messages=tuple(messages),
            tools=()
            if given.get("tool_choice") == "none"
            else read_tools([{"type": "function", "function": tool} for tool in functions]),
            max_tokens=most_tokens(given.get("max_output_tokens"), "max_output_tokens"),
            stream=bool(given.get("stream")),
            options={"instructions": given.get("instructions"), "tools": tools,
                     "previous": given.get("previous_response_id")},
        )  # fmt: skip

    def body(self, asked: Asked, answered: Answered, key: str) -> dict[str, Any]:
        """Return the answer."""
        turn, answer = answered.turn, answered.answer
        completion, identity = turn.completion, f"{key}-{turn.index}"
        output: list[dict[str, Any]] = []
        if answer.text or not answer.calls:
            content = [{"type": "output_text", "text": answer.text, "annotations": [], "logprobs": []}]
            output.append({"type": "message", "id": f"msg-{identity}", "role": "assistant",
                           "status": "completed", "content": content})  # fmt: skip
        output += [
            {"type": "function_call", "id": f"fc-{identity}-{index}", "call_id": f"call-{identity}-{index}",
             "name": name, "arguments": arguments, "status": "completed"}
            for index, (name, arguments) in enumerate(answer.calls)
        ]  # fmt: skip
        sampled, prompt = len(completion.token_ids), len(turn.prompt_P)
        cut = None if completion.stopped else {"reason": "max_output_tokens"}
        return {
            "id": f"{_PREFIX}{identity}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "completed" if completion.stopped else "incomplete",
            "incomplete_details": cut,
            "error": None,
            "model": asked.model,
            "instructions": asked.options["instructions"],
            "previous_response_id": asked.options["previous"],
            "tools": asked.options["tools"],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "temperature": None,
            "top_p": None,
            "metadata": {},
            "output": output,
            "usage": {
                "input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": sampled, "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + sampled,
            },
        }  # fmt: skip

    def events(self, asked: Asked, body: Mapping[str, Any]) -> Iterator[str]:
        """Yield the answer item by item."""
        number = 0

        def told(kind: str, **fields: Any) -> str:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number - 1, **fields}, kind)

        begun = {**body, "status": "in_progress", "output": [], "usage": None}
        yield told("response.created", response=begun)
        yield told("response.in_progress", response=begun)
        for index, item in enumerate(body["output"]):
            place = {"output_index": index, "item_id": item["id"]}
            empty = {**item, "status": "in_progress"}
            if item["type"] == "message":
                (part,) = item["content"]
                within = {**place, "content_index": 0}
                yield told("response.output_item.added", output_index=index, item={**empty, "content": []})
                yield told("response.content_part.added", **within, part={**part, "text": ""})
                yield told("response.output_text.delta", **within, delta=part["text"], logprobs=[])
                yield told("response.output_text.done", **within, text=part["text"], logprobs=[])
                yield told("response.content_part.done", **within, part=part)
            else:
                arguments = item["arguments"]
                yield told("response.output_item.added", output_index=index, item={**empty, "arguments": ""})
                yield told("response.function_call_arguments.delta", **place, delta=arguments)
                yield told(
                    "response.function_call_arguments.done", **place, name=item["name"], arguments=arguments
                )
            yield told("response.output_item.done", output_index=index, item=item)
        yield told(f"response.{body['status']}", response=body)


def _before(given: Mapping[str, Any], rollout: Rollout) -> list[Message]:
    """Return the conversation that a request goes on from."""
    previous = given.get("previous_response_id")
    if previous is None:
        return []
    turns = {f"{_PREFIX}{rollout.key}-{turn.index}": turn for turn in rollout.graph.turns}
    if previous not in turns:
        raise RequestError(f"previous_response_id: this rollout has no answer {previous!r}")
    return list(turns[previous].conversation)


def _without_system(messages: list[Message]) -> list[Message]:
    return messages[1:] if messages and messages[0].role == "system" else messages


def _input(given: Any) -> list[Message]:
    if isinstance(given, str):
        return [Message(role="user", text=given)]
    if not isinstance(given, list) or not given:
        raise RequestError("input: expected text or a list of items")
    messages: list[Message] = []
    for index, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, Mapping) else None
        match kind:
            case "message":
                (message,) = read_messages([item])
                messages.append(message)
            case "function_call" if isinstance(item.get("name"), str):
                _add_call(messages, Call(name=item["name"], arguments=canonical(str(item.get("arguments")))))
            case "function_call_output":
                (message,) = read_messages([{"role": "tool", "content": item.get("output")}])
                messages.append(message)
            case "reasoning":
                pass  # the policy's thoughts are in its tokens
            case _:
                raise RequestError(
                    f"input[{index}]: expected a message, function_call or function_call_output, got {kind!r}"
                )
    return messages


def _add_call(messages: list[Message], call: Call) -> None:
    """Add a call to the assistant's message before it, of which it was a part."""
    last = messages[-1] if messages and messages[-1].role == "assistant" else None
    if last is None:
        messages.append(Message(role="assistant", calls=(call,)))
    else:
        messages[-1] = Message(role="assistant", text=last.text, calls=(*last.calls, call))
