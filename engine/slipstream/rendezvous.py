"""Floor 4. How roles of one run find each other: the identity of its folder and the hub's address."""

from __future__ import annotations

import fcntl
import secrets
import time
from pathlib import Path
from typing import IO, Final

from slipstream import plain_json
from slipstream.deadlines import Deadline
from slipstream.errors import AddressError, RunFolderError
from slipstream.run_folder import read_json, write_json

LOCK_S: Final = 30.0
"""Longest wait for another process to draw the identity of a run."""


def run_id(folder: Path) -> str:
    """Return the identity of a run folder, drawn at random by whoever asks first.

    Raises RunFolderError, and DeadlineError when another process keeps the folder's lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    try:
        with (folder / "run.lock").open("w") as lock:
            _take(lock, Deadline(LOCK_S, "the process", f"the lock of {path}"))
            if not path.exists():
                write_json(path, {"run": secrets.token_hex(8)})
            return str(plain_json.read(path)["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path}: expected the identity of a run, got {error!r}; restore it from a copy (hub.json beside "
            f"it holds the same one)"
        ) from error


def _take(lock: IO[str], deadline: Deadline) -> None:
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            deadline.check()
            time.sleep(0.01)


def hub_address(folder: Path) -> str:
    """Return the address the hub of a run folder last listened at; raises AddressError when there is none."""
    address = read_json(folder / "hub.json").get("address")
    if not isinstance(address, str):
        raise AddressError(
            f"{folder / 'hub.json'}: expected the address of a hub; start `slipstream hub` first"
        )
    return address
