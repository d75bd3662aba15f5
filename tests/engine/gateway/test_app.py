"""The gateway over real sockets, asked by OpenAI's own client: what agents get, and what is recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
pytest.importorskip("httpx")

from served import MAX_TOKENS, Scripted, Serving, serving  # noqa: E402

from slipstream.call_formats import CALL_FORMATS  # noqa: E402
from slipstream.chat import Chat, Said  # noqa: E402
from slipstream.inference.embedded import EmbeddedBackend  # noqa: E402
from slipstream.tools.hermes import format_call  # noqa: E402

SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Finds documents.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}
RESULT = "Ada Kline lives in Oslo."
QUESTION = [{"role": "user", "content": "Where does Ada Kline live?"}]


def ask(client: Any, messages: list[Any], **more: Any) -> Any:
    return client.chat.completions.create(model="policy", messages=messages, **more)


def test_an_agent_with_tools_is_recorded_as_one_sample(chat: Chat) -> None:
    """Its client writes the call anew each time; the tokens of the call stay those that were sampled."""
    call = format_call("search", {"query": "Ada Kline"})
    policy = Scripted(chat, call, "Oslo")
    with serving(chat, policy) as served:
        client = served.client()
        first = ask(client, QUESTION, tools=[SEARCH]).choices[0]
        assert first.finish_reason == "tool_calls" and first.message.content is None
        (asked,) = first.message.tool_calls
        assert (asked.function.name, asked.function.arguments) == ("search", '{"query":"Ada Kline"}')
        result = {"role": "tool", "tool_call_id": asked.id, "content": "Ada Kline lives in Oslo."}
        history = [*QUESTION, first.message.model_dump(exclude_none=True), result]
        second = ask(client, history, tools=[SEARCH])
        assert second.choices[0].message.content == "Oslo" and second.choices[0].finish_reason == "stop"
        (sample,) = served.graph(client).samples()
        served.post(f"/v1/rollouts/{client.api_key}/reward", 200, value=1)
        ended = served.post(f"/v1/rollouts/{client.api_key}/finish", 200)
        assert ended == {"id": client.api_key, "calls": 2, "samples": 1}
    said = [*chat.message(call), *chat.message("Oslo")]
    assert sample.token_ids[sample.loss_mask == 1].tolist() == said
    assert set(sample.versions[sample.loss_mask == 1].tolist()) == {3}
    more = chat.bridge("Ada Kline lives in Oslo.")
    assert policy.prompts[1].tolist() == [*policy.prompts[0], *chat.message(call), *more]
    assert second.usage.prompt_tokens == len(policy.prompts[1])


def test_the_embedded_policys_tokens_and_log_probabilities_arrive_unchanged(
    chat: Chat, make_model: Callable[..., Any]
) -> None:
    model = make_model(vocabulary=768, max_tokens=MAX_TOKENS)
    backend = EmbeddedBackend(model, stop_token=chat.stop_token, rows=4, max_tokens=MAX_TOKENS)
    with serving(chat, backend) as served:
        client = served.client()
        answer = ask(client, QUESTION, max_tokens=5)
        again = ask(client, [*QUESTION, answer.choices[0].message, {"role": "user", "content": "?"}])
        graph = served.graph(client)
        samples = list(graph.samples())
    turn = graph.turns[0]
    assert answer.choices[0].model_extra["token_ids"] == turn.completion.token_ids.tolist()
    assert answer.choices[0].finish_reason == ("stop" if turn.completion.stopped else "length")
    assert len(turn.completion.token_ids) <= 5
    assert again.choices[0].message.role == "assistant"
    assert len(samples) == 1, "what was sampled is the beginning of the next prompt, whatever its text was"
    assert (samples[0].behavior_logprobs[samples[0].loss_mask == 1] < 0).all()


def test_a_stream_says_what_the_whole_answer_would(chat: Chat) -> None:
    call = format_call("search", {"query": "x"})
    with serving(chat, Scripted(chat, f"Let me look. {call}")) as served:
        stream = ask(
            served.client(), QUESTION, tools=[SEARCH], stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Let me look."
    (told,) = [one for delta in deltas for one in delta.tool_calls or ()]
    assert (told.function.name, told.function.arguments) == ("search", '{"query":"x"}')
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "tool_calls"
    assert chunks[-1].usage.completion_tokens > 0


def test_a_request_that_comes_twice_is_sampled_once(chat: Chat) -> None:
    with serving(chat, Scripted(chat, "Oslo", "Rome")) as served:
        client = served.client(default_headers={"Idempotency-Key": "one"})
        answers = [ask(client, QUESTION) for _ in range(2)]
        assert answers[0].id == answers[1].id
        assert len(served.graph(client).turns) == 1
        other = client.with_options(default_headers={"Idempotency-Key": "two"})
        assert ask(other, QUESTION).choices[0].message.content == "Rome"


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ('<tool_call>{"name": "search", "arguments": </tool_call>', "not JSON"),
        ('<tool_call>{"name": "find", "arguments": {}}</tool_call>', "an unknown tool"),
        ('<tool_call>{"name": "search", "arguments": {}}</tool_call>', "without query"),
        ('<tool_call>{"name": "search"}</tool_call>', "without arguments"),
        ('<tool_call>{"name": "search"', "not closed"),
    ],
)
def test_a_call_that_is_none_is_text_and_a_fault(chat: Chat, said: str, fault: str) -> None:
    with serving(chat, Scripted(chat, said)) as served:
        client = served.client()
        choice = ask(client, QUESTION, tools=[SEARCH]).choices[0]
        rollout = served.rollouts.find(client.api_key)
    assert choice.message.tool_calls is None and choice.message.content == said
    assert rollout is not None and [(index, answer.faults) for index, answer in rollout.said] == [
        (0, (fault,))
    ]


@pytest.mark.parametrize("name", CALL_FORMATS)
def test_a_model_calls_in_its_own_way(chat: Chat, name: str) -> None:
    """The agent gets OpenAI's form; its history is what was sampled, or else is written in that way too."""
    own = Chat(chat._tokenizer, calls=CALL_FORMATS[name])
    said = own.calls.write("search", {"query": "Ada Kline"})
    policy = Scripted(own, said, "Oslo", "Oslo")
    with serving(own, policy) as served:
        client = served.client()
        first = ask(client, QUESTION, tools=[SEARCH]).choices[0].message
        (asked,) = first.tool_calls
        assert (asked.function.name, asked.function.arguments) == ("search", '{"query":"Ada Kline"}')
        history = [
            *QUESTION,
            first.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": asked.id, "content": RESULT},
        ]
        ask(client, history, tools=[SEARCH])
        ask(served.client(), history)
        (sample,) = served.graph(client).samples()
    assert sample.token_ids[sample.loss_mask == 1].tolist() == [*own.message(said), *own.message("Oslo")]
    roles = [("user", QUESTION[0]["content"]), ("assistant", said), ("tool", RESULT)]
    elsewhere = own.conversation([Said(role=role, text=text) for role, text in roles])
    assert policy.prompts[2].tolist() == elsewhere.tolist()


def test_what_is_wrong_is_said_with_its_status(chat: Chat) -> None:
    with serving(chat, Scripted(chat, "a")) as served:
        client = served.client()
        with pytest.raises(openai.AuthenticationError, match="expected a rollout's key"):
            ask(served.client("nobody"), QUESTION)
        with pytest.raises(openai.NotFoundError, match="model: expected policy, got gpt"):
            client.chat.completions.create(model="gpt", messages=QUESTION)
        with pytest.raises(openai.BadRequestError, match="n: expected 1, got 2"):
            ask(client, QUESTION, n=2)
        with pytest.raises(openai.BadRequestError, match="leave no room for an answer") as refused:
            ask(client, [{"role": "user", "content": "many words " * 400}])
        assert refused.value.code == "context_length_exceeded"
        served.gateway.paused = True
        with pytest.raises(openai.InternalServerError) as paused:
            ask(client, QUESTION)
        assert (paused.value.status_code, paused.value.response.headers["retry-after"]) == (503, "1")
        served.gateway.paused = False
        assert served.graph(client).turns == [], "nothing of these is recorded"
        served.post("/v1/rollouts", 409, key=client.api_key)
        served.post("/v1/rollouts/nobody/finish", 404)
        served.post(f"/v1/rollouts/{client.api_key}/reward", 400, value="good")
        served.post(f"/v1/rollouts/{client.api_key}/finish", 200)
        served.post(f"/v1/rollouts/{client.api_key}/finish", 409)
        served.post(f"/v1/rollouts/{client.api_key}/reward", 409, value=1)
        with pytest.raises(openai.ConflictError, match="it is finished; open another"):
            ask(client, QUESTION)


def test_models_are_listed(chat: Chat) -> None:
    with serving(chat, Scripted(chat)) as served:
        assert [model.id for model in served.client().models.list()] == ["policy"]


def test_two_calls_of_one_agent_are_answered_one_after_the_other(chat: Chat) -> None:
    policy = Scripted(chat, "a", "b")
    policy.go.clear()
    with serving(chat, policy) as served:
        client, answers = served.client(), list[str]()

        def work() -> None:
            answers.append(ask(client, QUESTION).choices[0].message.content)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        served.loop.call_soon_threadsafe(policy.go.set)
        for thread in threads:
            thread.join(30)
        turns = served.graph(client).turns
        samples = list(served.graph(client).samples())
    assert sorted(answers) == ["a", "b"]
    assert len(turns) == 2 and len(samples) == 1, "the same question twice is a repeated request"


def anthropics_client(served: Serving) -> Any:
    anthropic = pytest.importorskip("anthropic")
    key = served.post("/v1/rollouts")["api_key"]
    return anthropic.Anthropic(base_url=served.url, api_key=key, max_retries=0)


TOOL = {"name": "search", "description": "Finds documents.", "input_schema": SEARCH["function"]["parameters"]}


def test_anthropics_client_is_recorded_as_openais_is(chat: Chat) -> None:
    call = format_call("search", {"query": "Ada Kline"})
    policy = Scripted(chat, f"Let me look. {call}", "Oslo")
    with serving(chat, policy) as served:
        client = anthropics_client(served)
        first = client.messages.create(model="policy", max_tokens=64, messages=QUESTION, tools=[TOOL])
        assert first.stop_reason == "tool_use"
        text, asked = first.content
        assert (text.text, asked.name, asked.input) == ("Let me look.", "search", {"query": "Ada Kline"})
        result = {"type": "tool_result", "tool_use_id": asked.id, "content": "Ada Kline lives in Oslo."}
        history = [
            *QUESTION,
            {"role": "assistant", "content": [block.model_dump() for block in first.content]},
            {"role": "user", "content": [result]},
        ]
        counted = client.messages.count_tokens(model="policy", messages=history, tools=[TOOL])
        second = client.messages.create(model="policy", max_tokens=64, messages=history, tools=[TOOL])
        (sample,) = served.graph(client).samples()
    assert (second.content[0].text, second.stop_reason) == ("Oslo", "end_turn")
    assert counted.input_tokens == second.usage.input_tokens == len(policy.prompts[1])
    more = chat.bridge("Ada Kline lives in Oslo.")
    said = chat.message(f"Let me look. {call}")
    assert policy.prompts[1].tolist() == [*policy.prompts[0], *said, *more]
    assert sample.token_ids[sample.loss_mask == 1].tolist() == [*said, *chat.message("Oslo")]


def test_anthropics_stream_says_what_the_whole_answer_would(chat: Chat) -> None:
    call = format_call("search", {"query": "x"})
    with serving(chat, Scripted(chat, f"Let me look. {call}")) as served:
        client = anthropics_client(served)
        with client.messages.stream(model="policy", max_tokens=64, messages=QUESTION, tools=[TOOL]) as stream:
            final = stream.get_final_message()
    text, asked = final.content
    assert (text.text, asked.name, asked.input) == ("Let me look.", "search", {"query": "x"})
    assert final.stop_reason == "tool_use" and final.usage.output_tokens > 0


def test_anthropics_errors_are_in_its_form(chat: Chat) -> None:
    anthropic = pytest.importorskip("anthropic")
    with serving(chat, Scripted(chat)) as served:
        client = anthropics_client(served)
        with pytest.raises(anthropic.NotFoundError, match="model: expected policy, got another"):
            client.messages.create(model="another", max_tokens=1, messages=QUESTION)
        image = [{"role": "user", "content": [{"type": "image"}]}]
        with pytest.raises(anthropic.BadRequestError, match="got 'image'"):
            client.messages.create(model="policy", max_tokens=1, messages=image)
        stranger = anthropic.Anthropic(base_url=served.url, api_key="nobody", max_retries=0)
        with pytest.raises(anthropic.AuthenticationError, match="expected a rollout's key"):
            stranger.messages.create(model="policy", max_tokens=1, messages=QUESTION)
        assert served.graph(client).turns == []


FUNCTION = {"type": "function", **SEARCH["function"]}


@pytest.mark.parametrize("goes_on", ["by the whole conversation", "by an id"])
def test_responses_are_recorded_as_chat_completions_are(chat: Chat, goes_on: str) -> None:
    call = format_call("search", {"query": "Ada Kline"})
    policy = Scripted(chat, f"Let me look. {call}", "Oslo")
    with serving(chat, policy) as served:
        client = served.client()
        first = client.responses.create(model="policy", input="Where does Ada Kline live?", tools=[FUNCTION])
        message, asked = first.output
        assert first.output_text == "Let me look." and message.role == "assistant"
        assert (asked.name, asked.arguments) == ("search", '{"query":"Ada Kline"}')
        result = {
            "type": "function_call_output",
            "call_id": asked.call_id,
            "output": "Ada Kline lives in Oslo.",
        }
        if goes_on == "by an id":
            more: dict[str, Any] = {"input": [result], "previous_response_id": first.id}
        else:
            items = [item.model_dump(exclude_none=True) for item in first.output]
            more = {"input": [{"role": "user", "content": "Where does Ada Kline live?"}, *items, result]}
        second = client.responses.create(model="policy", tools=[FUNCTION], **more)
        (sample,) = served.graph(client).samples()
    assert second.output_text == "Oslo" and second.status == "completed"
    said = chat.message(f"Let me look. {call}")
    bridge = chat.bridge(RESULT)
    assert policy.prompts[1].tolist() == [*policy.prompts[0], *said, *bridge]
    assert sample.token_ids[sample.loss_mask == 1].tolist() == [*said, *chat.message("Oslo")]


def test_a_stream_of_responses_says_what_the_whole_answer_would(chat: Chat) -> None:
    call = format_call("search", {"query": "x"})
    with serving(chat, Scripted(chat, f"Let me look. {call}")) as served:
        client = served.client()
        with client.responses.stream(model="policy", input="?", tools=[FUNCTION]) as stream:
            kinds = [told.type for told in stream]
            final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert final.output_text == "Let me look."
    assert (final.output[1].name, final.output[1].arguments) == ("search", '{"query":"x"}')


def test_what_responses_cannot_do_here_is_said(chat: Chat) -> None:
    with serving(chat, Scripted(chat)) as served:
        client = served.client()
        with pytest.raises(openai.BadRequestError, match="expected type function, got 'web_search'"):
            client.responses.create(model="policy", input="?", tools=[{"type": "web_search"}])
        with pytest.raises(openai.BadRequestError, match="this rollout has no answer 'resp-1'"):
            client.responses.create(model="policy", input="?", previous_response_id="resp-1")
        with pytest.raises(openai.BadRequestError, match=r"input\[0\]: expected a message"):
            client.responses.create(model="policy", input=[{"type": "item_reference", "id": "x"}])
        assert served.graph(client).turns == []
