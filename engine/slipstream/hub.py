"""Floor 5. The hub, where actors and the learner meet: the ledger (ledger.py) over ZeroMQ, in one thread.

It writes, in the run's folder: `trajectories/` (its log), `quarantine/` (bytes that were no trajectory),
`hub.json` (where it listens), `status.json` (who waits for whom, twice a second) and `metrics.jsonl` (the
learner's rows and its own counters).
"""

from __future__ import annotations

import resource
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from slipstream.config import RunConfig
from slipstream.deadlines import Deadline
from slipstream.errors import AddressError, RunFolderError, StorageError
from slipstream.flight_recorder import FLIGHT
from slipstream.ingest import IngestLog
from slipstream.ledger import Ledger
from slipstream.messages import Buffer
from slipstream.metrics import FILE as METRICS
from slipstream.metrics import append_row
from slipstream.process import keep_freed_memory
from slipstream.rendezvous import announce_address, announce_end, announce_start, run_id
from slipstream.run_folder import write_json
from slipstream.stop_signals import STOPPED, end_when_asked, note_when_asked
from slipstream.transport.zeromq import RouterServer

_STATUS_EVERY_S: Final = 0.5
_REBIND_S: Final = 2.0


def main(config: RunConfig, folder: Path) -> int:
    """Serve a run until SIGTERM or SIGINT; returns 0 when the run is done, else STOPPED.

    Raises AddressError (port in use), RunFolderError (another hub, a damaged log).
    """
    end_when_asked()  # replaying a log changes nothing
    _limit_memory(config.hub.memory_limit_bytes)
    keep_freed_memory()
    run = run_id(folder)
    before = announce_start(folder)
    log, ledger = open_ledger(config, folder, run)
    for note in log.notes:
        sys.stderr.write(note + "\n")
    server = _serve(ledger, config.hub.address, before)
    asked = note_when_asked()
    announce_address(folder, server.address, run)
    books = Bookkeeper(ledger, folder)
    try:
        server.run(asked, each_turn=books.turn)
    finally:
        books.finish()
        log.close()
        server.close()
    if not is_done(config, ledger):
        return STOPPED
    announce_end(folder, run)
    return 0


def is_done(config: RunConfig, ledger: Ledger) -> bool:
    """Return whether the last step of a run is trained, evaluated and in a checkpoint."""
    evaluated = any(done.step >= config.steps for done in ledger.state.evaluations)
    return evaluated and ledger.state.checkpoint_step >= config.steps


def open_ledger(config: RunConfig, folder: Path, run: str) -> tuple[IngestLog, Ledger]:
    """Return a run's log and what it adds up to; raises RunFolderError when the log is damaged."""
    try:
        log = IngestLog(folder / "trajectories", config.hub.durability, config.hub.segment_bytes)
        return log, Ledger(config, run, log, quarantine_in(folder / "quarantine"))
    except StorageError as error:
        raise RunFolderError(str(error)) from error


def settle(config: RunConfig, folder: Path) -> None:
    """Write what the log adds up to for a hub that died after its run was done; raises RunFolderError."""
    run = run_id(folder)
    log, ledger = open_ledger(config, folder, run)
    try:
        Bookkeeper(ledger, folder).finish()
    finally:
        log.close()
    announce_end(folder, run)


class Bookkeeper:
    """Writes what the hub knows into the run's folder."""

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        """Write into `folder`."""
        self._ledger, self._folder = ledger, folder
        self._next_status = 0.0

    def turn(self) -> None:
        """Write new rows, and the status when it is due."""
        FLIGHT.beat()
        for row in self._ledger.take_reports():
            append_row(self._folder / METRICS, row)
        now = time.monotonic()
        if now >= self._next_status:
            self._next_status = now + _STATUS_EVERY_S
            write_json(self._folder / "status.json", {"time": time.time(), **self._ledger.status(now)})

    def finish(self) -> None:
        """Write what is left."""
        self._next_status = 0.0
        self.turn()


def quarantine_in(folder: Path) -> Callable[[Sequence[Buffer]], str]:
    """Return a function that keeps bad bytes in a file of their own and returns its name."""

    def keep(frames: Sequence[Buffer]) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.time_ns()}-{secrets.token_hex(2)}.bin"
        try:
            path.write_bytes(b"".join(frames))
        except OSError as error:
            raise StorageError(
                f"{path}: writing failed ({error.strerror}); free space or repair the disk"
            ) from error
        return path.name

    return keep


def _serve(ledger: Ledger, address: str, before: str) -> RouterServer:
    """Bind where the hub before listened, since its clients ask there, or else where the configuration says.

    The kernel may still hold the address of a process that has just died.
    """
    if before == address or (address.endswith(":*") and before.startswith(address[:-1])):
        deadline = Deadline(_REBIND_S, "hub", f"{before} to be free")
        while not deadline.expired():
            try:
                return RouterServer(ledger, before, lost=ledger.lost)
            except AddressError:
                FLIGHT.beat()
                time.sleep(_REBIND_S / 20)
    return RouterServer(ledger, address, lost=ledger.lost)


def _limit_memory(limit_bytes: int) -> None:
    """Let a flood of frames end this process, not the machine."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or hard > limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))
