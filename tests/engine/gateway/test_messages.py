"""Messages as clients send them back: what is equal, and what is refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.gateway.messages import Call, Message, RequestError, canonical, read_messages, told_again


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


ASKED = Message(role="user", text="Where?")
ANSWER = Message(role="assistant", text="Bern")


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

    for broken, told in (("\u200d", 2), ("x", 0)):
        assert told_again([ASKED, *said("assistant", "")[:1]], [ASKED, *said("assistant", broken)]) == told
        assert told_again([*said("user", ""), ANSWER], [*said("user", broken), ANSWER]) == 0


@pytest.mark.parametrize(
    ("text", "again", "told"),
    [
        ("<think>hm</think>", "<think>\nhm\n</think>", 2),
        ("so <think>hm</think> Bern", "so\n\n<think>\nhm\n</think>\n\nBern", 2),
        ("<think>hm</think>Bern", "Bern", 0),
        ("a b", "a  b", 0),
    ],
)
def test_thoughts_may_come_back_with_other_blanks_around_their_tags(text: str, again: str, told: int) -> None:
    """One without its thoughts is another prompt: the policy does not see them any more."""
    answers = [Message(role="assistant", text=words) for words in (text, again)]
    assert told_again([ASKED, answers[0]], [ASKED, answers[1], ASKED]) == told


def test_a_conversation_goes_on_from_its_beginnings() -> None:
    whole = [ASKED, ANSWER, Message(role="user", text="And?"), Message(role="assistant", text="Oslo")]
    assert [told_again(whole[:2], whole[:count]) for count in range(5)] == [0, 0, 2, 2, 2]
    assert told_again(whole, whole[:3]) == 0
    assert told_again(whole[2:], whole) == 0


def test_an_answer_that_says_nothing_may_be_left_out() -> None:
    """Not where it would be the last: there the same is asked again. Nor where another answer stands."""
    silent, more = Message(role="assistant"), Message(role="user", text="Please answer.")
    assert told_again([ASKED, silent], [ASKED, silent, more]) == 2
    assert told_again([ASKED, silent], [ASKED, more]) == 1
    assert told_again([ASKED, silent], [ASKED]) == 0
    assert told_again([ASKED, silent], [ASKED, ANSWER, more]) == 0
    assert told_again([ASKED, ANSWER], [ASKED, more]) == 0
    called = Message(role="assistant", calls=(Call(name="search", arguments="{}"),))
    assert told_again([ASKED, called], [ASKED, more]) == 0


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
