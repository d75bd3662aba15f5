"""Floor 2. Values that a JSON schema allows: drawn at random, or all one constant."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing.exceptions import Unresolvable

T = TypeVar("T")
TRIES: Final = 8
DEEPEST: Final = 6
_SMALLEST, _SPAN = -10, 100


class Picker(Protocol):
    """Decides what a schema leaves open."""

    def one_of(self, options: Sequence[T]) -> T:
        """Choose an option."""

    def text(self) -> str:
        """Return a string."""

    def number(self, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`."""

    def optional(self) -> bool:
        """Return whether to give what may be left out."""


class Drawn:
    """Decides by a seeded generator; strings are words that were read, or short nonsense."""

    def __init__(self, draw: random.Random, words: Sequence[str] = ()) -> None:
        self._draw, self._words = draw, words

    def one_of(self, options: Sequence[T]) -> T:
        """Choose an option."""
        return self._draw.choice(options)

    def text(self) -> str:
        """Return a word, or a few, or letters."""
        if not self._words or self._draw.random() < 0.2:
            return "".join(self._draw.choices("abcdefgh 0123456789", k=self._draw.randint(0, 8)))
        start = self._draw.randrange(len(self._words))
        return " ".join(self._words[start : start + self._draw.choice((1, 1, 1, 2, 3))])

    def number(self, low: int, high: int) -> int:
        """Return a number."""
        return self._draw.randint(low, high)

    def optional(self) -> bool:
        """Toss a coin."""
        return self._draw.random() < 0.5


class Constant:
    """Says the same wherever a schema lets it: `zzz`, or the number and the truth value nearest to it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def one_of(self, options: Sequence[T]) -> T:
        """Choose the constant itself, or the first."""
        return next((option for option in options if option == self._text), options[0])

    def text(self) -> str:
        """Return the constant."""
        return self._text

    def number(self, low: int, high: int) -> int:
        """Return the number that the constant spells, or 0."""
        wanted = int(self._text) if self._text.isascii() and self._text.isdigit() else 0
        return min(max(wanted, low), high)

    def optional(self) -> bool:
        """Leave out what may be left out."""
        return False


def value_of(schema: Mapping[str, Any], picker: Picker) -> Any:
    """Return a value that `schema` allows, or the last try where a pattern or a format is not met.

    Example: ``value_of({"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
    Constant("zzz")) == {"q": "zzz"}``.
    """
    value: Any = None
    for _ in range(TRIES):
        value = _value(schema, schema, picker, 0)
        with contextlib.suppress(SchemaError, Unresolvable, RecursionError):
            if Draft202012Validator(schema).is_valid(value):
                break
    return value


def _value(schema: Any, root: Mapping[str, Any], picker: Picker, depth: int) -> Any:
    if not isinstance(schema, Mapping) or depth > DEEPEST:
        return picker.text()
    if isinstance(reference := schema.get("$ref"), str):
        return _value(_referred(reference, root), root, picker, depth + 1)
    for key in ("enum", "examples"):
        if isinstance(schema.get(key), list) and schema[key]:
            return picker.one_of(schema[key])
    if "const" in schema:
        return schema["const"]
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list) and schema[key]:
            return _value(picker.one_of(schema[key]), root, picker, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    return _of_type(picker.one_of(kind) if isinstance(kind, list) else kind, schema, root, picker, depth)


def _of_type(
    kind: str, schema: Mapping[str, Any], root: Mapping[str, Any], picker: Picker, depth: int
) -> Any:
    match kind:
        case "object":
            properties, required = schema.get("properties", {}), schema.get("required", ())
            return {
                name: _value(inner, root, picker, depth + 1)
                for name, inner in properties.items()
                if name in required or picker.optional()
            }
        case "array":
            least = int(schema.get("minItems", 0))
            count = picker.number(least, int(schema.get("maxItems", max(2, least))))
            return [_value(schema.get("items", {}), root, picker, depth + 1) for _ in range(count)]
        case "integer" | "number":
            return _number(schema, picker, whole=kind == "integer")
        case "boolean":
            return picker.one_of((False, True)) if picker.text() not in {"1", "yes", "True"} else True
        case "null":
            return None
    text = picker.text()
    least = int(schema.get("minLength", 0))
    return text.ljust(least, "z")[: int(schema.get("maxLength", max(len(text), least)))]


def _number(schema: Mapping[str, Any], picker: Picker, *, whole: bool) -> int | float:
    step = schema.get("multipleOf", 1)
    low = schema.get("minimum", schema.get("exclusiveMinimum", _SMALLEST * step - 1) + 1)
    high = schema.get("maximum", schema.get("exclusiveMaximum", low + _SPAN * step + 1) - 1)
    first, last = -int(-low // step), int(high // step)
    if first > last:
        return int(low) if whole else float(low + high) / 2
    number = picker.number(first, last) * step
    return int(number) if whole else float(number)


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    """Return what a local reference such as `#/$defs/Place` points to, or nothing that is known."""
    found: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found or {}
