"""What the page is told: fates, slips, filters, one episode, lanes, and what is missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from made_runs import HOSTILE, RunMaker, call, episode, small_run

from slipstream import events
from slipstream.chat import Chat
from slipstream.config import load_config
from slipstream.errors import ConfigurationError, RunFolderError
from slipstream.ledger_snapshot import snapshot
from slipstream.ledger_state import LedgerState
from slipstream.synthetic import update
from slipstream.types import Outcome, ToolStatus, Trajectory
from slipstream.viewing.index import MOST_TOOLS
from slipstream.viewing.run import PAGE_GROUPS, RunView, to_json
from slipstream.viewing.tokens import TokenTexts, tokenizer_of


def view_of(folder: Path, **options: Any) -> RunView:
    view = RunView(folder, **options)
    view.read_all()
    return view


def rows(view: RunView, **given: str) -> list[dict[str, Any]]:
    """The episodes that fit, group by group."""
    return [row for group in view.groups(given)["groups"] for row in group if row["fits"]]


@pytest.fixture
def view(tmp_path: Path, chat: Chat) -> RunView:
    small_run(tmp_path, chat)
    return view_of(tmp_path)


def test_an_episode_has_its_fate_and_its_slip(view: RunView) -> None:
    fates = {row["order"]: (row["fate"], row["step"], row["slip"]) for row in rows(view)}
    # The batch behind two steps made step 3 of tokens of step 0: a slip of two.
    assert fates == {
        0: ("trained", 3, 2), 1: ("trained", 3, 2), 2: ("buffered", -1, -1),
        3: ("failed_infrastructure", -1, -1), 4: ("evaluated", -1, -1),
    }  # fmt: skip


def test_a_rollback_undoes_fates_and_slip_counts_over_the_fork(tmp_path: Path, chat: Chat) -> None:
    run = RunMaker(tmp_path)
    made = [episode(chat, "a?", "b", seq=seq, serial=seq) for seq in range(3)]
    for serial in range(3):
        run.publish(serial, step=serial)
        run.receive(made[serial])
    run.train(0, made[:1])
    run.train(1, made[1:2])
    run.train(2, made[2:])
    run.log.append(events.RolledBack(step=1))
    run.log.flush()
    view = view_of(tmp_path)
    assert [row["fate"] for row in sorted(rows(view), key=lambda row: row["order"])] == [
        "trained", "buffered", "buffered",
    ]  # fmt: skip
    run.log.append(events.Incarnation(number=1, fork_step=1, session="s"))
    run.publish(3, step=1, incarnation=1, fork_step=1)
    run.train(1, made[2:])
    run.log.append(events.Dropped(identities=(made[1].identity,), reason="dropped_by_slip"))
    run.close()
    assert not view.advance(10.0)
    by_order = {row["order"]: row for row in rows(view)}
    # Sampled at step 2 of the branch that was left at 1, consumed at step 1 of the new one.
    assert (by_order[2]["step"], by_order[2]["slip"]) == (2, 1)
    assert by_order[1]["fate"] == "dropped_by_slip"


def test_a_log_that_begins_with_a_state_knows_its_versions(tmp_path: Path, chat: Chat) -> None:
    ledger = LedgerState(load_config("research"))
    run = RunMaker(tmp_path, segment_bytes=100)
    run.log.opening = lambda: snapshot(ledger)
    for event in (events.Published(update=update(step, step=step)) for step in range(2)):
        run.log.append(event)
        ledger.apply(event, 0)
    made = episode(chat, "a?", "b", seq=0, serial=0)
    run.receive(made)
    run.train(1, [made])
    run.close()
    for path in sorted((tmp_path / "trajectories").glob("*.log"))[:2]:
        path.unlink()
    view = view_of(tmp_path)
    assert [(row["step"], row["slip"]) for row in rows(view)] == [(2, 1)]
    assert any("begins with segment 2" in note for note in view.about()["missing"])


@pytest.mark.parametrize(
    ("given", "orders"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"kind": "train"}, [0, 1, 2, 3]),
        ({"kind": "evaluation"}, [4]),
        ({"outcome": "success"}, [0, 2, 4]),
        ({"outcome": "failure"}, [1, 3]),
        ({"outcome": "timed_out"}, [2]),
        ({"fate": "trained"}, [0, 1]),
        ({"low": "0.5"}, [0, 2, 4]),
        ({"low": "-1", "high": "0"}, [1, 3]),
        ({"tool": "search"}, [0]),
        ({"tool": "unheard of"}, []),
        ({"status": "error"}, [1]),
        ({"step": "3"}, [0, 1]),
        ({"serial": "1"}, [2, 3, 4]),
        ({"text": "OSLO"}, [0]),
        ({"text": "database is gone"}, [3]),
        ({"text": "rome", "kind": "train"}, [1]),
        ({"text": "rome", "outcome": "success"}, [4]),
        ({"outcome": "success", "tool": "answer", "low": "0.9"}, [0]),
    ],
)
def test_filters(view: RunView, given: dict[str, str], orders: list[int]) -> None:
    assert sorted(row["order"] for row in rows(view, **given)) == orders


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"colour": "red"}, 'unknown filter "colour"; there are kind, outcome'),
        ({"outcome": "fine"}, 'filter outcome: expected one of completed, .*got "fine"'),
        ({"low": "much"}, 'filter low: expected float, got "much"'),
        ({"low": "nan"}, "filter low"),
        ({"step": "1.5"}, 'filter step: expected int, got "1.5"'),
        ({"step": "99999999999"}, "filter step"),
        ({"sort": "beauty"}, "filter sort: expected one of newest, reward"),
    ],
)
def test_a_filter_that_is_none_is_one_sentence(view: RunView, given: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        view.groups(given)


@pytest.mark.parametrize(
    ("sort", "up", "groups"),
    [
        ("newest", "", [7, 1, 0]), ("newest", "1", [0, 1, 7]), ("reward", "", [7, 1, 0]),
        ("spread", "", [0, 1, 7]), ("turns", "1", [7, 1, 0]), ("slip", "", [0, 1, 7]),
        ("seconds", "", [0, 1, 7]),
    ],
)  # fmt: skip
def test_orders(view: RunView, sort: str, up: str, groups: list[int]) -> None:
    found = view.groups({"sort": sort, "up": up})["groups"]
    assert [group[0]["group"] for group in found] == groups


def test_a_page_holds_whole_groups(tmp_path: Path, chat: Chat) -> None:
    run = RunMaker(tmp_path)
    for seq in range(2 * PAGE_GROUPS + 6):
        run.receive(episode(chat, "a?", "b", seq=seq, group=seq // 2, attempt=seq % 2))
    run.close()
    view = view_of(tmp_path)
    first, second = view.groups({}), view.groups({"page": "1"})
    assert (first["total"], len(first["groups"]), len(second["groups"])) == (PAGE_GROUPS + 3, PAGE_GROUPS, 3)
    assert [row["attempt"] for row in first["groups"][0]] == [0, 1]
    assert second["groups"][-1][0]["group"] == 0
    assert view.groups({"page": "9"})["groups"] == []


def test_text_is_looked_for_in_slices(tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunMaker(tmp_path, chat)
    for seq in range(12):
        run.receive(
            episode(chat, f"number {seq}?", "rare" if seq in (2, 9) else "common", seq=seq, group=seq)
        )
    run.close()
    view = view_of(tmp_path)
    monkeypatch.setattr("slipstream.viewing.search.SLICE_S", -1.0)
    looked = [view.groups({"text": "rare"})["search"]["looked"] for _ in range(3)]
    assert looked == [0, 0, 0]
    monkeypatch.setattr("slipstream.viewing.search.SLICE_S", 60.0)
    found = view.groups({"text": "rare"})
    assert found["search"] == {"looked": 12, "of": 12, "over": True}
    assert [group[0]["group"] for group in found["groups"]] == [9, 2]


def test_an_episode_is_shown_token_for_token(view: RunView, chat: Chat) -> None:
    shown = view.episode(view.place(0))
    assert [(m["role"], m["turn"]) for m in shown["messages"]] == [
        ("prompt", -1), ("policy", 0), ("tool", 0), ("policy", 1),
    ]  # fmt: skip
    tokens = shown["tokens"]
    assert "".join(tokens["text"]) == (
        "<|user|>Where does Ada live?<|end|><|assistant|>search Ada<|end|>"
        "<|tool|>5<|end|><|assistant|>Oslo<|end|>"
    )
    sampled = [number for number, mask in enumerate(tokens["mask"]) if mask]
    assert {tokens["logprob"][number] for number in sampled} == {-0.25}
    assert {tokens["serial"][number] for number in sampled} == {0}
    assert sum(tokens["control"]) == 8
    assert shown["steps"] == {0: 0}
    assert [(c["name"], c["status"], c["cached"], c["latency_s"]) for c in shown["calls"]] == [
        ("search", "ok", False, 0.5), ("answer", "ok", True, 0.5),
    ]  # fmt: skip
    assert msgspec.json.decode(shown["calls"][0]["arguments"]) == {"query": "Ada"}
    assert shown["scores"][0] == {
        "name": "answer",
        "kind": "outcome",
        "weight": 1.0,
        "value": 1.0,
        "invalid": "",
    }
    assert (shown["reward"], shown["turn_rewards"]) == (1.0, [0.0, 1.0])
    assert shown["row"]["fate"] == "trained" and [row["attempt"] for row in shown["siblings"]] == [0, 1]
    assert tokens["gap"] is None


def test_whoever_answers_a_message_without_a_call_is_named(tmp_path: Path, chat: Chat) -> None:
    run = RunMaker(tmp_path, chat)
    made = episode(chat, "hello", "hi", "and you?", "fine", seq=0)
    bridge = chat.bridge("and you?", "user")
    parts = np.split(made.token_ids, np.flatnonzero(np.diff(made.turns)) + 1)
    tokens = np.concatenate([*parts[:2], bridge, parts[3]]).astype(np.int32)
    assert len(tokens) == len(made.token_ids)
    run.receive(dataclasses.replace(made, token_ids=tokens))
    run.receive(episode(chat, "hello", "hi", "error: no call", "fine", seq=1))
    run.close()
    view = view_of(tmp_path)
    roles = [[m["role"] for m in view.episode(view.place(n))["messages"]] for n in range(2)]
    assert roles == [["prompt", "policy", "user", "policy"], ["prompt", "policy", "tool", "policy"]]


def test_segments_begin_with_a_prompt(tmp_path: Path, chat: Chat) -> None:
    made = episode(chat, "one?", "a", "x", "b", seq=0)
    cut = int(np.flatnonzero(np.diff(made.turns))[1]) + 1
    run = RunMaker(tmp_path, chat)
    run.receive(dataclasses.replace(made, segments=(cut,)))
    run.close()
    view = view_of(tmp_path)
    messages = view.episode(view.place(0))["messages"]
    assert [(m["role"], m["segment"]) for m in messages] == [
        ("prompt", False), ("policy", False), ("prompt", True), ("policy", False),
    ]  # fmt: skip


def test_a_long_episode_comes_in_windows(tmp_path: Path, chat: Chat) -> None:
    run = RunMaker(tmp_path, chat)
    run.receive(episode(chat, "Where?", *["search Ada", "5 6 7"] * 30, "Oslo", seq=0))
    run.close()
    view = view_of(tmp_path)
    whole = view.episode(view.place(0))
    parts = [view.episode(view.place(0), start, window=50) for start in range(0, whole["total"], 50)]
    assert [part["start"] for part in parts] == list(range(0, whole["total"], 50))
    for name in ("id", "text", "logprob", "turn"):
        assert [value for part in parts for value in part["tokens"][name]] == whole["tokens"][name]
    assert view.episode(view.place(0), 1 << 30)["tokens"]["id"] == []


def test_lanes_say_when_the_batch_was_taken(view: RunView) -> None:
    shown = view.lanes(step=3)
    # Its row was written at ..10 s, four seconds after the one before, one of which was waiting.
    assert shown["trained"] == {"taken": 1_700_000_007.0, "done": 1_700_000_010.0}
    assert [lane["marks"] for lane in shown["lanes"]] == [[0, 750, 1250, 1300, 1800, 1900]] * 2
    assert [(lane["generate"], lane["tool_time"]) for lane in shown["lanes"]] == [(1.25, 0.5)] * 2
    held = view.lanes(serial=1)
    assert [lane["task"] for lane in held["lanes"]] == [7] and held["trained"] is None
    assert view.lanes(step=99)["lanes"] == []


def test_the_gap_is_what_the_scorer_says(tmp_path: Path, chat: Chat) -> None:
    small_run(tmp_path, chat)

    def scorer(trajectory: Trajectory) -> Any:
        return np.where(trajectory.loss_mask == 1, 0.125, np.nan).astype(np.float32)

    view = view_of(tmp_path, scorer=scorer, scored_with="best")
    tokens = view.episode(view.place(0))["tokens"]
    assert view.about()["gap"] == "best"
    assert [gap == 0.125 for gap in tokens["gap"]] == [mask == 1 for mask in tokens["mask"]]
    assert set(tokens["gap"]) == {None, 0.125}


def test_what_is_missing_is_said(tmp_path: Path, chat: Chat) -> None:
    with pytest.raises(RunFolderError, match="does not exist"):
        RunView(tmp_path / "nowhere")
    empty = view_of(tmp_path).about()
    assert empty["episodes"] == 0 and empty["state"] == "not begun"
    assert [sentence.split()[0] for sentence in empty["missing"]] == [
        "config.toml", "trajectories/", "metrics.jsonl", "Tokens",
    ]  # fmt: skip
    run = RunMaker(tmp_path)
    assert "The log holds no episode yet." in view_of(tmp_path).about()["missing"]
    run.receive(episode(chat, "a?", "b", seq=0))
    run.close()
    (tmp_path / "config.toml").write_text("no = [toml")
    view = view_of(tmp_path)
    assert view.about()["episodes"] == 1 and "config.toml" in view.about()["missing"][0]
    # Without a tokenizer the numbers are there.
    shown = view.episode(view.place(0))["tokens"]
    assert shown["text"] == [f"{token} " for token in shown["id"]]


def test_a_tokenizer_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    texts, reason = tokenizer_of([tmp_path / "none", tmp_path])
    assert reason == f"Tokens are shown as numbers: {tmp_path / 'tokenizer.json'} is no tokenizer."
    assert texts.text(np.array([3, 4], np.int32)) == "3 4"


def test_tokens_of_no_vocabulary_and_broken_characters_are_shown(chat: Chat) -> None:
    from tokenizers import Tokenizer, decoders, models

    base = episode(chat, "a?", "b", seq=0)
    letters = {chr(256 + n) if n in (0xF0, 0x9F, 0x99, 0x82) else f"<{n}>": n for n in range(4)}
    byte_level = Tokenizer(
        models.BPE(vocab={**letters, "\u00f0": 4, "\u0141": 5, "\u013b": 6, "\u0124": 7}, merges=[])
    )
    byte_level.decoder = decoders.ByteLevel()
    tokens = np.array([4, 5, 6, 7, 2**31 - 1, -5] + [5] * 9, np.int32)
    made = dataclasses.replace(base, token_ids=tokens, segments=())
    pieces = TokenTexts(byte_level).pieces(made, slice(0, len(tokens)))
    assert len(pieces) == len(tokens)
    assert pieces[:6] == ["", "", "", "\U0001f642", "[2147483647]", "[-5]"]
    assert "".join(pieces[6:]) == "\ufffd" * 9


def test_hostile_text_stays_text(view: RunView) -> None:
    shown = view.episode(view.place(2))
    text = "".join(shown["tokens"]["text"])
    assert "<script>document.title = 'owned'</script>" in text
    assert shown["note"] == HOSTILE and shown["calls"][0]["name"] == HOSTILE
    assert msgspec.json.decode(to_json(shown))["note"] == HOSTILE


def test_more_tools_than_bits_share_the_last(tmp_path: Path, chat: Chat) -> None:
    run = RunMaker(tmp_path)
    for seq in range(MOST_TOOLS + 5):
        run.receive(episode(chat, "a?", "b", seq=seq, group=seq, calls=[call(f"tool-{seq}")]))
    run.close()
    view = view_of(tmp_path)
    assert len(view.index.tools) == MOST_TOOLS + 1
    assert [row["order"] for row in rows(view, tool="tool-7")] == [7]
    assert sorted(row["order"] for row in rows(view, tool="(other tools)")) == list(
        range(MOST_TOOLS, MOST_TOOLS + 5)
    )


def test_a_duplicate_does_not_take_the_place_of_what_it_repeats(tmp_path: Path, chat: Chat) -> None:
    run = RunMaker(tmp_path)
    made = episode(chat, "a?", "b", seq=0)
    run.publish(0, step=0)
    run.receive(made)
    run.receive(made, "duplicate")
    run.train(0, [made])
    run.close()
    assert [row["fate"] for row in rows(view_of(tmp_path))] == ["trained", "duplicate"]


def test_numbers_that_no_row_holds_are_counted(tmp_path: Path, chat: Chat) -> None:
    made = episode(chat, "a?", "b", seq=1)
    run = RunMaker(tmp_path)
    run.receive(dataclasses.replace(made, attempt=dataclasses.replace(made.attempt, attempt=1 << 60)))
    run.receive(made)
    run.close()
    view = view_of(tmp_path)
    assert len(rows(view)) == 1
    assert "1 events of the log could not be understood and are left out." in view.about()["missing"]


def test_calls_without_a_score(tmp_path: Path, chat: Chat) -> None:
    """An infrastructure failure has neither reward nor scores, and is no success."""
    run = RunMaker(tmp_path, chat)
    run.receive(
        episode(chat, "a?", "b", seq=0, outcome=Outcome.INFRASTRUCTURE_FAILURE,
                calls=[call("open", 0, ToolStatus.INVALID)]), "failed_infrastructure",
    )  # fmt: skip
    run.close()
    view = view_of(tmp_path)
    shown = view.episode(view.place(0))
    assert (shown["scores"], shown["success"], shown["reward"]) == ([], False, 0.0)
    assert rows(view, status="invalid")[0]["fate"] == "failed_infrastructure"
