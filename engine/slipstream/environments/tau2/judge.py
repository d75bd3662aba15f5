"""Floor 4. Was the task done? The criteria of τ² that need no language model.

    DB               the database is, row by row, what the gold actions make of a fresh one
    ENV_ASSERTION    every assertion about phone and company holds
    ACTION           every gold action was made, with its arguments
    COMMUNICATE      every piece of information stands in some message to the customer, commas aside

A task says which of them count, by default DB and COMMUNICATE. Its assertions in natural language are never
among them in these domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from slipstream.environments.tau2.domains import Domain, World

DEFAULT: Final = ("DB", "COMMUNICATE")


def judged(
    criteria: Mapping[str, Any],
    world: World,
    expected: str,
    calls: Sequence[tuple[str, Mapping[str, Any]]],
    said: Sequence[str],
) -> dict[str, bool]:
    """Return whether each criterion that counts is met.

    expected: digest of the database that the gold actions lead to; calls, said: what the agent did and told.
    """
    kinds = basis(criteria)
    met = {}
    if "DB" in kinds:
        met["DB"] = world.digest() == expected
    if "ENV_ASSERTION" in kinds:
        met["ENV_ASSERTION"] = all(_holds(world, one) for one in criteria.get("env_assertions") or ())
    if "ACTION" in kinds:
        met["ACTION"] = all(_made(action, calls) for action in criteria.get("actions") or ())
    if "COMMUNICATE" in kinds:
        told = [text.lower().replace(",", "") for text in said]
        met["COMMUNICATE"] = all(
            any(info.lower() in text for text in told) for info in criteria.get("communicate_info") or ()
        )
    return met


def basis(criteria: Mapping[str, Any]) -> Sequence[str]:
    """Return which criteria of a task count."""
    return criteria.get("reward_basis") or DEFAULT


def expected_digest(domain: Domain, criteria: Mapping[str, Any], start: Sequence[Mapping[str, Any]]) -> str:
    """Return the digest of the database after the gold actions; what one of them refuses stays undone."""
    world = begun(domain, start)
    for action in criteria.get("actions") or ():
        world.call(action["name"], action["arguments"])
    return world.digest()


def begun(domain: Domain, start: Sequence[Mapping[str, Any]]) -> World:
    """Return a fresh world in which a task's preparations have been made."""
    from tau2.data_model.tasks import EnvFunctionCall

    world = domain.fresh()
    for call in start:
        world.environment.run_env_function_call(EnvFunctionCall.model_validate(call))
    return world


def _holds(world: World, assertion: Mapping[str, Any]) -> bool:
    from tau2.data_model.tasks import EnvAssertion

    checked = EnvAssertion.model_validate(assertion)
    return bool(world.environment.run_env_assertion(checked, raise_assertion_error=False))


def _made(action: Mapping[str, Any], calls: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
    from tau2.data_model.message import ToolCall
    from tau2.data_model.tasks import Action

    wanted = Action.model_validate(action)
    return any(
        wanted.compare_with_tool_call(ToolCall(name=name, arguments=dict(arguments)))
        for name, arguments in calls
    )
