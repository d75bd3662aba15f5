"""Floor 4. What a judge said: the one JSON object with reason and verdict in it, or why there is none.

Read tolerantly around the object, since models wrap it in words and fences, and strictly inside it: two
objects with different verdicts, or one that names a verdict before its reason, are no answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from slipstream.authoring.rewards import Invalid
from slipstream.judging.rubric import Rubric

MOST_CHARS: Final = 16_000
MOST_BRACES: Final = 64
"""Where an object may begin; text of nothing but braces would be read over and over."""
_THOUGHT_END: Final = "</think>"
_SHOWN: Final = 80
_LONGEST_REASON: Final = 500


class Fault(StrEnum):
    """Why a judge gave no verdict."""

    NONSENSE = "nonsense"
    """It said something that holds no answer."""
    CHOICE = "choice"
    """It named a verdict that the rubric does not have."""
    TIMEOUT = "timeout"
    """Its deadline passed."""
    TRANSPORT = "transport"
    """Its server could not be reached, or failed, each time."""
    REFUSED = "refused"
    """Its server refuses the request: a wrong key, an unknown model, an episode too long."""


class Unjudged(Invalid):
    """No verdict: as a score it is invalid, never 0."""

    def __init__(self, fault: Fault, reason: str) -> None:
        """Say why."""
        super().__init__(f"judge: {fault}: {reason}")
        self.fault = fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge decided."""

    choice: str
    value: float
    reason: str
    cached: bool = False


def read_answer(text: str, rubric: Rubric) -> Verdict:
    """Return the verdict of a judge's message; raises Unjudged.

    Example: ``read_answer('{"reason": "It is.", "verdict": "meets"}', rubric).value == 1.0``.
    """
    said = text.rpartition(_THOUGHT_END)[2].strip()
    if len(said) > MOST_CHARS:
        raise Unjudged(
            Fault.NONSENSE, f"expected at most {MOST_CHARS} characters, got an answer of {len(said)}"
        )
    found = [pairs for pairs in _objects(said) if "verdict" in dict(pairs)]
    if not found:
        raise Unjudged(Fault.NONSENSE, f"expected a JSON object with a verdict, got {said[:_SHOWN]!r}")
    if len({repr(dict(pairs)["verdict"]) for pairs in found}) > 1:
        raise Unjudged(Fault.NONSENSE, f"expected one verdict, got several: {said[:_SHOWN]!r}")
    return _read(found[0], rubric)


def _read(pairs: Sequence[tuple[str, Any]], rubric: Rubric) -> Verdict:
    names = [name for name, _ in pairs if name in ("reason", "verdict")]
    if names != ["reason", "verdict"]:
        got = ", ".join(names)
        raise Unjudged(Fault.NONSENSE, f"expected reason and then verdict, each once, got {got}")
    values = dict(pairs)
    reason, said = values["reason"], values["verdict"]
    if not isinstance(reason, str) or not reason.strip():
        raise Unjudged(Fault.NONSENSE, f"expected a reason, got {reason!r:.{_SHOWN}}")
    choice = rubric.choice(said) if isinstance(said, str) else None
    if choice is None:
        known = ", ".join(rubric.choices)
        raise Unjudged(Fault.CHOICE, f"expected one of {known}, got {said!r:.{_SHOWN}}")
    # It is kept and shown on terminals: no half characters, and nothing that moves a cursor.
    words = " ".join(reason.split())[:_LONGEST_REASON]
    reason = "".join(character if character.isprintable() else "?" for character in words)
    return Verdict(choice=choice, value=float(rubric.choices[choice]), reason=reason)


class _Pairs(list[tuple[str, Any]]):
    """An object with its keys as they came: in order, and as often as they came."""


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_Pairs)


def _objects(text: str) -> Iterator[_Pairs]:
    """Yield the outermost JSON objects of a text; raises Unjudged where too many might begin."""
    at, tried = text.find("{"), 0
    while at >= 0:
        tried += 1
        if tried > MOST_BRACES:
            raise Unjudged(Fault.NONSENSE, f"expected one JSON object, got {text[:_SHOWN]!r}")
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield value
        at = text.find("{", end)
