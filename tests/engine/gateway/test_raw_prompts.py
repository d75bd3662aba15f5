"""Raw prompts over /v1/completions: what was sampled is trained, whatever the agent repeats of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from served import Scripted, serving  # noqa: E402

from slipstream.chat import Chat, Said  # noqa: E402
from slipstream.inference.embedded import EmbeddedBackend  # noqa: E402

PROMPT = "<|user|>Where does Ada Kline live?<|end|><|assistant|>"
MORE = "<|user|>Sure?<|end|><|assistant|>"


def complete(client: Any, prompt: Any, **more: Any) -> Any:
    return client.completions.create(model="policy", prompt=prompt, **more)


def test_a_prompt_of_text_is_tokenised_as_it_stands(chat: Chat) -> None:
    policy = Scripted(chat, "Oslo")
    with serving(chat, policy) as served:
        client = served.client()
        answer = complete(client, PROMPT, max_tokens=32, logprobs=1)
        (sample,) = served.graph(client).samples()
    assert policy.prompts[0].tolist() == chat.encode(PROMPT).tolist()
    assert policy.bounds == [32]
    said, (choice,) = chat.message("Oslo"), answer.choices
    assert (answer.object, choice.text, choice.finish_reason) == ("text_completion", "Oslo", "stop")
    assert choice.model_extra == {
        "token_ids": said.tolist(), "prompt_token_ids": chat.encode(PROMPT).tolist()
    }  # fmt: skip
    assert answer.usage.completion_tokens == len(said)
    assert answer.model_extra["weight_versions"] == [3]
    shown = choice.logprobs
    assert "".join(shown.tokens) == "Oslo<|end|>" and shown.top_logprobs is None
    assert shown.token_logprobs == np.linspace(-1.0, -0.1, len(said), dtype=np.float32).tolist()
    assert ["Oslo<|end|>"[at : at + len(token)] for at, token in zip(
        shown.text_offset, shown.tokens, strict=True
    )] == shown.tokens  # fmt: skip
    assert sample.token_ids.tolist() == [*chat.encode(PROMPT), *said]
    assert sample.loss_mask.sum() == len(said)


@pytest.mark.parametrize("several", [False, True])
def test_a_prompt_of_tokens_is_the_prompt(chat: Chat, several: bool) -> None:
    policy = Scripted(chat, "Oslo", "Yes")
    tokens = [int(token) for token in chat.encode(PROMPT)]
    with serving(chat, policy) as served:
        client = served.client()
        first = complete(client, [tokens] if several else tokens).choices[0].model_extra
        more = [*tokens, *first["token_ids"], *chat.encode(MORE).tolist()]
        complete(client, more)
        (sample,) = served.graph(client).samples()
    assert [prompt.tolist() for prompt in policy.prompts] == [tokens, more]
    assert sample.token_ids[sample.loss_mask == 1].tolist() == [*chat.message("Oslo"), *chat.message("Yes")]
    assert policy.bounds == [16, 16], "OpenAI's own bound where the agent names none"


def spelled(chat: Chat, text: str) -> Any:
    """Return a text in tokens that its tokenizer would not give: one for each byte."""
    return np.concatenate([chat.encode(letter) for letter in text])


def test_what_was_sampled_is_never_tokenised_again(chat: Chat) -> None:
    """The policy spells its word as the tokenizer would not; the prompt that repeats it keeps that."""
    policy = Scripted(chat)
    policy.say(np.append(spelled(chat, "lives in Oslo"), np.int32(chat.stop_token)))
    policy.say(chat.message("Yes"))
    assert len(spelled(chat, "lives in Oslo")) > len(chat.encode("lives in Oslo"))
    with serving(chat, policy) as served:
        client = served.client()
        first = complete(client, PROMPT).choices[0]
        complete(client, f"{PROMPT}{first.text}<|end|>{MORE}")
        (sample,) = served.graph(client).samples()
    sampled = first.model_extra["token_ids"]
    expected = [*chat.encode(PROMPT), *sampled, *chat.encode(MORE), *chat.message("Yes")]
    assert sample.token_ids.tolist() == expected
    assert sample.token_ids[sample.loss_mask == 1].tolist() == [*sampled, *chat.message("Yes")]


def test_an_agent_that_leaves_the_stop_token_out_is_believed(chat: Chat) -> None:
    """Its prompt is what the policy is shown; what was sampled before is a sample of its own."""
    policy = Scripted(chat, "Oslo", "Yes")
    with serving(chat, policy) as served:
        client = served.client()
        text = complete(client, PROMPT).choices[0].text
        complete(client, f"{PROMPT}{text} and")
        samples = list(served.graph(client).samples())
    oslo = chat.message("Oslo")[:-1]
    assert policy.prompts[1].tolist() == [*chat.encode(PROMPT), *oslo, *chat.encode(" and")]
    assert [sample.token_ids[sample.loss_mask == 1].tolist() for sample in samples] == [
        chat.message("Oslo").tolist(), chat.message("Yes").tolist()
    ]  # fmt: skip


def test_the_same_prompt_again_is_a_repeated_request(chat: Chat) -> None:
    with serving(chat, Scripted(chat, "Oslo", "Rome")) as served:
        client = served.client()
        assert [complete(client, PROMPT).choices[0].text for _ in range(2)] == ["Oslo", "Rome"]
        (sample,) = served.graph(client).samples()
    assert sample.token_ids[sample.loss_mask == 1].tolist() == chat.message("Rome").tolist()


@pytest.mark.parametrize("repeated", [True, False], ids=["repeats the stop", "leaves it out"])
def test_an_answer_ends_at_a_stop_and_so_does_what_is_trained(chat: Chat, repeated: bool) -> None:
    said = "search Kline\nObservation: Rome\nThought"
    policy = Scripted(chat, said, "Oslo")
    with serving(chat, policy) as served:
        client = served.client()
        choice = complete(client, PROMPT, max_tokens=40, stop=["\nObservation:", "Thought"]).choices[0]
        stop = "\nObservation:" if repeated else "\n"
        complete(client, f"{PROMPT}{choice.text}{stop} Bern\n")
        samples = list(served.graph(client).samples())
    assert (choice.text, choice.finish_reason) == ("search Kline", "stop")
    kept = choice.model_extra["token_ids"]
    assert kept == chat.encode(said).tolist()[: len(kept)]
    assert "\nObservation:" in chat.decode(np.array(kept))
    assert "\nObservation:" not in chat.decode(np.array(kept[:-1]))
    trained = [sample.token_ids[sample.loss_mask == 1].tolist() for sample in samples]
    oslo = chat.message("Oslo").tolist()
    assert trained == ([[*kept, *oslo]] if repeated else [kept, oslo])


def test_a_conversation_ends_at_a_stop_too(chat: Chat) -> None:
    question = [{"role": "user", "content": "Where?"}]
    policy = Scripted(chat, "search Kline\nObservation: Rome", "Oslo")
    with serving(chat, policy) as served:
        client = served.client()
        create = client.chat.completions.create
        first = create(model="policy", messages=question, stop="\nObs").choices[0]
        assert (first.message.content, first.finish_reason) == ("search Kline", "stop")
        more = [*question, first.message, {"role": "user", "content": "Bern"}]
        create(model="policy", messages=more)
        (sample,) = served.graph(client).samples()
    assert "Rome" not in chat.decode(policy.prompts[1])
    kept = first.model_extra["token_ids"]
    more = chat.continuation([Said(role="user", text="Bern")])
    assert policy.prompts[1].tolist() == [*policy.prompts[0], *kept, chat.stop_token, *more]
    assert sample.token_ids[sample.loss_mask == 1].tolist() == [*kept, *chat.message("Oslo")]


def test_raw_prompts_and_conversations_of_one_rollout_stay_apart(chat: Chat) -> None:
    with serving(chat, Scripted(chat, "a", "b", "c")) as served:
        client = served.client()
        complete(client, PROMPT)
        question = [{"role": "user", "content": "Where?"}]
        client.chat.completions.create(model="policy", messages=question)
        complete(client, "Once")
        assert [turn.parent for turn in served.graph(client).turns] == [None, None, None]


def test_a_stream_of_text_says_what_the_whole_answer_would(chat: Chat) -> None:
    with serving(chat, Scripted(chat, "Oslo")) as served:
        options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": 0}
        chunks = list(complete(served.client(), PROMPT, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "Oslo"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None, "stop"]
    assert chunks[0].choices[0].logprobs.tokens[-1] == "<|end|>"
    assert chunks[-1].usage.completion_tokens == len(chat.message("Oslo"))


def test_the_embedded_policy_is_given_the_prompt_and_cut_at_its_bound(
    chat: Chat, make_model: Callable[..., Any]
) -> None:
    model = make_model(vocabulary=768, max_tokens=256)
    backend = EmbeddedBackend(model, stop_token=chat.stop_token, rows=4, max_tokens=256)
    with serving(chat, backend) as served:
        client = served.client()
        choice = complete(client, PROMPT, max_tokens=3, logprobs=1).choices[0]
        (turn,) = served.graph(client).turns
    assert choice.model_extra["token_ids"] == turn.completion.token_ids.tolist()
    assert choice.logprobs.token_logprobs == turn.completion.logprobs.tolist()
    assert choice.finish_reason == ("stop" if turn.completion.stopped else "length")


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"prompt": ""}, "prompt: expected text or a list of token ids, not empty, got ''"),
        ({"prompt": []}, r"prompt: expected text or a list of token ids, not empty, got \[\]"),
        ({"prompt": None}, "prompt: expected text or a list of token ids"),
        ({"prompt": ["a", "b"]}, "prompt: expected one prompt, got 2"),
        ({"prompt": [1, True]}, "prompt: expected one prompt, got 2"),
        ({"prompt": [[1], [2]]}, "prompt: expected one prompt, got 2"),
        ({"prompt": [1.5]}, "prompt: expected text or a list of token ids"),
        ({"prompt": [1, -1]}, "prompt: expected token ids from 0 to [0-9]+, got -1"),
        ({"prompt": [1, 10**12]}, "prompt: expected token ids from 0 to [0-9]+, got 1000000000000"),
        ({"prompt": "many words " * 400}, "prompt: [0-9]+ tokens leave no room for an answer"),
        ({"prompt": "a", "n": 2}, "n: expected 1, got 2"),
        ({"prompt": "a", "best_of": 3}, "best_of: expected 1, got 3"),
        ({"prompt": "a", "echo": True}, "echo: expected nothing, got True"),
        ({"prompt": "a", "suffix": "z"}, "suffix: expected nothing, got 'z'"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: expected a whole number of at least 1, got 0"),
        ({"prompt": "a", "logprobs": 5}, "logprobs: expected 0 or 1, got 5"),
        ({"prompt": "a", "stop": ["x", ""]}, "stop: expected text or a list of texts, none empty"),
        ({"prompt": "a", "stop": list("abcde")}, "stop: expected at most 4 texts, got 5"),
    ],
)
def test_what_a_raw_prompt_cannot_ask_is_said(chat: Chat, asked: dict[str, Any], sentence: str) -> None:
    with serving(chat, Scripted(chat)) as served:
        client = served.client()
        body = {"model": "policy", **asked}
        with pytest.raises(openai.BadRequestError, match=sentence):
            client.post("/completions", body=body, cast_to=object)
        assert served.graph(client).turns == []


def test_a_raw_prompt_is_refused_as_a_conversation_is(chat: Chat) -> None:
    with serving(chat, Scripted(chat, "a")) as served:
        client = served.client()
        with pytest.raises(openai.AuthenticationError, match="expected a rollout's key"):
            complete(served.client("nobody"), PROMPT)
        with pytest.raises(openai.NotFoundError, match="model: expected policy, got gpt"):
            client.completions.create(model="gpt", prompt=PROMPT)
        served.post(f"/v1/rollouts/{client.api_key}/finish", 200)
        with pytest.raises(openai.ConflictError, match="it is finished; open another"):
            complete(client, PROMPT)
