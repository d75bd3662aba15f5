"""The words of failing tools are those that policies have been trained on; the engine writes no others."""

from __future__ import annotations

import re
from pathlib import Path

import slipstream
from slipstream.tools import wording
from slipstream.tools.wording import COMPLAINTS, FAULTS, LONGEST_ERROR, error

ENGINE = Path(slipstream.__file__).parent


def test_seeded_failures_and_complaints() -> None:
    assert FAULTS == ("error: timeout", "error: unavailable", "error: rate limit")
    assert COMPLAINTS == ("error: no tool call", "error: call is not JSON")
    assert wording.TOO_SLOW.format(0.5) == "tool did not answer within 0.5 s"


def test_an_error_is_one_line() -> None:
    assert error("no such\n document ") == "error: no such document"
    assert error("x" * 1000) == f"error: {'x' * 1000}"[:LONGEST_ERROR]


def test_the_engine_writes_them_nowhere_else() -> None:
    phrases = [
        value
        for name, value in vars(wording).items()
        if name.isupper() and isinstance(value, str) and " " in value.strip()
    ]
    assert len(phrases) >= 12
    for path in ENGINE.rglob("*.py"):
        if path.name == "wording.py":
            continue
        code = re.sub(r'"""[\s\S]*?"""', "", path.read_text())
        written = [phrase for phrase in phrases if f'"{phrase}"' in code]
        assert not written, f"{path}: {written} stand in tools/wording.py"
