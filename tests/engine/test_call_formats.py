"""Ways to write tool calls: what is written is read back, what is broken is found where it stands."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.call_formats import CALL_FORMATS, Attempt
from slipstream.interfaces import ToolSpec
from slipstream.tools.hermes import format_call, parse_call, rewritten

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = (ToolSpec(name="weather", description="", parameters=SCHEMA),)
OSLO = {"city": "Oslo"}
WRITTEN = {
    "hermes": '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>',
    "qwen3.5": "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
    "</function>\n</tool_call>",
    "llama3": '{"name": "weather", "parameters": {"city": "Oslo"}}',
}
names = pytest.mark.parametrize("name", CALL_FORMATS)


@names
def test_a_call_is_written_as_the_models_do(name: str) -> None:
    assert CALL_FORMATS[name].write("weather", OSLO) == WRITTEN[name]


@names
@pytest.mark.parametrize(
    "arguments",
    [OSLO, {"city": 'a "b"\n<c>\\ é'}, {"city": "7", "days": 7}, {"city": "", "days": [1, {"a": None}]}, {}],
)
def test_what_is_written_is_read_back(name: str, arguments: dict[str, Any]) -> None:
    text = CALL_FORMATS[name].write("weather", arguments)
    (attempt,) = CALL_FORMATS[name].read(text, TOOLS)
    assert attempt == Attempt(start=0, end=len(text), call={"name": "weather", "arguments": arguments})


@names
@given(text=st.text(alphabet=st.sampled_from('<>{}/=;"\n atool_cfunienpmr'), max_size=80))
def test_any_text_is_read_and_attempts_do_not_overlap(name: str, text: str) -> None:
    attempts = CALL_FORMATS[name].read(text, TOOLS)
    ends = [0] + [attempt.end for attempt in attempts]
    assert all(end <= attempt.start for end, attempt in zip(ends, attempts, strict=False))
    assert ends[-1] <= len(text)


HERMES, QWEN, LLAMA = WRITTEN.values()


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("hermes", f"Let me see. {HERMES} So.", [(HERMES, "")]),
        ("hermes", f"{HERMES}\n{HERMES}", [(HERMES, ""), (HERMES, "")]),
        ("hermes", '<tool_call>{"name"</tool_call>', [('<tool_call>{"name"</tool_call>', "not JSON")]),
        ("hermes", f'{HERMES} <tool_call>{{"na', [(HERMES, ""), ('<tool_call>{"na', "not closed")]),
        ("hermes", LLAMA, []),
        ("qwen3.5", f"Let me see.\n{QWEN}", [(QWEN, "")]),
        ("qwen3.5", f"{QWEN}\n{QWEN}", [(QWEN, ""), (QWEN, "")]),
        ("qwen3.5", HERMES, [(HERMES, "without a function")]),
        ("qwen3.5", QWEN[:-20], [(QWEN[:-20], "not closed")]),
        ("llama3", f"<|python_tag|>{LLAMA}", [(LLAMA, "")]),
        ("llama3", f"{LLAMA}; {LLAMA}", [(LLAMA, ""), (LLAMA, "")]),
        ("llama3", LLAMA[:-1], [(LLAMA[:-1], "not JSON")]),
        ("llama3", f"It is {LLAMA}", []),
        ("llama3", '{"temperature": 7}', []),
        ("llama3", "[" * 100_000, []),
        ("llama3", '{"name":' * 100_000, [('{"name":' * 100_000, "not JSON")]),
    ],
)
def test_every_attempt_is_found_where_it_stands(name: str, text: str, found: list[tuple[str, str]]) -> None:
    attempts = CALL_FORMATS[name].read(text, TOOLS)
    assert [(text[one.start : one.end], one.fault) for one in attempts] == found


def test_a_parameter_is_read_by_its_schema() -> None:
    def read(value: str, key: str) -> Any:
        text = f"<tool_call><function=weather><parameter={key}>{value}</parameter></function></tool_call>"
        (attempt,) = CALL_FORMATS["qwen3.5"].read(text, TOOLS)
        return attempt.call["arguments"][key]

    assert [read("7", "days"), read("7", "city"), read("seven", "days"), read("7", "unknown")] == [
        7, "7", "seven", "7",
    ]  # fmt: skip


@names
def test_the_environments_own_loop_reads_them_all(name: str) -> None:
    calls = CALL_FORMATS[name]
    message = parse_call(f"{WRITTEN[name]}", TOOLS, calls)
    assert (message.name, message.arguments, message.error) == ("weather", OSLO, "")
    assert parse_call("Oslo", TOOLS, calls).error == "no tool call"
    twice = {"llama3": "; "}.get(name, "\n").join([WRITTEN[name]] * 2)
    assert parse_call(twice, TOOLS, calls).error == "more than one tool call"


@names
def test_an_experts_words_are_put_into_the_models_way(name: str) -> None:
    said = f"I look. {format_call('weather', OSLO)}"
    assert rewritten(said, CALL_FORMATS[name]) == f"I look. {WRITTEN[name]}"
