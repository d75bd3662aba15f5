"""Floor 1. JSON from a file that anybody may have damaged: bounded, and with one kind of error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

MAX_BYTES: Final = 2 << 20
"""Of a file unless said otherwise; objects take up to 24 times the bytes of their text."""


def parse(data: bytes | str) -> Any:
    """Return the value of a JSON text; raises ValueError for anything else, however deep it nests."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("expected JSON, got one nested too deep") from None


def read(path: Path, *, most_bytes: int = MAX_BYTES) -> Any:
    """Return the value of a JSON file; raises OSError, or ValueError for anything but JSON of that size."""
    with path.open("rb") as file:
        # Reading sets aside what it is asked for, whatever is there.
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise ValueError(f"expected at most {most_bytes} bytes of JSON, got {size}")
        return parse(file.read(size))
