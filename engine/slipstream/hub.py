"""Floor 5. The hub, where actors and the learner meet: the ledger (ledger.py) over ZeroMQ, in one thread.

It writes, in the run's folder: `trajectories/` (its log), `quarantine/` (bytes that were no trajectory),
`hub.json` (where it listens), `status.json` (who waits for whom, twice a second) and `metrics.jsonl` (the
learner's rows and its own counters).
"""

from __future__ import annotations

import math
import resource
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from slipstream.config import HubConfig, RunConfig
from slipstream.deadlines import Deadline
from slipstream.errors import AddressError, RunFolderError, StorageError
from slipstream.flight_recorder import FLIGHT
from slipstream.ingest import IngestLog
from slipstream.keys import hub_keys
from slipstream.ledger import Ledger
from slipstream.ledger_snapshot import snapshot
from slipstream.messages import Buffer
from slipstream.metrics import FILE as METRICS
from slipstream.metrics import append_row
from slipstream.process import MemoryGauge, collect_garbage_seldom, keep_freed_memory
from slipstream.rendezvous import announce_address, announce_end, announce_start, run_id
from slipstream.run_folder import write_json
from slipstream.stop_signals import STOPPED, end_when_asked, note_when_asked
from slipstream.transport.guard import Limits
from slipstream.transport.zeromq import MAX_FRAME_BYTES, RouterServer

_STATUS_EVERY_S: Final = 0.5
_REBIND_S: Final = 2.0
_SLACK_BYTES: Final = 8 << 20
"""Control messages on the way beside a peer's records."""


def main(config: RunConfig, folder: Path) -> int:
    """Serve a run until SIGTERM or SIGINT; returns 0 when the run is done, else STOPPED.

    Raises AddressError (port in use), RunFolderError (another hub, a damaged log), StorageError (disk or
    memory exhausted).
    """
    end_when_asked()  # replaying a log changes nothing
    _limit_memory(config.hub.memory_limit_bytes)
    try:
        return _run(config, folder)
    except MemoryError as error:
        limit, batch = config.hub.memory_limit_bytes >> 20, config.batch.trajectories
        raise StorageError(
            f"hub: {limit} MB (hub.memory_limit_bytes) were too little; a batch of {batch} trajectories needs"
            " all its records in memory at once: raise the limit, or make batches smaller"
        ) from error


def _run(config: RunConfig, folder: Path) -> int:
    keep_freed_memory()
    run = run_id(folder)
    before = announce_start(folder)
    log, ledger = open_ledger(config, folder, run)
    for note in log.notes:
        sys.stderr.write(note + "\n")
    collect_garbage_seldom()
    server = _serve(ledger, config, before)
    _limit_memory(config.hub.memory_limit_bytes)  # its threads are there now
    asked = note_when_asked()
    announce_address(folder, server.address, run)
    books = Bookkeeper(ledger, log, folder, config.hub, server.counters)
    try:
        server.run(asked, each_turn=books.turn)
    finally:
        books.finish()
        log.close()
        server.close()
    if not ledger.state.is_over:
        return STOPPED
    announce_end(folder, run)
    return 0


def open_ledger(config: RunConfig, folder: Path, run: str) -> tuple[IngestLog, Ledger]:
    """Return a run's log and what it adds up to; raises RunFolderError when the log is damaged."""
    try:
        log = IngestLog(folder / "trajectories", config.hub.durability, config.hub.segment_bytes)
        ledger = Ledger(config, run, log, quarantine_in(folder / "quarantine"))
        log.check(ledger.state.oldest_position)
        log.opening = lambda: snapshot(ledger.state)
        return log, ledger
    except StorageError as error:
        raise RunFolderError(str(error)) from error


def settle(config: RunConfig, folder: Path) -> None:
    """Write what the log adds up to for a hub that died after its run was done; raises RunFolderError."""
    run = run_id(folder)
    log, ledger = open_ledger(config, folder, run)
    try:
        Bookkeeper(ledger, log, folder, config.hub).finish()
    finally:
        log.close()
    announce_end(folder, run)


class Bookkeeper:
    """Writes what the hub knows into the run's folder."""

    def __init__(
        self,
        ledger: Ledger,
        log: IngestLog,
        folder: Path,
        config: HubConfig,
        counters: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """Write into `folder`; `counters` are what the transport has to say."""
        self._ledger, self._log, self._folder, self._config = ledger, log, folder, config
        self._counters = counters
        self._next_status = 0.0
        self._covered = -1

    def turn(self) -> None:
        """Write new rows, and the status when it is due; shorten the log when a checkpoint covers more."""
        FLIGHT.beat()
        for row in self._ledger.take_reports():
            append_row(self._folder / METRICS, row)
        now = time.monotonic()
        if now >= self._next_status:
            self._next_status = now + _STATUS_EVERY_S
            self._watch_disk()
            status = {"time": time.time(), **self._ledger.status(now), **self._counters()}
            write_json(self._folder / "status.json", status)
        state = self._ledger.state
        if state.first_batch != self._covered:
            self._covered = state.first_batch
            self._log.shorten(state.oldest_position, retain_bytes=self._config.retain_bytes)

    def _watch_disk(self) -> None:
        """Begin no episode while the disk has too little room for those that run."""
        free, least = shutil.disk_usage(self._folder).free, self._config.reserve_bytes
        paused = free < least
        if paused != self._ledger.paused:
            self._ledger.paused = paused
            told = f"{free >> 20} MB left on the disk of {self._folder}, {least >> 20} are reserved: "
            told += "no new episodes until some are freed" if paused else "episodes begin again"
            FLIGHT.note(told)
            sys.stderr.write(told + "\n")

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


def _serve(ledger: Ledger, config: RunConfig, before: str) -> RouterServer:
    """Bind where the hub before listened, since its clients ask there, or else where the configuration says.

    The kernel may still hold the address of a process that has just died.
    """
    address, keys, limits = config.hub.address, hub_keys(config.hub.keys), _limits(config.hub)
    if config.hub.insecure:
        _warn(f"hub.insecure = true: anyone who reaches {address} can join this run, read and change it")

    def bound(where: str) -> RouterServer:
        return RouterServer(ledger, where, lost=ledger.lost, keys=keys, limits=limits)

    if before == address or (address.endswith(":*") and before.startswith(address[:-1])):
        deadline = Deadline(_REBIND_S, "hub", f"{before} to be free")
        while not deadline.expired():
            try:
                return bound(before)
            except AddressError:
                FLIGHT.beat()
                time.sleep(_REBIND_S / 20)
    return bound(address)


def _limits(hub: HubConfig) -> Limits:
    """Return the bounds of connections; raises the number of files this process may open to the most."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    return Limits(
        outstanding_bytes=hub.credit_bytes + MAX_FRAME_BYTES + _SLACK_BYTES,
        # A quarter of the files stays for the log, and for those who come before others are cut.
        connections=min(hub.max_connections, most_files * 3 // 4),
        # With keys, nobody stands longer in the handshake than HANDSHAKE_IVL, and who passed it is known.
        hello_s=math.inf if hub.keys else hub.hello_timeout_s,
        stranger_memory_bytes=hub.memory_limit_bytes // 2,
        memory_bytes=hub.memory_limit_bytes * 3 // 4,
    )


def _warn(sentence: str) -> None:
    """Say something where whoever started the hub and whoever examines it will find it."""
    FLIGHT.note(sentence)
    sys.stderr.write(f"hub: warning: {sentence}\n")


def _limit_memory(limit_bytes: int) -> None:
    """Let a flood of frames end this process, not the machine: at a tenth above what it may use."""
    now = MemoryGauge().read()
    # The kernel's limit counts what nobody ever wrote to, as the stacks of threads, and no mapped files.
    limit_bytes = limit_bytes * 11 // 10 + now.data - now.resident
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or hard > limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))
