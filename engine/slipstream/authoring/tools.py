"""Floor 4. `@tool`: a typed function as a tool, with its schema, and its result as text.

    annotation                              schema
    str, int, float, bool, list[...]        as pydantic has it
    Literal["a", "b"]                       an enumeration
    a default                               the argument may be left out
    Annotated[str, Field(description=..)]   a description
    Episode                                 none: the episode itself is passed

    raised                                  what the policy reads          status
    ToolError("no such document")           error: no such document        error
    InfrastructureError, most of OSError    nothing: the ground failed (ground.py)
    anything else                           error: tool failed with KeyError    crashed; traceback in the log

Of OSError, those that a wrong path gives (missing, forbidden, a folder) are the tool's and not the ground's.
What a tool changed in the episode's state before it failed is undone.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, get_type_hints, overload

from pydantic import BaseModel, ConfigDict, PydanticUserError, ValidationError, create_model
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError, to_json

from slipstream.authoring.episode import Episode
from slipstream.errors import ConfigurationError, InfrastructureError, ToolError
from slipstream.foreign import Contained, settled
from slipstream.interfaces import ToolSpec
from slipstream.tools.hermes import format_call
from slipstream.types import ToolStatus

Function = Callable[..., Any]
CUT: Final = "\n[cut at {} characters]"
_OF_A_PATH: Final = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
_LOGGED_EACH: Final = 3
"""Tracebacks of a tool's same error in the log; the rest are only counted."""
_crashes: Counter[tuple[str, str]] = Counter()

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a call came to."""

    text: str
    status: ToolStatus
    cut: bool = False
    """Whether the text was longer than it may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function as a tool; calling it calls the function."""

    spec: ToolSpec
    function: Function
    pure: bool = False
    """Its result depends on its arguments alone: it may be kept and given again."""
    version: str = "1"
    """Counts up when it answers otherwise than before: results kept of other versions are not given."""
    may_fail: bool = False
    """Whether environment.tool_failure_rate is about it."""
    thread: bool = False
    """Whether it runs in a thread of its own: what blocks holds all episodes of an actor up otherwise."""
    arguments: type[BaseModel] = BaseModel
    """What its arguments are checked and converted by."""
    episode: str = ""
    """Name of the parameter that takes the episode; empty: none does."""

    @property
    def name(self) -> str:
        """The function's name."""
        return self.spec.name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the function itself."""
        return self.function(*arguments, **named)

    def call(self, **arguments: Any) -> str:
        """Return the text of a call, for a script to yield."""
        return format_call(self.name, arguments)

    async def result(self, arguments: Mapping[str, Any], episode: Episode) -> Any:
        """Call it as the policy asks; raises ToolError for arguments that its annotations refuse."""
        try:
            checked = self.arguments.model_validate(dict(arguments))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ToolError(f"argument {place}: {first['msg']}") from None
        named = {name: getattr(checked, name) for name in type(checked).model_fields}
        if self.episode:
            named[self.episode] = episode
        if self.thread:
            return await asyncio.to_thread(self.function, **named)
        return await settled(self.function(**named))

    async def run(self, arguments: Mapping[str, Any], episode: Episode, *, most_chars: int) -> Result:
        """Carry a call out; raises only what fails its ground (InfrastructureError, OSError)."""
        value: Any = None
        with Contained(InfrastructureError) as ran:
            value = await self.result(arguments, episode)
        match ran.error:
            case None:
                return _shown(self.name, value, most_chars)
            case ToolError() as refusal:
                return Result(text=f"error: {refusal}", status=ToolStatus.ERROR)
            case OSError() as failure if not isinstance(failure, _OF_A_PATH):
                raise failure
            case error:
                return self._crashed(error)

    def _crashed(self, error: Exception) -> Result:
        kind = type(error).__name__
        _crashes[self.name, kind] += 1
        if _crashes[self.name, kind] <= _LOGGED_EACH:
            log.warning("tool %s failed with %s", self.name, kind, exc_info=error)
        return Result(text=f"error: tool failed with {kind}", status=ToolStatus.CRASHED)


@overload
def tool(function: Function) -> Tool:
    """Make a tool of a function."""


@overload
def tool(
    *, pure: bool = ..., version: str = ..., may_fail: bool = ..., thread: bool = ...
) -> Callable[[Function], Tool]:
    """Return what makes a tool of a function."""


def tool(
    function: Function | None = None,
    *,
    pure: bool = False,
    version: str = "1",
    may_fail: bool = False,
    thread: bool = False,
) -> Tool | Callable[[Function], Tool]:
    """Make a tool of a function, sync or async: name, schema and description are the function's own.

    pure, version, thread: as in `Tool`; may_fail: whether seeded failures for training hit it. Raises
    ConfigurationError for a parameter without annotation, or of a type that JSON schema does not know.

    Example: ``@tool(pure=True, version="2")`` above ``def add(a: int, b: int = 1) -> int:``.
    """

    def made(function: Function) -> Tool:
        fields, episode = _parameters(function)
        model = _model(function, fields)
        if pure and episode:
            raise ConfigurationError(
                f"tool {function.__name__}: pure=True says that results depend on the arguments alone, but "
                f"it takes the episode as {episode}; leave one of them out"
            )
        spec = ToolSpec(
            name=function.__name__,
            description=inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].replace("\n", " "),
            parameters=_schema(function, model),
        )
        return Tool(
            spec=spec,
            function=function,
            pure=pure,
            version=version,
            may_fail=may_fail,
            thread=thread,
            arguments=model,
            episode=episode,
        )

    return made if function is None else made(function)


def tool_call(name: str, **arguments: Any) -> str:
    """Return the text of a call, for a script to yield.

    Example: ``result = yield tool_call("search", query="Ada")``.
    """
    return format_call(name, arguments)


def _parameters(function: Function) -> tuple[dict[str, Any], str]:
    """Return pydantic's fields of a function's parameters, and the one that takes the episode."""
    where = f"tool {function.__name__}"
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ConfigurationError(f"{where}: {error}; annotations must name what its module defines") from None
    fields: dict[str, Any] = {}
    episode = ""
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigurationError(
                f"{where}: parameter {name} must be one that can be named, got {parameter}"
            )
        if name not in hints:
            raise ConfigurationError(
                f"{where}: parameter {name} must have an annotation, such as {name}: str"
            )
        if hints[name] is Episode:
            episode = name
        else:
            fields[name] = (hints[name], ... if parameter.default is parameter.empty else parameter.default)
    return fields, episode


def _model(function: Function, fields: Mapping[str, Any]) -> type[BaseModel]:
    try:
        # Lax enough for a model that writes 3.0 for an integer; the schema has refused what is worse.
        config = ConfigDict(extra="forbid", protected_namespaces=())
        with warnings.catch_warnings():
            # An argument may be called like a method of pydantic's models, such as `json`.
            warnings.simplefilter("ignore", UserWarning)
            made: type[BaseModel] = create_model(function.__name__, __config__=config, **fields)
    except (PydanticUserError, NameError, TypeError) as error:
        raise ConfigurationError(f"tool {function.__name__}: {str(error).splitlines()[0]}") from None
    return made


class _Schema(GenerateJsonSchema):
    """Without titles, which repeat the names of arguments."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


def _schema(function: Function, model: type[BaseModel]) -> dict[str, Any]:
    try:
        schema = model.model_json_schema(schema_generator=_Schema)
    except PydanticInvalidForJsonSchema as error:
        raise ConfigurationError(f"tool {function.__name__}: {str(error).splitlines()[0]}") from None
    kept = {key: value for key, value in schema.items() if key in ("type", "properties", "required", "$defs")}
    kept.setdefault("properties", {})
    kept["additionalProperties"] = False
    inlined: dict[str, Any] = _inlined(kept, kept.pop("$defs", {}), function.__name__)
    return inlined


def _inlined(schema: Any, known: Mapping[str, Any], name: str, _inside: tuple[str, ...] = ()) -> Any:
    """Return a schema with its references replaced by what they name: each argument is checked alone."""
    if isinstance(schema, list):
        return [_inlined(item, known, name, _inside) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        target = schema["$ref"].rpartition("/")[2]
        if target in _inside:
            raise ConfigurationError(f"tool {name}: the type {target} holds itself, which no call can spell")
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        inlined: dict[str, Any] = _inlined(known[target], known, name, (*_inside, target))
        return {**inlined, **rest}
    return {key: _inlined(value, known, name, _inside) for key, value in schema.items()}


def _shown(name: str, value: Any, most_chars: int) -> Result:
    """Return a result as text: text as it is, None as "ok", anything else as JSON; cut if it is too long."""
    if value is None:
        return Result(text="ok", status=ToolStatus.OK)
    if isinstance(value, str):
        text = value
    else:
        try:
            text = to_json(value, inf_nan_mode="null").decode()
        except (PydanticSerializationError, ValueError, RecursionError):
            log.warning("tool %s returned %s, which is neither text nor JSON", name, type(value).__name__)
            kind = type(value).__name__
            return Result(text=f"error: tool failed with a result of type {kind}", status=ToolStatus.CRASHED)
    cut = len(text) > most_chars
    if cut:
        text = text[:most_chars] + CUT.format(most_chars)
    # Half of a surrogate pair has no bytes, and no tokens.
    return Result(text=text.encode("utf-8", "replace").decode(), status=ToolStatus.OK, cut=cut)
