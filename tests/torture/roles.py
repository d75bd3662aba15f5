"""The roles of the rig: the real hub, and the least actor and learner around the real clients, without torch.

Each is forked from a process that has imported everything, so that a restart costs milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import faulthandler
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bugs
import oracle

from slipstream import checkpoint, hub, synthetic
from slipstream.config import RunConfig
from slipstream.deadlines import Deadlines
from slipstream.errors import CheckpointError, DeadlineError, RefusedError, SlipstreamError, StorageError
from slipstream.flight_recorder import FLIGHT
from slipstream.history import START
from slipstream.ingest import IngestLog
from slipstream.messages import Grant, Stop, Weights
from slipstream.rendezvous import run_id
from slipstream.transport.client import ActorClient, LearnerClient
from slipstream.transport.zeromq import DealerChannel, SyncDealerChannel
from slipstream.types import Lease, Outcome, Trajectory
from slipstream.wire import encode_trajectory

assert "torch" not in sys.modules, "the delivery roles import no torch"

LONGEST_S = 8.0
"""The longest deadline."""
CRASHED = 70
EXITS: dict[type[BaseException], int] = {DeadlineError: 10, RefusedError: 11, StorageError: 12}
"""Exit codes of errors that faults may bring about; other named errors end in 13, a bug in CRASHED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the roles of one run share."""

    folder: Path
    aside: Path
    """What the oracle and the roles write down, on a disk that is never full."""
    config: RunConfig
    address: str
    """Where clients find the hub: the proxy's."""
    patience: float = 1.0
    """Scales the deadlines."""
    bug: str = ""
    """A planted bug (bugs.py)."""
    step_s: float = 0.005
    """What a step of the learner takes."""
    sizes: tuple[int, ...] = (4, 20, 60, 200, 600, 4000)
    """Tokens of trajectories."""
    odd_share: float = 0.03
    """Share of trajectories that are infrastructure failures, unproven, or poison: each so many."""

    @property
    def deadlines(self) -> Deadlines:
        """Return the longest waits of clients."""
        longest = self.patience * LONGEST_S
        return Deadlines(
            connect_s=longest / 2, send_s=longest / 2, credit_s=longest, batch_s=longest,
            drain_s=longest * 3 / 4, ping_s=0.25, silence_s=longest * 3 / 8,
        )  # fmt: skip

    @property
    def finishing(self) -> Path:
        """Exists once the learner shall come to an end."""
        return self.folder / "finish"


def run_role(setting: Setting, name: str, work: Callable[[], int]) -> None:
    """Be a role: in a forked child, from which this never returns."""
    code = CRASHED
    try:
        log = os.open(setting.aside / f"{name}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 2)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
        bugs.plant(setting.bug)
        code = work()
    except SlipstreamError as error:
        sys.stderr.write(f"{time.time():.3f} {type(error).__name__}: {error}\n")
        code = next((code for kind, code in EXITS.items() if isinstance(error, kind)), 13)
    except OSError as error:
        sys.stderr.write(f"{time.time():.3f} {error!r}\n")
        code = 12 if error.errno in (errno.EIO, errno.ENOSPC) else CRASHED
        if code == CRASHED:
            traceback.print_exc()
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def hub_role(setting: Setting) -> int:
    """Be the hub."""
    kept = setting.folder / "log"

    class KeepingLog(IngestLog):
        """Keeps for the checker what a checkpoint covers and the hub removes."""

        def _remove_first(self) -> None:
            keep_log(self.folder, kept)
            super()._remove_first()

    hub.IngestLog = KeepingLog  # type: ignore[misc]
    return hub.main(setting.config, setting.folder)


def keep_log(log: Path, kept: Path) -> None:
    """Link every segment of a log that is not kept yet."""
    for path in log.glob("*.log"):
        with contextlib.suppress(FileExistsError):
            os.link(path, kept / path.name)


def actor_role(setting: Setting, name: str, spool: str) -> int:
    """Be the actor `name`, whose trajectories lie in `spool`."""
    return asyncio.run(_act(setting, name, spool))


async def _act(setting: Setting, name: str, spool_name: str) -> int:
    folder = setting.folder
    spool = oracle.WitnessedSpool(
        folder / "spool" / spool_name,
        setting.aside / "oracle" / spool_name,
        durability=setting.config.hub.durability,
        limit_bytes=2 << 20,
    )
    channel = DealerChannel(setting.address)
    client = ActorClient(channel, spool, run_id(folder), name, deadlines=setting.deadlines)
    oracle.note_session(setting.aside / "sessions", client._core._session, spool_name)
    maker = Maker(setting, spool_name)
    try:
        welcome = await client.connect()
        if welcome.update is not None:
            await maker.prove(client, Weights(update=welcome.update))
        await client.want(6, 2)
        while True:
            word = await client.receive()
            match word:
                case Stop():
                    await client.drain()
                    await client.close()
                    return 0
                case Weights():
                    await maker.prove(client, word)
                case Grant(leases=leases, pinned=pinned):
                    if pinned is not None:
                        await maker.prove(client, Weights(update=pinned))
                    for lease in leases:
                        for made in maker.make(lease):
                            await client.send(made)
            await client.want(6, 2)
    finally:
        FLIGHT.goes_on()


class Maker:
    """Makes trajectories that are all different, and some that the hub must not train."""

    def __init__(self, setting: Setting, spool: str) -> None:
        """Make them for the spool of that name."""
        self._setting, self._spool = setting, spool
        self._random = random.Random(os.urandom(8))
        self._count = 0
        self._proven, self._announced = -1, -1

    async def prove(self, client: ActorClient, weights: Weights) -> None:
        """Prove what was announced; sometimes leave it, and use it all the same."""
        serial = weights.update.version.serial
        self._announced = max(self._announced, serial)
        if serial == self._proven:
            return
        if self._proven >= 0 and self._random.random() < self._setting.odd_share:
            return
        await client.prove(synthetic.proof(weights.update))
        self._proven = max(self._proven, serial)

    def make(self, lease: Lease) -> list[Trajectory]:
        """Return what answers a lease, perhaps with poison before it."""
        draw, odd = self._random.random(), self._setting.odd_share
        serial = self._announced if draw < odd else self._proven
        made = self._new(lease, serial)
        if odd < draw < 2 * odd:
            made = dataclasses.replace(made, outcome=Outcome.INFRASTRUCTURE_FAILURE)
        if 2 * odd < draw < 3 * odd:
            elsewhere = dataclasses.replace(lease.attempt, group=1 << 30, task=1 << 30)
            return [self._new(dataclasses.replace(lease, attempt=elsewhere), serial), made]
        return [made]

    def _new(self, lease: Lease, serial: int) -> Trajectory:
        self._count += 1
        tokens = self._random.choice(self._setting.sizes)
        made = synthetic.answer_to(lease, serial=serial, tokens=tokens, seed=self._random.getrandbits(32))
        return dataclasses.replace(made, note=f"{self._spool}#{os.getpid()}.{self._count}.{time.time_ns()}")


def learner_role(setting: Setting) -> int:
    """Be the learner: what it has trained is in its checkpoint, and nowhere else."""
    folder, every = setting.folder / "checkpoints", setting.config.checkpoint.every
    trained, history = list[list[str]](), START
    with contextlib.suppress(CheckpointError):
        state = checkpoint.read_state(checkpoint.load_latest(folder).path / "state.json")
        trained, history = state["trained"], state["history"]
    client = LearnerClient(
        SyncDealerChannel(setting.address), run_id(setting.folder), "learner", deadlines=setting.deadlines
    )
    welcome = client.connect(len(trained), history)
    serial = welcome.next_serial

    def publish() -> None:
        nonlocal serial
        client.publish(synthetic.update(serial, step=len(trained), incarnation=welcome.epoch,
                                        fork_step=welcome.fork_step))  # fmt: skip
        serial += 1

    publish()
    finishing = False
    while not finishing:
        while (batch := client.pull(len(trained))) is None:
            pass
        trained.append([oracle.content_of(encode_trajectory(t)).key for t in batch.trajectories])
        history = batch.history
        time.sleep(setting.step_s)
        # Looked at behind a batch: the end needs one, so that a run that stands still cannot end well.
        finishing = setting.finishing.exists()
        if len(trained) % every == 0 or finishing:
            save(folder, trained, history)
            client.checkpointed(len(trained), oldest=min(checkpoint.steps_in(folder)))
        publish()
    client.finish("the rig has seen enough")
    client.close()
    return 0


def save(folder: Path, trained: list[list[str]], history: str) -> None:
    """Publish a checkpoint that holds what was trained."""
    checkpoint.save_checkpoint(
        folder,
        len(trained),
        lambda into: checkpoint.write_state(into / "state.json", {"trained": trained, "history": history}),
        keep=2,
    )


def trained_of(folder: Path) -> list[list[str]]:
    """Return what the newest whole checkpoint says was trained."""
    try:
        found = checkpoint.load_latest(folder)
    except CheckpointError:
        return []
    return list(json.loads((found.path / "state.json").read_text())["trained"])
