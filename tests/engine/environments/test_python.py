"""The Python tool: answers that code finds, and no guess does."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import get_args

import pytest
from worlds import attempt, constant, equal_in_pieces, factory_of, played, step, success

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments.python import PythonOptions, PythonTasks, Question, corpus, equals
from slipstream.environments.python.puzzles import KINDS, pose
from slipstream.environments.splits import split_of
from slipstream.errors import ConfigurationError
from slipstream.tools.hermes import format_call
from slipstream.types import Split


@pytest.mark.parametrize("kind", KINDS)
def test_code_solves_each_kind_and_the_usual_mistake_does_not(kind: str) -> None:
    """Expected answers are worked out here, the oracle's come from the interpreter."""
    pytest.importorskip("pydantic_monty")
    factory = factory_of("python", questions=[kind])
    assert success(factory, factory.scripts["oracle"], 24) == 1.0
    assert success(factory, factory.scripts["do_nothing"], 24) == 0.0
    assert 0.2 < success(factory, factory.careless, 24) < 0.9
    factory.close()


def test_failures_are_survived_by_trying_again_only() -> None:
    pytest.importorskip("pydantic_monty")
    factory = factory_of("python", tool_failure_rate=0.5)
    assert success(factory, factory.scripts["oracle"], 40) == 1.0
    assert 0.2 < success(factory, factory.scripts["without_retry"], 40) < 0.8
    factory.close()


def test_no_answer_is_frequent_nor_in_its_question() -> None:
    for kind in KINDS:
        posed = [pose(Split.TRAIN, index, (kind,)) for index in range(300)]
        assert max(Counter(puzzle.answer for _, puzzle in posed).values()) <= 9
        assert not any(str(puzzle.answer) in text for text, puzzle in posed)


@pytest.mark.parametrize("answer", ["unknown", "0", "1", "42", "", "1e9", "10000"])
def test_a_constant_answer_earns_nothing(answer: str) -> None:
    pytest.importorskip("pydantic_monty")
    assert constant(factory_of("python"), answer, 200) <= 0.01


def test_splits_share_no_question_and_tasks_are_the_same_for_ever() -> None:
    tasks = PythonTasks(PythonOptions(questions=("arithmetic",)))
    asked = {split: {tasks.task(split, index).question for index in range(300)} for split in Split}
    assert all(split_of(question) is split for split in Split for question in asked[split])
    assert not asked[Split.TRAIN] & asked[Split.HELDOUT]
    assert min(map(len, asked.values())) > 290
    task = PythonTasks(PythonOptions()).task(Split.TRAIN, 17)
    assert (task.question, task.data["answer"]) == GOLDEN
    assert tasks.task(Split.HELDOUT, 1 << 24).question


GOLDEN = (
    "Order 481, 262, 713, 404, 348, 318, 276, 706, 910 from small to large and add up each number times its "
    "place, counted from 1. What comes out?",
    26902,
)


def test_it_goes_on_from_any_state() -> None:
    pytest.importorskip("pydantic_monty")
    factory = factory_of("python", tool_failure_rate=0.5)
    task = factory.tasks.task(Split.TRAIN, 3)
    calls = [format_call("run", {"code": "6 * 7"})] * 6 + [
        "nothing",
        format_call("answer", {"text": str(task.data["answer"])}),
    ]
    assert equal_in_pieces(factory, task, attempt(3), calls)
    factory.close()


def test_what_code_raises_is_shown_in_one_line() -> None:
    pytest.importorskip("pydantic_monty")
    factory = factory_of("python")
    task = factory.tasks.task(Split.TRAIN, 0)
    (move,), _ = played(
        factory, task, [format_call("run", {"code": "raise ValueError('a\\nb' + 'c' * 500)"})]
    )
    assert move.observation == ("error: ValueError: a b" + "c" * 500)[:200]
    assert move.call is not None and move.call.status == "error"
    factory.close()


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ("42", 42, True),
        (" 42. ", 42, True),
        ("1,234", 1234, True),
        ("-7", -7, True),
        ("42.0", 42, False),
        ("forty-two", 42, False),
        ("9" * 5000, 42, False),
        ("", 42, False),
        ("XYZ", "xyz", True),
        ("'xyz'", "xyz", True),
        ("xy", "xyz", False),
    ],
)
def test_answers_are_compared_by_value(given: str, expected: int | str, right: bool) -> None:
    assert equals(given, expected) is right


def test_the_corpus_and_the_names_of_kinds() -> None:
    text = "\n".join(corpus(PythonTasks(PythonOptions(questions=("arithmetic",))), count=50))
    assert '{"name": "run", "arguments": {"code": "(' in text and "error: timeout" in text
    assert set(get_args(Question)) == KINDS.keys()


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from slipstream.environments.python import factory

    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    with pytest.raises(ConfigurationError) as caught:
        factory(EnvironmentConfig(name="python"), RewardConfig())
    assert str(caught.value) == (
        "environment python needs the extra python, and pydantic_monty is not installed; "
        "run pip install 'slipstream[python]'"
    )


def test_episodes_run_side_by_side() -> None:
    pytest.importorskip("pydantic_monty")
    factory = factory_of("python", questions=["arithmetic"])

    async def one(index: int) -> str:
        task = factory.tasks.task(Split.TRAIN, index)
        environment = factory.make()
        await environment.reset(task, attempt(index))
        return (await step(environment, format_call("run", {"code": task.data["code"]}))).observation

    async def every() -> list[str]:
        return await asyncio.gather(*map(one, range(30)))

    assert asyncio.run(every()) == [str(factory.tasks.task(Split.TRAIN, i).data["answer"]) for i in range(30)]
    factory.close()
