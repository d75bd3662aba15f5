"""Text and tokens: what is appended turn by turn is what the template renders at once."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slipstream.chat import OTHER_PROBE, PROBE, Chat, Said
from slipstream.environments.research import FAULTS, TOOLS, ResearchOptions, ResearchTasks, corpus
from slipstream.errors import CheckpointError
from slipstream.interfaces import Observation
from slipstream.tokenizer import CHAT_TEMPLATE, train_tokenizer
from slipstream.tools.hermes import format_call
from slipstream.types import Int32Array, Split

CHATML = (
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{{ '<tool_response>\n' + m.content + '\n</tool_response>' if m.role == 'tool' else m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Shows only the newest assistant message with its thoughts, as templates of reasoning models do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role in ('tool', 'system') %}{{ raise_exception('no such role') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SILENT = CHATML.replace("<|im_end|>", "")
RESULTS = ("17\n42\n63", "Ada Kline lives in Oslo.", "error: timeout", "Łódź ☃ 東京", "")


def chatml_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the control tokens of ChatML."""
    trained = train_tokenizer(corpus(ResearchOptions(), worlds=2), vocabulary=400)._tokenizer
    trained.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|im_end|>", pad_token="<|pad|>")
    wrapped.chat_template = template
    return wrapped


@pytest.fixture(
    scope="module", params=[CHATML, FORGETFUL, STRICT, None], ids=["chatml", "forgetful", "strict", "own"]
)
def any_tokenizer(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    return chatml_tokenizer(request.param) if request.param else tokenizer


def test_bridges_equal_rendering_the_whole_conversation(any_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = Chat(any_tokenizer)
    messages = [
        {"role": "system", "content": chat.system_message(TOOLS)},
        {"role": "user", "content": "Where does Ada Kline live?"},
    ]
    tokens = chat.prompt(Observation(system="", user="Where does Ada Kline live?"), TOOLS)
    role = "tool"
    if any_tokenizer.chat_template == STRICT:
        messages = [{"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}]
        role = "user"
    for number, result in enumerate(RESULTS):
        said = format_call("open", {"document": str(number)})
        messages += [{"role": "assistant", "content": said}, {"role": role, "content": result}]
        tokens = np.concatenate([tokens, chat.message(said), chat.bridge(result)])
        whole = any_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = any_tokenizer.encode(whole, add_special_tokens=False)
        assert tokens.tolist() == expected


def observations() -> list[str]:
    """What research answers: listings, documents, errors, and what nobody expects."""
    tasks = ResearchTasks(ResearchOptions(hops=2))
    world, store = tasks.world(Split.HELDOUT, 3)
    bodies = [document.body for document in world.documents]
    listings = ["\n".join(store.search(document.title)) for document in world.documents]
    return [*bodies, *listings, *FAULTS, *RESULTS, "no results", "a", " ", "\n", " a \n", "< |end| >"]


def test_ordinary_text_gives_the_tokens_of_the_rendered_conversation(
    any_tokenizer: PreTrainedTokenizerFast,
) -> None:
    chat = Chat(any_tokenizer)
    strict = any_tokenizer.chat_template == STRICT
    opening = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    for said in observations():
        message = {"role": "user" if strict else "tool", "content": said}
        whole = any_tokenizer.apply_chat_template(
            [*opening, message], tokenize=False, add_generation_prompt=True
        )
        bridge = whole.partition("!")[2].partition(any_tokenizer.eos_token)[2]
        assert chat.bridge(said).tolist() == any_tokenizer.encode(bridge, add_special_tokens=False)
        asked = [{"role": "system", "content": "s"}, {"role": "user", "content": said}]
        if strict:
            asked = [{"role": "user", "content": f"s\n\n{said}"}]
        whole = any_tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        prompt = chat.prompt(Observation(system="s", user=said), ())
        assert prompt.tolist() == any_tokenizer.encode(whole, add_special_tokens=False)


def control_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Int32Array) -> list[int]:
    return [token for token in tokens.tolist() if token in tokenizer.added_tokens_decoder]


PARTS = ["<|end|>", "<|assistant|>", "<|pad|>", "<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_call>",
         "<", "<|", "|>", "end", "_call>", "a", " ", "\n", "é", PROBE, OTHER_PROBE]  # fmt: skip


@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join))
def test_no_control_token_comes_out_of_what_users_and_tools_say(
    any_tokenizer: PreTrainedTokenizerFast, said: str
) -> None:
    chat = Chat(any_tokenizer)
    for encode in (chat.bridge, lambda user: chat.prompt(Observation(system="s", user=user), ())):
        hostile, harmless = encode(said), encode("a")
        assert control_tokens(any_tokenizer, hostile) == control_tokens(any_tokenizer, harmless)
        assert chat.text(hostile).count(said) >= 1


def test_pieces_that_spell_control_tokens_are_not_taken_whole() -> None:
    """Some models hold control tokens among their pieces; a symbol cannot be cut and is left out."""
    pieces = [("<unk>", 0.0), ("<|end|>", -1.0), ("¶", -1.0), ("a", -2.0)]
    pieces += [(piece, -9.0) for piece in "<|>▁?!usertoldni"]
    bare = Tokenizer(models.Unigram(pieces, unk_id=0))
    bare.pre_tokenizer = pre_tokenizers.Metaspace()
    bare.add_special_tokens(["<unk>", "<|end|>", "¶"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|end|>", unk_token="<unk>")
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = Chat(tokenizer)
    tokens = chat.bridge("a<|end|>a¶aé").tolist()
    assert tokens.count(chat.stop_token) == 1
    assert tokenizer.convert_tokens_to_ids("¶") not in tokens
    assert tokens.count(tokenizer.convert_tokens_to_ids("a")) >= 3
    assert tokenizer.unk_token_id in tokens


def test_a_template_that_leaves_the_user_out_is_refused() -> None:
    deaf = CHATML.replace("for m in messages", "for m in messages if m.role != 'user'")
    with pytest.raises(CheckpointError, match="leaves messages out"):
        Chat(chatml_tokenizer(deaf)).prompt(Observation(system="s", user="u"), TOOLS)


def test_a_user_may_speak_in_the_middle(any_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = Chat(any_tokenizer)
    rendered = any_tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "!"},
            {"role": "user", "content": "and then?"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    behind = rendered.partition("!")[2].partition(any_tokenizer.eos_token)[2]
    said = chat.bridge("and then?", "user")
    assert said.tolist() == any_tokenizer.encode(behind, add_special_tokens=False)


def test_tools_are_told_with_their_schemas_if_asked(chat: Chat) -> None:
    first, *rest = chat.system_message(TOOLS, schemas=True).splitlines()
    assert first == "Tools:"
    assert [json.loads(line) for line in rest] == [
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in TOOLS
    ]
    policy = Observation(system="Be kind.", user="?")
    told = Observation(system=f"Be kind.\n{chat.system_message(TOOLS)}", user="?")
    assert chat.prompt(policy, TOOLS).tolist() == chat.prompt(told, ()).tolist()


def test_our_bridge_is_short(chat: Chat) -> None:
    assert chat.text(chat.bridge("no results")) == "<|tool|>no results<|end|><|assistant|>"
    assert len(chat.bridge("no results")) <= 7
    assert not chat.bridge("no results").flags.writeable


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("search", {"query": "Ada Kline home"}),
        ("search", {"query": "Quin Zorn manager"}),
        ("open", {"document": "42"}),
        ("answer", {"text": "Warsaw"}),
        ("answer", {"text": "unknown"}),
    ],
)
def test_a_call_takes_at_most_a_dozen_tokens(chat: Chat, name: str, arguments: dict[str, str]) -> None:
    assert len(chat.message(format_call(name, arguments))) <= 12


@given(st.text(max_size=60))
def test_text_survives_encoding(chat: Chat, text: str) -> None:
    assert chat.text(chat.encode(text)) == text


@pytest.mark.parametrize("text", ["Łódź ☃ 東京 👩‍🚀", "a  b\t\n c ", "<tool_call>", "<|user|>"])
def test_hard_text_survives_encoding(chat: Chat, text: str) -> None:
    assert chat.text(chat.encode(text)) == text
    assert chat.text(chat.message(text)) == text


def test_only_the_last_stop_token_is_left_out_of_the_text(chat: Chat) -> None:
    stop = chat.stop_token
    assert chat.text(np.array([stop, stop], np.int32)) == "<|end|>"
    assert chat.text(np.array([], np.int32)) == ""


def test_the_system_message_lists_tools_in_one_line(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> None:
    assert chat.system_message(TOOLS) == "Tools: search(query), open(document), answer(text)"
    explained = Chat(tokenizer, explain_calls=True).system_message(TOOLS)
    assert '<tool_call>{"name": "TOOL", "arguments": {"ARGUMENT": "VALUE"}}</tool_call>' in explained


def test_a_template_that_does_not_end_messages_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"does not end an assistant message .* set eos_token"):
        Chat(chatml_tokenizer(SILENT)).bridge("no results")


def dialogue(strict: bool) -> list[Said]:
    """Everything there is: two users, a call, its result, a closing word."""
    opening = [] if strict else [Said(role="system", text="Be brief.")]
    return [
        *opening,
        Said(role="user", text="Where does Ada Kline live?"),
        Said(role="assistant", text=format_call("open", {"document": "17"})),
        Said(role="user" if strict else "tool", text="Ada Kline lives in Oslo."),
        Said(role="assistant", text="Oslo"),
        Said(role="user", text="Sure?"),
    ]


def test_a_conversation_gives_the_tokens_of_the_rendered_one(any_tokenizer: PreTrainedTokenizerFast) -> None:
    said = dialogue(any_tokenizer.chat_template == STRICT)
    shown = [{"role": one.role, "content": one.text} for one in said]
    whole = any_tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
    expected = any_tokenizer.encode(whole, add_special_tokens=False)
    assert Chat(any_tokenizer).conversation(said).tolist() == expected


def test_a_conversation_grows_by_what_was_said_and_its_continuation(
    any_tokenizer: PreTrainedTokenizerFast,
) -> None:
    if any_tokenizer.chat_template == FORGETFUL:
        pytest.skip("rewrites what it showed before: that is why history is never rendered again")
    chat, said = Chat(any_tokenizer), dialogue(any_tokenizer.chat_template == STRICT)
    calls = [index for index, one in enumerate(said) if one.role == "assistant"]
    tokens = chat.conversation(said[: calls[0]])
    for index, following in zip(calls, [*calls[1:], len(said)], strict=True):
        more = chat.continuation(said[index + 1 : following])
        tokens = np.concatenate([tokens, chat.message(said[index].text), more])
    assert tokens.tolist() == chat.conversation(said).tolist()


def test_tools_stand_in_the_system_message(chat: Chat) -> None:
    for system in ((), (Said(role="system", text="Be brief."),)):
        tokens = chat.conversation([*system, Said(role="user", text="?")], TOOLS)
        expected = Observation(system="Be brief." if system else "", user="?")
        assert tokens.tolist() == chat.prompt(expected, TOOLS).tolist()


@given(
    st.lists(st.sampled_from(PARTS), max_size=12).map("".join), st.sampled_from(["user", "tool", "assistant"])
)
def test_no_message_of_a_client_ends_itself_or_begins_another(
    any_tokenizer: PreTrainedTokenizerFast, said: str, role: str
) -> None:
    """An assistant's message may hold a call, as those that were sampled do."""
    if any_tokenizer.chat_template == STRICT and role == "tool":
        role = "user"
    chat = Chat(any_tokenizer)

    def control(text: str) -> list[int]:
        messages = [Said(role="user", text="a"), Said(role=role, text=text), Said(role="user", text="b")]
        found = control_tokens(any_tokenizer, chat.conversation(messages))
        calls = set(any_tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>"]))
        return [token for token in found if role != "assistant" or token not in calls]

    assert control(said) == control("x")
