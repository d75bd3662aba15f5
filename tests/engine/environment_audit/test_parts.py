"""The parts of an audit: values from schemas, what a leak is, faults of schemas, wrapped tasks, letters."""

from __future__ import annotations

import random
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from slipstream.environment_audit.answers import answers_of
from slipstream.environment_audit.form import _schema_faults, _wraps, spelled
from slipstream.environment_audit.leaks import Told, leak_of
from slipstream.environment_audit.letters import Letters
from slipstream.environment_audit.samples import Constant, Drawn, value_of
from slipstream.interfaces import ToolSpec
from slipstream.types import Split, Task

PLACE = {
    "type": "object",
    "properties": {"x": {"type": "number", "minimum": 0, "maximum": 1}},
    "required": ["x"],
}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "string", "minLength": 5, "maxLength": 9},
    {"enum": ["red", "green", 3]},
    {"const": {"a": 1}},
    {"type": "integer", "minimum": 7, "exclusiveMaximum": 9},
    {"type": "integer", "multipleOf": 25, "minimum": 30, "maximum": 60},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": ["boolean", "null"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"anyOf": [{"type": "null"}, {"type": "string"}]},
    {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Place"}},
        "required": ["at"],
        "$defs": {"Place": PLACE},
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_values_are_as_their_schema_says(schema: dict[str, Any]) -> None:
    validator = Draft202012Validator(schema)
    drawn = Drawn(random.Random(3), ["Ada", "lives"])
    values = [value_of(schema, drawn) for _ in range(50)]
    values += [value_of(schema, Constant(text)) for text in ("zzz", "", "7", "yes", "x" * 1000)]
    assert all(validator.is_valid(value) for value in values)


def test_a_constant_is_as_near_to_itself_as_its_type_lets_it() -> None:
    properties = {
        kind: {"type": kind} for kind in ("string", "integer", "number", "boolean", "null", "array")
    }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    told = value_of(schema, Constant("1"))
    assert told == {"string": "1", "integer": 1, "number": 1.0, "boolean": True, "null": None, "array": ["1"]}
    assert value_of({"enum": ["no", "yes"]}, Constant("yes")) == "yes"
    assert value_of({**schema, "required": []}, Constant("zzz")) == {}


def test_equal_seeds_draw_equal_values() -> None:
    def draw(seed: int) -> list[Any]:
        drawn = Drawn(random.Random(seed), ["a", "b", "c"])
        return [value_of({"type": "string"}, drawn) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


def tool(**parameters: Any) -> ToolSpec:
    return ToolSpec(name="look", description="Looks", parameters={"type": "object", **parameters})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (tool(properties={"a": {"type": "strin"}}), "parameters are no JSON schema: 'strin' is not valid"),
        (tool(type="string"), 'expected parameters of type "object"'),
        (tool(properties={}, required=["a"]), "requires a, which is none of its properties"),
        (tool(properties={"a": {"$ref": "#/$defs/A"}}), "argument a refers beyond itself"),
        (ToolSpec(name="", description="", parameters={"type": "object"}), "expected a tool's name"),
        (ToolSpec(name="é" * 3, description="", parameters={"type": "object"}), "got 'ééé'"),
    ],
)  # fmt: skip
def test_faults_of_schemas(given: ToolSpec, words: str) -> None:
    (fault,) = _schema_faults([given])
    assert words in fault


def told(*pairs: tuple[str, str]) -> list[Told]:
    return [Told(answers=(answer,), text=text) for answer, text in pairs]


def test_a_leak_is_what_texts_tell_beyond_chance() -> None:
    cities = ("Oslo", "Rome", "Bern", "Lima", "Cork")
    common = leak_of(told(*((city, "Oslo, Rome, Bern, Lima or Cork?") for city in cities)))
    assert (common.own, common.foreign, common.excess) == (1.0, 1.0, 0.0)
    given = leak_of(told(*((city, f"Where? (id {i}, answer: {city})") for i, city in enumerate(cities))))
    assert (given.own, given.foreign, given.by_rule) == (1.0, 0.0, 1.0)
    assert "answer: " in given.rule
    # One of two options is the answer: it stands there, but no rule tells which of them it is.
    texts = [
        f"{a} or {b}?" if i % 2 else f"{b} or {a}?"
        for i, (a, b) in enumerate(zip(cities, "ABCDE", strict=True))
    ]
    options = leak_of(told(*zip(cities, texts, strict=True)))
    assert options.own == 1.0 and options.by_rule < 1.0
    # Part of a word is not the word.
    assert leak_of(told(("art", "party"), ("he", "the"))).own == 0.0


def task(**data: Any) -> Task:
    return Task(split=Split.TRAIN, index=0, question="?", data=data)


def test_answers_are_secrets_and_what_is_called_so() -> None:
    assert answers_of(task(answer="Oslo", world=3), ()) == ("Oslo",)
    assert answers_of(task(city="Oslo", facts=["17", "4"]), ("city", "facts")) == ("Oslo",)
    assert answers_of(task(answers=["Oslo", "Christiania", 7], right=True), ("right",)) == (
        "Oslo",
        "Christiania",
        "7",
    )
    assert answers_of(task(answer=3, code="1 + 2"), ("answer", "code")) == ("3",)
    assert answers_of(task(answer=" ", solution="x" * 500, question="Oslo"), ()) == ()


def test_tasks_are_equal_by_what_they_pose() -> None:
    assert spelled(task(a=1, b={"x", "y"})) == spelled(task(b={"y", "x"}, a=1))
    assert spelled(task(a=object())) == spelled(task(a=object()))
    assert spelled(task(a=1)) != spelled(task(a="1"))


def test_tasks_that_begin_again_wrap() -> None:
    assert _wraps(list("abcabcab"))
    assert not _wraps(list("abcabdab"))
    assert not _wraps(list("abbbbbbb"))
    assert not _wraps(list("abcdefgh"))


@pytest.mark.parametrize("text", ["", "hello", "\0\n", "é🧪", "<|im_end|>", "\ud800"])
def test_letters_spell_what_was_said(text: str) -> None:
    letters = Letters()
    said = letters.message(text)
    assert len(said) == len(text) + 1 and said[-1] == letters.stop_token
    assert letters.text(said) == text
