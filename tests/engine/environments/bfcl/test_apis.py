"""The APIs of BFCL: schemas, gold calls, and calls by name that can reach nothing else."""

from __future__ import annotations

import decimal
from typing import Any

import pytest

from slipstream.environments.bfcl.apis import Apis, json_schema, methods, read_call, spelled

PARAMETERS = {"sort": ("file_name",), "mv": ("source", "destination")}


def test_schemas_become_json_schemas() -> None:
    described = {
        "type": "dict",
        "properties": {
            "price": {"type": "float", "description": "In dollars. "},
            "tags": {"type": "array", "items": {"type": "tuple", "items": {"type": "any"}}},
            "count": {"type": "integer", "default": 3},
        },
        "required": ["price"],
    }
    assert json_schema(described) == {
        "type": "object",
        "properties": {
            "price": {"type": "number", "description": "In dollars."},
            "tags": {"type": "array", "items": {"type": "array", "items": {}}},
            "count": {"type": "integer", "default": 3},
        },
        "required": ["price"],
    }


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("sort('a.txt')", ("sort", {"file_name": "a.txt"})),
        ("mv('a', destination=\"b's\")", ("mv", {"source": "a", "destination": "b's"})),
        ("mv(source=[1, -2.5], destination={})", ("mv", {"source": [1, -2.5], "destination": {}})),
    ],
)
def test_gold_calls_are_read(text: str, call: tuple[str, dict[str, Any]]) -> None:
    assert read_call(text, PARAMETERS.__getitem__) == call


@pytest.mark.parametrize("text", ["sort", "os.remove('a')", "sort(open('a'))", "sort(__import__('os'))"])
def test_what_is_more_than_a_call_with_literals_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        read_call(text, PARAMETERS.__getitem__)


def test_results_are_spelled_as_the_executor_spells_them() -> None:
    assert spelled({"a": True}) == '{"a": true}'
    assert spelled({"a": {1}}) == "{'a': {1}}"
    assert spelled("plain") == "plain"
    assert spelled(None) == "None"
    assert spelled([1, "a"]) == "[1, 'a']"


@pytest.fixture
def math() -> Apis:
    pytest.importorskip("bfcl_eval")
    return Apis(["MathAPI"], {}, long_context=False)


def test_a_call_goes_to_its_method(math: Apis) -> None:
    assert math.call("add", {"a": 1, "b": 2}) == ('{"result": 3}', True)
    assert math.call("add", {"a": 1}) == (
        "Error during execution: MathAPI.add() missing 1 required positional argument: 'b'",
        False,
    )


@pytest.mark.parametrize("name", ["__init__", "_api_description", "__class__", "eval", "add.__call__", "cd"])
def test_only_public_methods_of_the_episodes_apis_can_be_called(math: Apis, name: str) -> None:
    assert math.call(name, {}) == (f"Error during execution: name '{name}' is not defined", False)


@pytest.mark.parametrize(
    ("name", "arguments", "blamed"),
    [
        ("power", {"base": 9, "exponent": 10**9}, "exponent"),
        ("power", {"base": 10**60, "exponent": 2}, "base"),
        ("logarithm", {"value": 2, "base": 10, "precision": 10**9}, "precision"),
        ("sum_values", {"numbers": [1, 10**4000]}, "numbers"),
    ],
)
def test_numbers_that_take_hours_are_refused(
    math: Apis, name: str, arguments: dict[str, Any], blamed: str
) -> None:
    assert math.call(name, arguments) == (f"Error during execution: {blamed} is too large", False)


def test_precision_stays_in_the_call(math: Apis) -> None:
    import mpmath

    before = decimal.getcontext().prec, mpmath.mp.dps
    assert math.call("logarithm", {"value": 20, "base": 10, "precision": 2})[0] == "{'result': mpf('1.3027')}"
    math.call("square_root", {"number": 2, "precision": 3})
    assert (decimal.getcontext().prec, mpmath.mp.dps) == before


def test_arguments_belong_to_the_caller() -> None:
    pytest.importorskip("bfcl_eval")
    twitter = {"username": "a", "password": "b", "authenticated": True, "tweets": {}, "tweet_counter": 0}
    apis = Apis(["TwitterAPI"], {"TwitterAPI": twitter}, long_context=False)
    tags = ["#one"]
    assert apis.call("post_tweet", {"content": "hello", "tags": tags})[1]
    apis.instances["TwitterAPI"].tweets[0]["tags"].append("#two")
    assert tags == ["#one"]


def test_methods_know_their_parameters() -> None:
    pytest.importorskip("bfcl_eval")
    assert methods("MathAPI")["power"] == ("base", "exponent")
    assert not [name for name in methods("GorillaFileSystem") if name.startswith("_")]
