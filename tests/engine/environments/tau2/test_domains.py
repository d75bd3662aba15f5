"""The domains: schemas, a calculator that evaluates nothing, and worlds that agree with the package's."""

from __future__ import annotations

import os

import pytest
from jsonschema import Draft202012Validator

from slipstream.environments.tau2.domains import Domain, calculated, domain_of, inlined
from slipstream.environments.tau2.judge import begun


def test_references_are_put_in_their_place() -> None:
    schema = {
        "$defs": {
            "Mode": {"enum": ["fast", "slow"], "title": "Mode", "type": "string"},
            "Setting": {"properties": {"title": {"$ref": "#/$defs/Mode"}}, "title": "Setting"},
        },
        "properties": {"all": {"items": {"anyOf": [{"$ref": "#/$defs/Setting"}, {"type": "string"}]}}},
        "title": "parameters",
    }
    mode = {"enum": ["fast", "slow"], "type": "string"}
    assert inlined(schema) == {
        "properties": {"all": {"items": {"anyOf": [{"properties": {"title": mode}}, {"type": "string"}]}}},
        "required": [],
    }


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2 * (3 + 4)", "14.0"), ("-1.005 + 1 / 3", "-0.67"), (" 7 // 2 ", "3.0"), ("+5", "5.0")],
)
def test_sums_are_calculated(expression: str, value: str) -> None:
    assert calculated(expression) == (value, True)


@pytest.mark.parametrize(
    "expression", ["", "9**9**9", "1/0", "x", "(1).real", "print(1)", "True", "1,2", "(" * 999, "'a'"]
)
def test_what_is_no_sum_is_refused(expression: str) -> None:
    assert calculated(expression) == ("Error: Invalid expression", False)


def domain(name: str) -> Domain:
    pytest.importorskip("tau2")
    pytest.importorskip("loguru")
    return domain_of(name)


@pytest.mark.parametrize(("name", "tools"), [("retail", 15), ("telecom", 43)])
def test_tools_are_told_with_schemas_that_hold_alone(name: str, tools: int) -> None:
    found = domain(name)
    assert len(found.tools) == tools and found.writing < found.names
    for spec in found.tools:
        for part in spec.parameters["properties"].values():
            Draft202012Validator.check_schema(part)
            assert "$ref" not in str(part)


def test_reading_the_package_leaves_no_trace() -> None:
    domain("retail")
    assert "PYTHON_DOTENV_DISABLED" not in os.environ


def test_worlds_are_apart_and_their_digest_is_the_packages_hash() -> None:
    retail = domain("retail")
    from tau2.data_model.message import ToolCall
    from tau2.domains.retail.environment import get_environment

    splits, tasks = retail.tasks()
    theirs, untouched = get_environment(), retail.fresh().digest()
    assert untouched == theirs.get_db_hash()
    world = retail.fresh()
    refused = 0
    # One after the other: each task finds what the others left behind.
    for identifier in splits["base"]:
        for action in tasks[identifier]["evaluation_criteria"]["actions"]:
            said, well = world.call(action["name"], action["arguments"])
            response = theirs.get_response(ToolCall(name=action["name"], arguments=action["arguments"]))
            assert (said, well) == (response.content, not response.error)
            refused += not well
    assert refused and world.digest() == theirs.get_db_hash() != untouched
    assert retail.fresh().digest() == untouched


@pytest.mark.parametrize("name", ["_get_order", "db", "update_db", "get_db_hash", "__class__", "use_tool"])
def test_only_tools_can_be_called(name: str) -> None:
    assert domain("retail").fresh().call(name, {}) == (f"Error: Tool '{name}' not found.", False)


def test_bills_are_numbered_in_order() -> None:
    """The package draws the number of a new bill by chance."""
    telecom = domain("telecom")
    data = telecom.fresh().environment.tools.db
    known = {bill.bill_id for bill in data.bills}

    def refuelled(customer: str, line: str) -> tuple[str, set[str]]:
        world = telecom.fresh()
        arguments = {"customer_id": customer, "line_id": line, "gb_amount": 2.0}
        assert world.call("refuel_data", arguments)[1]
        changed = world.environment.tools.db
        bills = {bill.bill_id for bill in changed.bills}
        assert bills >= {bill for one in changed.customers for bill in one.bill_ids}
        return world.digest(), bills - known

    lines = [(customer.customer_id, line) for customer in data.customers for line in customer.line_ids]
    new = [bills for _, bills in (refuelled(*line) for line in lines) if bills]
    assert new and all(bills == {f"B{len(known):08d}"} for bills in new)
    assert [refuelled(*line) for line in lines] == [refuelled(*line) for line in lines]


def test_preparations_make_something_wrong() -> None:
    telecom = domain("telecom")
    start = [{"env_type": "user", "func_name": "turn_airplane_mode_on", "arguments": {}}]
    broken, well = begun(telecom, start), begun(telecom, [])
    assert "Airplane Mode" in broken.call("check_status_bar", {})[0]
    assert "Airplane Mode" not in well.call("check_status_bar", {})[0]
