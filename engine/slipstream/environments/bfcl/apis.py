"""Floor 4. The tool APIs of BFCL: plain Python objects, called by name from an allow-list, never by text.

The package's own executor evaluates text that a model wrote and keeps its objects in module globals. Here a
call is a name and keyword arguments; only the methods that an episode allows can be reached. What is returned
is spelled as the executor spells it, since the response check compares spellings.
"""

from __future__ import annotations

import ast
import decimal
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import lru_cache
from typing import Any, Final

MATH: Final = "MathAPI"
RAISED: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What code that a policy feeds may raise; the policy reads it."""
MOST_DIGITS: Final = 50
MOST: Final[Mapping[str, float]] = {"precision": 1000, "exponent": 1000, "decimal_places": 1000}
"""Largest size of a number of these names; larger ones would keep a processor busy for hours."""
_TYPES: Final = {"dict": "object", "float": "number", "tuple": "array", "any": ""}

Call = tuple[str, Mapping[str, Any]]
"""A tool's name and its arguments."""


def json_schema(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema of BFCL as a JSON schema: "dict" is an object, "float" a number, "any" says nothing.

    Example: ``json_schema({"type": "float"}) == {"type": "number"}``.
    """
    schema = {key: value for key, value in described.items() if key != "type"}
    kind = described.get("type", "any")
    kind = _TYPES.get(kind, kind)
    if kind:
        schema = {"type": kind, **schema}
    if "properties" in schema:
        schema["properties"] = {name: json_schema(one) for name, one in schema["properties"].items()}
    if "items" in schema:
        schema["items"] = json_schema(schema["items"])
    if "description" in schema:
        schema["description"] = schema["description"].strip()
    return schema


def api_class(name: str) -> type:
    """Return the class of an API by its name in BFCL."""
    from bfcl_eval.constants.executable_backend_config import CLASS_FILE_PATH_MAPPING

    found: type = getattr(importlib.import_module(CLASS_FILE_PATH_MAPPING[name]), name)
    return found


def read_call(text: str, signature: Callable[[str], Sequence[str]]) -> Call:
    """Return a gold call such as ``sort('a.txt')``; `signature` names the parameters of a tool in order.

    Raises ValueError for anything but one call of a name with literals.
    """
    node = ast.parse(text, mode="eval").body
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"expected one call, got {text!r}")
    name = node.func.id
    positional = zip(signature(name), node.args, strict=False)
    arguments = {parameter: ast.literal_eval(value) for parameter, value in positional}
    arguments |= {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    return name, arguments


@lru_cache(maxsize=64)
def methods(api: str) -> Mapping[str, tuple[str, ...]]:
    """Return the public methods of an API with the names of their parameters."""
    found = inspect.getmembers(api_class(api), predicate=inspect.isfunction)
    return {
        name: tuple(inspect.signature(method).parameters)[1:]
        for name, method in found
        if not name.startswith("_")
    }


class Apis:
    """The objects behind one episode's tools.

    Example: ``Apis(["MathAPI"], {}, long_context=False).call("add", {"a": 1, "b": 2})`` is
    ``('{"result": 3}', True)``.
    """

    def __init__(self, names: Iterable[str], scenario: Mapping[str, Any], *, long_context: bool) -> None:
        """Set each API up; `scenario` holds fresh data for each by its name, which it may keep and change."""
        self.instances: dict[str, Any] = {}
        self._owners: dict[str, str] = {}
        for name in names:
            instance = api_class(name)()
            if name != MATH:
                instance._load_scenario(scenario.get(name, {}), long_context=long_context)
            self.instances[name] = instance
            self._owners |= dict.fromkeys(methods(name), name)

    def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """Return what a tool says, and whether it ran without raising."""
        owner = self._owners.get(name)
        if owner is None:
            return f"Error during execution: name '{name}' is not defined", False
        with ExitStack() as guards:
            if owner == MATH:
                import mpmath

                if too_large := _too_large(arguments):
                    return f"Error during execution: {too_large}", False
                # Its methods set the precision of the whole process.
                guards.enter_context(decimal.localcontext())
                guards.enter_context(mpmath.workdps(15))
            try:
                # An API may keep a list that it is given, and change it.
                own = {
                    key: deepcopy(value) if isinstance(value, list | dict) else value
                    for key, value in arguments.items()
                }
                return spelled(getattr(self.instances[owner], name)(**own)), True
            except RAISED as error:
                return f"Error during execution: {error}", False


def spelled(result: Any) -> str:
    """Return a tool's result as the executor writes it: text as it is, a dict as JSON where it can be."""
    if type(result) is dict:
        try:
            return json.dumps(result)
        except (TypeError, ValueError, RecursionError):
            return str(result)
    return str(result)


def _too_large(arguments: Mapping[str, Any]) -> str:
    """Return what is said of a number that would take too long, or an empty string."""
    for name, value in arguments.items():
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int | float):
                continue
            if abs(number) > MOST.get(name, 10.0**MOST_DIGITS):
                return f"{name} is too large"
    return ""
