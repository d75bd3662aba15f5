"""Floor 4. How roles of one run find each other: the identity of its folder and the hub's address.

RUN/hub.json                      a role that joins
is not there                      is refused: nobody has started a hub
{"address": .., "pid": ..}        connects
empty, or {"before": address}     waits: a hub was started, and does not listen yet
{"over": true}                    is refused: the run is done
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from pathlib import Path
from typing import IO, Final

from slipstream import plain_json
from slipstream.deadlines import Deadline, Deadlines
from slipstream.errors import AddressError, RunFolderError
from slipstream.flight_recorder import FLIGHT
from slipstream.run_folder import read_json, write_json

LOCK_S: Final = 30.0
"""Longest wait for another process to draw the identity of a run."""
HUB: Final = "hub.json"
_LOOK_S: Final = 0.05


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
    address = known_address(folder)
    if not address:
        over = read_json(folder / HUB).get("over")
        raise AddressError(
            f"{folder / HUB}: expected the address of a hub; "
            + ("the run is done, nobody can join it" if over else "start `slipstream hub` first")
        )
    return address


def known_address(folder: Path) -> str:
    """Return the address of a hub that listens, or listened when it died; "" when there is none."""
    address = read_json(folder / HUB).get("address")
    return address if isinstance(address, str) else ""


def await_hub(folder: Path, who: str, *, deadlines: Deadlines | None = None) -> str:
    """Return the hub's address, waiting for a hub that was started and does not listen yet.

    Raises AddressError when there is no hub to wait for, and DeadlineError.
    """
    seconds = (deadlines or Deadlines()).start_s
    deadline = Deadline(seconds, who, f"the hub to write its address into {folder / HUB}")
    FLIGHT.waits(f"the hub to listen and say where in {folder / HUB}", seconds)
    while not known_address(folder) and _is_awaited(folder):
        FLIGHT.beat()
        deadline.check()
        time.sleep(_LOOK_S)
    FLIGHT.goes_on()
    return hub_address(folder)


def announce_start(folder: Path) -> str:
    """Note that a hub was started; returns where the one before it listened, or ""."""
    said = read_json(folder / HUB)
    before = said.get("address") or said.get("before") or ""
    write_json(folder / HUB, {"before": before})
    return str(before)


def announce_address(folder: Path, address: str, run: str) -> None:
    """Note where this process, the hub, listens."""
    write_json(folder / HUB, {"address": address, "pid": os.getpid(), "run": run})


def announce_end(folder: Path, run: str) -> None:
    """Note that the run is done and has no hub any more."""
    write_json(folder / HUB, {"run": run, "over": True})


def expect_hub(folder: Path) -> None:
    """Forget the hub before, and let whoever joins wait for the next one."""
    (folder / HUB).write_bytes(b"")  # takes no block: it succeeds on a full disk


def _is_awaited(folder: Path) -> bool:
    return (folder / HUB).exists() and not read_json(folder / HUB).get("over")
