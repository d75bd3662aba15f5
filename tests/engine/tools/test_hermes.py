"""Tool calls in text: one of them, well-formed, or a short reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.call_formats import CLOSE, OPEN
from slipstream.environments.research import TOOLS
from slipstream.interfaces import ToolSpec
from slipstream.tools.hermes import format_call, parse_call


def call(body: str) -> str:
    return f"{OPEN}{body}{CLOSE}"


GOOD = format_call("search", {"query": "Ada Kline home"})


@pytest.mark.parametrize("text", [GOOD, f"I think.\n{GOOD}\n", GOOD.replace(" ", "  ", 1)])
def test_a_valid_call(text: str) -> None:
    message = parse_call(text, TOOLS)
    assert (message.name, message.arguments, message.error) == ("search", {"query": "Ada Kline home"}, "")
    assert message.text == text


@pytest.mark.parametrize("value", ['a "quoted" \\ word', "Łódź ☃ 東京", "", "line\nbreak"])
def test_what_is_formatted_is_read_back(value: str) -> None:
    assert parse_call(format_call("answer", {"text": value}), TOOLS).arguments == {"text": value}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no tool call"),
        ("the answer is Oslo", "no tool call"),
        (OPEN + '{"name": "open"', "no tool call"),
        (CLOSE + OPEN, "no tool call"),
        (GOOD + GOOD, "more than one tool call"),
        (call('{"name": "open", '), "call is not JSON"),
        (call(""), "call is not JSON"),
        (call("[" * 100_000), "call is not JSON"),
        (call('{"name": "open", "arguments": {"document": ' + "9" * 5000 + "}}"), "call is not JSON"),
        (call('["open"]'), "unknown tool"),
        (call("null"), "unknown tool"),
        (call('{"name": "fly", "arguments": {}}'), "unknown tool"),
        (call('{"name": ["open"], "arguments": {}}'), "unknown tool"),
        (call('{"name": "open"}'), "arguments are not an object"),
        (call('{"name": "open", "arguments": "17"}'), "arguments are not an object"),
        (call('{"name": "open", "arguments": {}}'), "missing argument document"),
        (call('{"name": "open", "arguments": {"document": "1", "page": "2"}}'), "unknown argument"),
        (call('{"name": "open", "arguments": {"document": 17}}'), "argument is not a string"),
        (call('{"name": "open", "arguments": {"document": {"a": [1]}}}'), "argument is not a string"),
        (call('{"name": "open", "arguments": {"document": "\\ud800"}}'), "argument is not valid text"),
    ],
)
def test_what_is_wrong_is_said(text: str, error: str) -> None:
    message = parse_call(text, TOOLS)
    assert message.error == error
    assert message.name == "" and message.arguments is None


TYPED = ToolSpec(
    name="book",
    description="",
    parameters={
        "type": "object",
        "properties": {
            "seats": {"type": "integer", "minimum": 1},
            "class": {"type": "string", "enum": ["first", "second"]},
            "names": {"type": "array", "items": {"type": "string"}},
            "note": {"type": "string", "description": "free text"},
            "anything": {},
        },
        "required": ["seats"],
    },
)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"seats": 2, "class": "first", "names": ["Ada"], "note": "n", "anything": {"a": [None]}}, ""),
        ({"seats": "2"}, "argument seats: '2' is not of type 'integer'"),
        ({"seats": 0}, "argument seats: 0 is less than the minimum of 1"),
        ({"seats": 1, "class": "third"}, "argument class: 'third' is not one of ['first', 'second']"),
        ({"seats": 1, "names": ["Ada", 7]}, "argument names: 7 is not of type 'string'"),
        ({"seats": 1, "note": 7}, "argument is not a string"),
        ({"seats": 1, "anything": ["\ud800"]}, "argument is not valid text"),
    ],
)
def test_arguments_are_as_the_schema_says(arguments: dict[str, object], error: str) -> None:
    message = parse_call(format_call("book", arguments), [TYPED])
    assert message.error == error
    assert message.arguments == (None if error else arguments)


@pytest.mark.parametrize("plain", [True, False])
def test_plain_text_is_a_message_to_those_who_converse(plain: bool) -> None:
    message = parse_call("Anything else?", TOOLS, plain=plain)
    assert (message.text, message.name, message.arguments) == ("Anything else?", "", None)
    assert message.error == ("" if plain else "no tool call")
    # Half a call is not said to anybody.
    assert parse_call(OPEN + '{"name"', TOOLS, plain=plain).error == "no tool call"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.just("open"),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["name", "arguments", "document"]), inner)
    ),
)


@given(st.text() | JSON.map(lambda value: call(json.dumps(value))) | st.text().map(call))
def test_never_raises(text: str) -> None:
    message = parse_call(text, TOOLS)
    assert bool(message.error) is (message.arguments is None)
    if message.arguments is not None:
        "".join(message.arguments.values()).encode()
