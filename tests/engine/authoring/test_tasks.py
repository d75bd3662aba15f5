"""Tasks of one's own: lines, dictionaries, functions; splits that share nothing; what a broken line says."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from slipstream.authoring.tasks import GeneratedTasks, RowTasks, jsonl, listed
from slipstream.errors import ConfigurationError
from slipstream.types import Split

ROWS = [{"question": f"Capital of land {number}?", "answer": f"City {number}"} for number in range(200)]


def written(path: Path, lines: Iterable[object]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def refusal(tasks: RowTasks | GeneratedTasks) -> str:
    with pytest.raises(ConfigurationError) as caught:
        tasks.check()
    return str(caught.value)


def questions(tasks: RowTasks, split: Split, count: int) -> list[str]:
    return [tasks.task(split, index).question for index in range(count)]


def test_a_stable_hash_splits_what_says_no_split(tmp_path: Path) -> None:
    tasks = jsonl(written(tmp_path / "t.jsonl", ROWS))
    of = {split: set(questions(tasks, split, 400)) for split in Split}
    assert sum(map(len, of.values())) == 200
    assert set().union(*of.values()) == {row["question"] for row in ROWS}
    assert 8 <= len(of[Split.HELDOUT]) <= 32 and 8 <= len(of[Split.FRESH]) <= 32
    # Neither the order of the lines nor others beside them move a task.
    more = jsonl(written(tmp_path / "m.jsonl", [*reversed(ROWS), {"question": "And the sea?"}]))
    assert set(questions(more, Split.HELDOUT, 400)) - {"And the sea?"} == of[Split.HELDOUT]


def test_lines_may_say_their_split_and_a_finite_set_wraps(tmp_path: Path) -> None:
    lines = [
        {"q": "one", "split": "train", "level": [1, {"a": None}]},
        "",
        {"q": "two", "split": "validation"},
        {"q": "three", "split": "test"},
        {"q": "four", "split": "train"},
    ]
    tasks = jsonl(written(tmp_path / "t.jsonl", lines), question="q")
    assert questions(tasks, Split.TRAIN, 5) == ["one", "four", "one", "four", "one"]
    assert (questions(tasks, Split.HELDOUT, 1), questions(tasks, Split.FRESH, 1)) == (["two"], ["three"])
    first = tasks.task(Split.TRAIN, 1 << 24)
    assert (first.index, first.data) == (1 << 24, {"level": [1, {"a": None}]})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "expected a JSON object, got a line that is none ("),
        ("[" * 100_000, "expected JSON, got one nested too deep"),
        ("[1]", "expected a JSON object, got list"),
        ({"answer": "x"}, 'expected text under "question", got none'),
        ({"question": 7}, 'expected text under "question", got 7'),
        ({"question": "x", "split": "exam"}, "expected a split of train, heldout, validation, "),
    ],
)
def test_a_broken_line_is_one_sentence_with_file_and_line(tmp_path: Path, line: object, said: str) -> None:
    path = written(tmp_path / "t.jsonl", [*ROWS, line])
    sentence = refusal(jsonl(path))
    assert sentence.startswith(f"{path}, line 201: ") and said in sentence and "\n" not in sentence


def test_broken_lines_are_left_out_and_counted_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "t.jsonl", ["{", *ROWS, "[1]"])
    tasks = jsonl(path, broken="skip")
    tasks.check()
    assert len(set(questions(tasks, Split.TRAIN, 400))) > 100
    assert f"{path}: 2 lines left out, the first: {path}, line 1: expected a JSON object" in caplog.text
    with pytest.raises(ConfigurationError, match='broken must be "refuse" or "skip", got'):
        jsonl(path, broken="ignore")  # type: ignore[arg-type]


def test_a_task_stands_in_one_split(tmp_path: Path) -> None:
    lines = [{"question": "one", "split": "train"}, {"split": "test", "question": "one"}]
    path = written(tmp_path / "t.jsonl", lines)
    assert refusal(jsonl(path)) == (
        f"{path}, line 2: expected each task in one split, got one of fresh that {path}, line 1 has for "
        "train; remove one of them"
    )


def test_an_empty_split_and_a_missing_file_are_said(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", [{"question": "one", "split": "train"}])
    assert refusal(jsonl(path)) == (
        f"{path}: no task of the split heldout among 1; add tasks, or say in each which split it is of "
        '("split": "heldout")'
    )
    missing = tmp_path / "none.jsonl"
    assert refusal(jsonl(missing)) == f"tasks: {missing} cannot be read: No such file or directory"


def test_dictionaries_are_tasks_as_lines_are() -> None:
    tasks = listed(ROWS)
    heldout = set(questions(tasks, Split.HELDOUT, 400))
    in_order = [row["question"] for row in ROWS if row["question"] in heldout]
    assert questions(tasks, Split.HELDOUT, 8) == in_order[:8]
    assert refusal(listed([{"question": "x", "seen": {1, 2}}])).startswith(
        "tasks[0]['seen'] must be plain data (None, booleans, "
    )


def drawn(split: str, index: int) -> dict[str, Any]:
    number = random.Random(f"{split} {index}").random()
    return {"question": f"What is {number}?", "answer": str(number)}


def test_a_function_gives_tasks() -> None:
    tasks = GeneratedTasks(drawn)
    tasks.check()
    task = tasks.task(Split.FRESH, 3)
    assert (task.question, dict(task.data)) == (
        drawn("fresh", 3)["question"], {"answer": drawn("fresh", 3)["answer"]}
    )  # fmt: skip


def test_a_function_that_is_no_source_of_tasks_is_told_so() -> None:
    def same(split: str, index: int) -> dict[str, Any]:
        return {"question": f"Number {index}?"}

    def moody(split: str, index: int) -> dict[str, Any]:
        return {"question": str(random.random())}

    def broken(split: str, index: int) -> dict[str, Any]:
        return {"question": [1, 2][index]}

    assert refusal(GeneratedTasks(same)) == (
        "tasks: same gives the tasks of train for heldout too; let them differ by split, such as with "
        'random.Random(f"{split} {index}")'
    )
    assert refusal(GeneratedTasks(moody)).startswith(
        "tasks: moody(train, 0) gives another task each time; draw"
    )
    assert refusal(GeneratedTasks(broken)) == (
        'tasks: broken(train, 0): expected text under "question", got 1'
    )
    assert refusal(GeneratedTasks(lambda split, index: [])) == (  # type: ignore[arg-type,return-value]
        "tasks: <lambda>(train, 0): expected a dictionary, got list"
    )
    assert "<lambda>(train, 0) failed with ZeroDivisionError: " in refusal(
        GeneratedTasks(lambda split, index: {"question": str(1 // index)})
    )
