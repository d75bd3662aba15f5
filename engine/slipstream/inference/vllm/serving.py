"""Floor 4. How actors find the servers of a run: what each `slipstream serve` writes into its folder.

RUN/servers/NAME.json    {"url", "key", "count"}, readable by its owner alone
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from slipstream.extras import require
from slipstream.run_folder import read_json, write_json

FOLDER: Final = "servers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One server, as an actor reaches it."""

    url: str
    """Of the server itself: http://host:port/servers/N."""
    key: str = field(repr=False)


def check_installed() -> None:
    """Refuse early what is not installed; raises ConfigurationError."""
    require("vllm", "httpx2", "starlette", "uvicorn", by="inference.backend=vllm")


def announce(folder: Path, name: str, *, url: str, key: str, count: int) -> None:
    """Say where a front with `count` servers listens."""
    path = folder / FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"url": url, "key": key, "count": count, "pid": os.getpid()}, private=True)


def withdraw(folder: Path, name: str) -> None:
    """Say that a front is gone."""
    (folder / FOLDER / f"{name}.json").unlink(missing_ok=True)


def served(folder: Path) -> dict[str, Served]:
    """Return all servers of a run by name, "serve-0/0"."""
    found = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        said = read_json(path)
        url, key, count = said.get("url"), said.get("key"), said.get("count")
        if isinstance(url, str) and isinstance(key, str) and isinstance(count, int):
            for index in range(count):
                found[f"{path.stem}/{index}"] = Served(url=f"{url}/servers/{index}", key=key)
    return found
