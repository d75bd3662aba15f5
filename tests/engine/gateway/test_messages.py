"""Messages as clients send them back: what is equal, and what is refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.gateway.messages import Call, Message, RequestError, canonical, is_prefix, read_messages


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "search", "arguments": arguments}, **more}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        ({"role": "assistant"}, {"role": "assistant", "content": "", "refusal": None, "tool_calls": None}),
        ({"role": "system", "content": "x"}, {"role": "developer", "content": "x", "name": "y"}),
        (
            {"role": "assistant", "tool_calls": [call('{"a": 1, "b": [2]}', id="1")]},
            {"role": "assistant", "content": "", "tool_calls": [call('{"b":[2],"a":1}', id="2")]},
        ),
        (
            {"role": "assistant", "tool_calls": [call('{"a": "é"}')]},
            {"role": "assistant", "tool_calls": [call('{"a": "\\u00e9"}')]},
        ),
        (
            {"role": "tool", "content": "r", "tool_call_id": "1"},
            {"role": "tool", "content": [{"type": "text", "text": "r"}], "tool_call_id": "2"},
        ),
    ],
)
def test_what_clients_write_differently_is_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert read_messages([one]) == read_messages([other])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"role": "user", "content": "x"}, {"role": "user", "content": "x "}),
        ({"role": "user", "content": "x"}, {"role": "system", "content": "x"}),
        (
            {"role": "assistant", "tool_calls": [call('{"a": 1}')]},
            {"role": "assistant", "tool_calls": [call('{"a": "1"}')]},
        ),
        (
            {"role": "assistant", "tool_calls": [call("{}"), call("{}")]},
            {"role": "assistant", "tool_calls": [call("{}")]},
        ),
    ],
)
def test_what_says_something_else_is_not(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert read_messages([one]) != read_messages([other])


def test_arguments_that_are_no_json_stay_as_they_were() -> None:
    assert canonical('{"a": ') == '{"a": '
    assert canonical("[" * 100_000) == "[" * 100_000
    (message,) = read_messages([{"role": "assistant", "tool_calls": [call('{"a"')]}])
    assert message == Message(role="assistant", calls=(Call(name="search", arguments='{"a"'),))


def test_arguments_as_an_object_are_those_of_its_json() -> None:
    (one, other) = (
        read_messages([{"role": "assistant", "tool_calls": [call(arguments)]}])
        for arguments in ({"b": 1, "a": 2}, '{"a": 2, "b": 1}')
    )
    assert one == other


def test_what_the_policy_said_may_come_back_with_its_control_tokens_broken() -> None:
    def said(role: str, joiner: str) -> tuple[Message, ...]:
        calls = (Call(name="search", arguments=f'{{"a":"<{joiner}|end|>"}}'),) if role == "assistant" else ()
        return (Message(role=role, text=f"so <{joiner}|end|>", calls=calls), Message(role="user", text="?"))

    assert is_prefix(said("assistant", ""), said("assistant", "\u200d"))
    assert not is_prefix(said("user", ""), said("user", "\u200d"))
    assert not is_prefix(said("assistant", ""), said("assistant", "x"))


def test_a_conversation_goes_on_from_its_beginnings() -> None:
    whole = read_messages([{"role": "user", "content": text} for text in "abc"])
    assert all(is_prefix(whole[:count], whole) for count in range(4))
    assert not is_prefix(whole, whole[:2])
    assert not is_prefix(whole[1:], whole)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "messages: expected a list of at least one message, got []"),
        ("hi", "messages: expected a list of at least one message, got 'hi'"),
        (["hi"], "messages[0]: expected an object with role and content, got 'hi'"),
        (
            [{"role": "robot"}],
            "messages[0].role: expected one of assistant, system, tool, user, got 'robot'",
        ),
        ([{"role": "user", "content": 3}], "messages[0].content: expected text or a list of parts, got 3"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "messages[0].content[0]: expected a part of type text, got 'image_url'",
        ),
        (
            [{"role": "user", "content": "x", "tool_calls": [call("{}")]}],
            "messages[0].tool_calls: expected a list, in an assistant's message only",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {}}]}],
            "messages[0].tool_calls[0].function: expected an object with name and arguments",
        ),
    ],
)
def test_anything_else_is_refused(given: Any, sentence: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_messages(given)
    assert str(refused.value) == sentence
