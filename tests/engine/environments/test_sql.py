"""SQL: answers are what the database says, and nothing but looking gets at them."""

from __future__ import annotations

from typing import Any

import pytest
from worlds import attempt, constant, equal_in_pieces, factory_of, played, success

from slipstream.environments.sql import KINDS, SqlTasks, corpus
from slipstream.environments.sql import SqlOptions as Options
from slipstream.environments.sql.players import QUERIES
from slipstream.environments.sql.questions import equals
from slipstream.tools.hermes import format_call
from slipstream.types import Split


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_solves_each_kind_by_queries(kind: str) -> None:
    """Expected answers are worked out without SQL, the oracle's come from the database."""
    factory = factory_of("sql", questions=[kind])
    assert success(factory, factory.scripts["oracle"], 48) == 1.0
    assert success(factory, factory.scripts["do_nothing"], 48) == 0.0
    if kind != "favourite":
        assert 0.2 < success(factory, factory.careless, 48) < 0.9


@pytest.mark.parametrize("rate", [0.3])
def test_failures_are_survived_by_trying_again_only(rate: float) -> None:
    factory = factory_of("sql", tool_failure_rate=rate)
    assert success(factory, factory.scripts["oracle"], 48) == 1.0
    assert success(factory, factory.scripts["without_retry"], 48) < 0.5


@pytest.mark.parametrize("answer", ["unknown", "0", "1", "Oslo", "yes", "", "SELECT 1", "1,2,3", "nan"])
def test_a_constant_answer_earns_next_to_nothing(answer: str) -> None:
    assert constant(factory_of("sql"), answer, 200) <= 0.05


def test_questions_hold_no_answers_and_are_the_same_for_ever() -> None:
    tasks = SqlTasks(Options())
    for split in Split:
        for index in range(200):
            task = tasks.task(split, index)
            answer = task.data["answer"]
            parts = answer if isinstance(answer, tuple) else (answer,)
            assert not any(str(part).casefold() in task.question.casefold() for part in parts)
    task = SqlTasks(Options()).task(Split.TRAIN, 17)
    assert (task.question, task.data["answer"]) == GOLDEN


GOLDEN = ("How many units of the Brass Mirror have gone to people who live in Seoul?", 105)


def test_a_shop_is_asked_no_question_twice() -> None:
    tasks = SqlTasks(Options(questions=("residence",)))
    for number in range(40):
        asked = {tasks.task(Split.HELDOUT, index).question for index in range(8 * number, 8 * number + 8)}
        assert len(asked) == 8


def test_schemas_differ_and_splits_share_no_shop() -> None:
    tasks = SqlTasks(Options())
    shops = [tasks.shop(split, number) for split in Split for number in range(30)]
    assert len({shop.customers for shop in shops}) == len(shops)
    schemas = {tuple((t.name, *(c.name for c in t.columns)) for t in shop.tables) for shop in shops}
    assert len(schemas) == len(shops)


def test_the_public_part_of_a_task_tells_no_answer() -> None:
    factory = factory_of("sql")
    task = factory.tasks.task(Split.TRAIN, 5)
    assert factory.make().secrets == ("answer",)
    public = str({key: value for key, value in task.data.items() if key != "answer"})
    assert str(task.data["answer"]) not in public


def test_it_goes_on_from_any_state() -> None:
    factory = factory_of("sql", tool_failure_rate=0.5)
    task = factory.tasks.task(Split.TRAIN, 3)
    calls = [format_call("tables", {})] * 8 + [
        format_call("query", {"sql": "SELECT 1 + 1"}),
        "no call",
        format_call("answer", {"text": str(task.data["answer"])}),
    ]
    assert equal_in_pieces(factory, task, attempt(3), calls)


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (("describe", {"table": "nothing"}), "error: no such table: nothing"),
        (("query", {"sql": "SELECT age"}), "error: no such column: age"),
        (("query", {"sql": "SELECT\n\n('"}), 'error: unrecognized token: "\'"'),
        (("query", {"sql": "DROP TABLE clients"}), "error: no such table: clients"),
    ],
)
def test_mistakes_are_shown_as_standard_errors(call: tuple[str, dict[str, Any]], shown: str) -> None:
    factory = factory_of("sql")
    (move,), _ = played(factory, factory.tasks.task(Split.TRAIN, 0), [format_call(*call)])
    assert (move.observation, move.done) == (shown, False)
    assert move.call is not None and move.call.status == "error"


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        (" oslo. ", "Oslo", True),
        ("'Oslo'", "Oslo", True),
        ("Oslo, Rome", "Oslo", False),
        ("", "Oslo", False),
        ("42", 42, True),
        ("42.0", 42, True),
        ("42.004", 42, False),
        ("1,042", 1042, True),
        ("1234.56", 1234.56, True),
        ("$1,234.57", 1234.56, True),
        ("1234.58", 1234.56, False),
        ("nan", 42, False),
        ("1e999", 42, False),
        ("42 units", 42, False),
        ("9" * 400, 42, False),
        ("Ada Kline, Bela Lund,Cleo Moss", ("Ada Kline", "Bela Lund", "Cleo Moss"), True),
        ("[ada kline, 'bela lund', cleo moss]", ("Ada Kline", "Bela Lund", "Cleo Moss"), True),
        ("Bela Lund, Ada Kline, Cleo Moss", ("Ada Kline", "Bela Lund", "Cleo Moss"), False),
        ("Ada Kline, Bela Lund", ("Ada Kline", "Bela Lund", "Cleo Moss"), False),
    ],
)
def test_answers_are_compared_by_value(given: str, expected: Any, right: bool) -> None:
    assert equals(given, expected) is right


def test_the_corpus_shows_every_kind_of_text() -> None:
    text = "\n".join(corpus(SqlTasks(Options()), shops=2))
    assert all(kind.text.split("{")[0] in text for kind in KINDS.values())
    for part in ("error: rate limit", "former_", " INTEGER -> ", '{"sql": "SELECT ', "error: no such column"):
        assert part in text
    assert QUERIES.keys() == KINDS.keys()
