"""@tool: schemas from annotations, results as text, and what a failing tool shows the policy."""

from __future__ import annotations

import asyncio
import datetime
import logging
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from authored_worlds import QUIET, opened, say, scores, world
from pydantic import BaseModel, Field

from slipstream.authoring.episode import Episode
from slipstream.authoring.tools import Tool, tool, tool_call
from slipstream.config import EnvironmentConfig, SandboxConfig
from slipstream.errors import ConfigurationError, InfrastructureError, ToolError
from slipstream.types import ToolStatus


class Place(BaseModel):
    city: str
    zip: int = 0


class Unit(Enum):
    KM = "km"
    MILE = "mile"


def refusal(function: Any, **marks: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        tool(**marks)(function)
    return str(caught.value)


def test_the_schema_is_what_the_annotations_say() -> None:
    @tool
    def find(
        query: Annotated[str, Field(description="words to look for")],
        kind: Literal["page", "image"],
        limit: int = 5,
        tags: list[str] | None = None,
        *,
        exact: bool = False,
    ) -> list[str]:
        """Find pages
        by words.

        More for readers of the code.
        """
        return [query]

    assert find.name == "find"
    assert find.spec.description == "Find pages by words."
    assert find.spec.parameters == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "words to look for"},
            "kind": {"type": "string", "enum": ["page", "image"]},
            "limit": {"type": "integer", "default": 5},
            "tags": {
                "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                "default": None,
            },
            "exact": {"type": "boolean", "default": False},
        },
        "required": ["query", "kind"],
        "additionalProperties": False,
    }
    assert find("x", "page") == ["x"]


def test_models_and_enumerations_stand_in_the_schema_without_references() -> None:
    @tool
    def go(to: Place, unit: Unit = Unit.KM) -> str:
        return f"{to.city} {unit.value}"

    properties = go.spec.parameters["properties"]
    assert properties["to"]["properties"]["city"] == {"type": "string"}
    assert properties["unit"]["enum"] == ["km", "mile"]
    made = opened(world([go]))
    assert say(made, go.call(to={"city": "Ulm"}, unit="mile")).observation == "Ulm mile"
    assert "error: argument to" in say(made, go.call(to={"town": "Ulm"})).observation


def test_an_argument_may_be_called_like_a_method_of_a_model() -> None:
    @tool
    def copy(json: str, model_id: int) -> str:
        return f"{json} {model_id}"

    assert say(opened(world([copy])), copy.call(json="x", model_id=3)).observation == "x 3"


def test_the_episode_is_passed_and_not_in_the_schema() -> None:
    @tool(version="2")
    async def look(episode: Episode, where: str) -> str:
        await asyncio.sleep(0)
        return f"{where}: {sorted(episode.task.data)}"

    assert list(look.spec.parameters["properties"]) == ["where"]
    assert (look.pure, look.version, look.episode) == (False, "2", "episode")
    assert say(opened(world([look])), look.call(where="here")).observation == "here: ['hint']"


def test_what_cannot_be_a_tool_is_refused_in_one_sentence() -> None:
    def bare(x) -> str:  # type: ignore[no-untyped-def]
        return str(x)

    def many(*words: str) -> str:
        return "".join(words)

    def odd(thing: ConfigurationError) -> str:
        return str(thing)

    def stateful(episode: Episode) -> str:
        return str(episode)

    assert refusal(bare) == "tool bare: parameter x must have an annotation, such as x: str"
    assert refusal(many) == "tool many: parameter words must be one that can be named, got *words: 'str'"
    assert refusal(odd).startswith("tool odd: ")
    assert refusal(stateful, pure=True).startswith("tool stateful: pure=True says that results depend on")
    with pytest.raises(ConfigurationError, match="two tools are called add; rename one"):
        world([add, add])


@tool(pure=True)
def add(a: int, b: int = 1) -> int:
    """Add numbers."""
    return a + b


def test_a_default_is_optional_and_a_wrong_argument_is_the_policys_mistake() -> None:
    made = opened(world([add]))
    moved = say(made, tool_call("add", a=2))
    assert (moved.observation, moved.reward) == ("3", -0.05)
    assert moved.call is not None and moved.call.status is ToolStatus.OK
    refused = say(made, tool_call("add", a="two"))
    assert refused.observation == "error: argument a: 'two' is not of type 'integer'"
    assert (refused.reward, refused.call) == (-0.25, None)
    assert scores(made)["invalid"].value == 1.0


@dataclass
class Point:
    x: int
    when: datetime.date


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("as it is\n", "as it is\n"),
        (None, "ok"),
        (3.5, "3.5"),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        (Place(city="Ulm"), '{"city":"Ulm","zip":0}'),
        (Point(1, datetime.date(2026, 1, 2)), '{"x":1,"when":"2026-01-02"}'),
        (float("nan"), "null"),
        ("\ud800", "?"),
    ],
)
def test_a_result_is_text_or_json(value: Any, shown: str) -> None:
    @tool
    def give() -> Any:
        return value

    assert say(opened(world([give])), give.call()).observation == shown


def test_a_result_that_json_does_not_know_is_a_standard_error(caplog: pytest.LogCaptureFixture) -> None:
    @tool
    def opaque() -> object:
        return object()

    moved = say(opened(world([opaque])), opaque.call())
    assert moved.observation == "error: tool failed with a result of type object"
    assert moved.call is not None and moved.call.status is ToolStatus.CRASHED
    assert "tool opaque returned object, which is neither text nor JSON" in caplog.text


def test_megabytes_are_cut_and_counted() -> None:
    @tool
    def flood() -> str:
        return "x" * (8 << 20)

    config = EnvironmentConfig(name="own", limits=SandboxConfig(observation_chars=64))
    moved = say(opened(world([flood]), config), flood.call())
    assert moved.observation == "x" * 64 + "\n[cut at 64 characters]"
    assert moved.call is not None and moved.call.cut


def test_a_tool_error_shows_its_words() -> None:
    @tool
    def locked() -> str:
        raise ToolError("no such document")

    moved = say(opened(world([locked])), locked.call())
    assert moved.observation == "error: no such document"
    assert moved.call is not None and moved.call.status is ToolStatus.ERROR


def test_any_other_exception_is_a_standard_error_and_undoes_what_it_did(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @tool
    def breaks(episode: Episode) -> str:
        episode.state["seen"].append(1)
        episode.end("secret")
        raise KeyError("the answer is Oslo")

    def setup(episode: Episode) -> None:
        episode.state["seen"] = [0]

    made = opened(world([breaks], setup=setup))
    with caplog.at_level(logging.WARNING):
        moved = say(made, breaks.call())
    assert (moved.observation, moved.done) == ("error: tool failed with KeyError", False)
    assert moved.call is not None and moved.call.status is ToolStatus.CRASHED
    assert made.state()["state"] == {"seen": [0]}  # type: ignore[attr-defined]
    assert "Traceback" in caplog.text and "the answer is Oslo" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"), [(FileNotFoundError("x"), "crashed"), (ConnectionResetError("x"), "raised")]
)
def test_a_wrong_path_is_the_tools_and_a_lost_connection_the_grounds(error: OSError, status: str) -> None:
    @tool
    def read() -> str:
        raise error

    made = opened(world([read]))
    if status == "raised":
        with pytest.raises(ConnectionResetError):
            say(made, read.call())
        return
    assert say(made, read.call()).observation == "error: tool failed with FileNotFoundError"


def test_infrastructure_fails_through() -> None:
    @tool
    def ask() -> str:
        raise InfrastructureError("database gone")

    with pytest.raises(InfrastructureError, match="database gone"):
        say(opened(world([ask])), ask.call())


def test_state_that_is_not_plain_is_said_with_its_place() -> None:
    @tool
    def connect(episode: Episode) -> str:
        episode.state["db"] = [object()]
        return "ok"

    with pytest.raises(ConfigurationError) as caught:
        say(opened(world([connect])), connect.call())
    assert str(caught.value) == (
        "tool connect: episode.state['db'][0] must be plain data (None, booleans, numbers, text, lists, "
        "dictionaries with text keys), got object; keep it elsewhere, or say environment(..., "
        "resumable=False), which goes without retries of a step and without a sandbox"
    )
    assert say(opened(world([connect], resumable=False)), connect.call()).observation == "ok"


def test_failures_for_training_hit_the_tools_that_may_fail() -> None:
    @tool(may_fail=True)
    def flaky() -> str:
        return "fine"

    always = EnvironmentConfig(name="own", tool_failure_rate=1.0)
    assert say(opened(world([flaky]), always), flaky.call()).observation in (
        "error: timeout",
        "error: unavailable",
        "error: rate limit",
    )
    assert say(opened(world([add]), always), add.call(a=1)).observation == "2"
    assert say(opened(world([flaky]), QUIET), flaky.call()).observation == "fine"


def test_a_tool_is_a_plain_object() -> None:
    assert isinstance(add, Tool)
    assert add.call(a=1, b=2) == tool_call("add", a=1, b=2)


def test_what_blocks_may_run_in_a_thread_of_its_own() -> None:
    import threading

    @tool(thread=True)
    def where() -> bool:
        return threading.current_thread() is threading.main_thread()

    assert say(opened(world([where])), where.call()).observation == "false"
