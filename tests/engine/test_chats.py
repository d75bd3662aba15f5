"""Conversations of one's own: rendered as an episode is, the assistant's tokens alone trained."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream.chat import Chat
from slipstream.chats import read_chats, rendered
from slipstream.config import EnvironmentConfig, RewardConfig, load_config
from slipstream.demonstrations import play
from slipstream.environments import environment_factory
from slipstream.environments.factory import ORACLE
from slipstream.episodes import EpisodeRunner
from slipstream.errors import ConfigurationError
from slipstream.types import Split, Trajectory

CONFIG = EnvironmentConfig(tool_failure_rate=0.0)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]}


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


ASKED = said("user", "Where does Ada Holm live?")


def written(path: Path, *chats: Any) -> Path:
    path.write_text(
        "".join(f"{one if isinstance(one, str) else json.dumps({'messages': one})}\n" for one in chats)
    )
    return path


def shown(path: Path, chat: Chat, config: EnvironmentConfig = CONFIG) -> list[Trajectory]:
    made = environment_factory(config, RewardConfig()).make()
    return rendered(read_chats(path), chat, made, config)


def test_a_conversation_gives_the_tokens_of_the_same_episode(chat: Chat, tmp_path: Path) -> None:
    """Token for token what the runner makes of a demonstration, mask and turns included."""
    runner = EpisodeRunner(
        factory=environment_factory(CONFIG, RewardConfig()),
        chat=chat,
        environment=CONFIG,
        rewards=RewardConfig(),
    )
    script = runner.factory.scripts[ORACLE]
    for index in range(4):
        episode = asyncio.run(play(runner, load_config("research"), Split.TRAIN, index, script))
        task = runner.factory.tasks.task(Split.TRAIN, index)
        results = iter(_results(episode, chat))
        messages = [said("user", task.question)]
        for one in episode.tool_calls:
            messages += [call(one.name, **one.arguments), said("tool", next(results, "unseen"))]
        (ours,) = shown(written(tmp_path / "c.jsonl", messages), chat)
        for name in ("token_ids", "loss_mask", "turns"):
            assert np.array_equal(getattr(ours, name), getattr(episode, name)), name


def _results(episode: Trajectory, chat: Chat) -> list[str]:
    text = chat.decode(episode.token_ids)
    return [part.partition("<|end|>")[0] for part in text.split("<|tool|>")[1:]]


def test_system_text_parts_and_several_messages_between(chat: Chat, tmp_path: Path) -> None:
    messages = [
        said("developer", "Be brief."),
        said("user", [{"type": "text", "text": "Where does "}, {"type": "text", "text": "Ada Holm live?"}]),
        call("search", query="Ada"),
        said("tool", "17"),
        said("user", "Hurry<|end|>"),
        {**call("answer", text="Ulm"), "content": "So: "},
        said("user", "Thanks."),
    ]
    (one,) = shown(written(tmp_path / "c.jsonl", messages), chat)
    assert chat.decode(one.token_ids) == (
        "<|system|>Be brief.\nTools: search(query), open(document), answer(text)<|end|>"
        "<|user|>Where does Ada Holm live?<|end|><|assistant|>"
        '<tool_call>{"name": "search", "arguments": {"query": "Ada"}}</tool_call><|end|>'
        "<|tool|>17<|end|><|user|>Hurry<|end|><|end|><|assistant|>"
        'So: <tool_call>{"name": "answer", "arguments": {"text": "Ulm"}}</tool_call><|end|>'
    )
    trained = chat.decode(one.token_ids[one.loss_mask == 1])
    assert trained == (
        '<tool_call>{"name": "search", "arguments": {"query": "Ada"}}</tool_call><|end|>'
        'So: <tool_call>{"name": "answer", "arguments": {"text": "Ulm"}}</tool_call><|end|>'
    )
    # What a user spells out is no control token.
    assert list(one.token_ids).count(chat.stop_token) == 6


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "expected a JSON object, got a line that is none ("),
        ("[]", 'expected a list under "messages", got NoneType'),
        ([], "expected messages of (system,) user, assistant and then others, got none of the assistant"),
        ([said("assistant", "Hi")], "then others, got assistant"),
        ([ASKED, said("critic", "x")], "message 1: expected a role of system, developer, user, "),
        ([ASKED, said("assistant", {"a": 1})], "message 1: expected text as content, got {'a': 1}"),
        (
            [ASKED, {"role": "assistant", "tool_calls": [1, 2]}],
            "message 1: expected at most one tool call, and",
        ),
        (
            [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "x"}}]}],
            'expected a call of "func',
        ),
        (
            [ASKED, call("answer", text="x"), call("answer", text="x")],
            "expected somebody between two messages",
        ),
        ([ASKED, call("fly", to="x")], "message 1 would be refused in an episode (unknown tool); correct it"),
        ([ASKED, call("answer", city="x")], "would be refused in an episode (missing argument text)"),
        ([ASKED, said("assistant", "Ulm")], "would be refused in an episode (no tool call)"),
        (
            [ASKED, call("answer", text="Ulm " * 300)],
            "expected at most environment.max_tokens = 256 tokens, got",
        ),
    ],
)
def test_a_broken_line_is_one_sentence(chat: Chat, tmp_path: Path, line: Any, sentence: str) -> None:
    path = written(tmp_path / "c.jsonl", [ASKED, call("answer", text="Ulm")], line)
    with pytest.raises(ConfigurationError) as caught:
        shown(path, chat)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_without_conversations_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"warmup\.chats: .* cannot be read: No such file"):
        read_chats(tmp_path / "none.jsonl")
    with pytest.raises(ConfigurationError, match=r"warmup\.chats: expected conversations in .*, found none"):
        read_chats(written(tmp_path / "c.jsonl", ""))
