"""Floor 1. A wrong key or value as one sentence: where it stands, what was expected, what was given."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Sequence

from pydantic_core import ErrorDetails


def hint(key: str, valid: Sequence[str]) -> str:
    """Return "; did you mean X?" for the nearest valid name, or nothing."""
    leaf = key.rpartition(".")[2]
    near = [name for name in valid if name.endswith(f".{leaf}")] if "." not in key else []
    near = near or difflib.get_close_matches(key, valid, n=1)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def sentence(error: ErrorDetails, label: str, given: Collection[str]) -> str:
    """Turn one of pydantic's errors into a sentence with source, key, expected and got."""
    key = ".".join(str(part) for part in error["loc"] if isinstance(part, str))
    source = "command line" if key in given else label
    expected = re.sub(r"^.*? (should|must) (be )?", "", error["msg"], count=1)
    match error["type"]:
        case "model_type" | "model_attributes_type":
            expected = "a table"
        case "int_type":
            expected = "an integer"
        case "missing" | "too_long":
            expected = "as long as its default"
    return f"{source}: {key} must be {expected}, got {json.dumps(error['input'], default=str)}"
