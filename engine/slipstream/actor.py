"""Floor 5. The actor: runs many leased episodes at once and streams their trajectories to the hub.

loop        waits for                         released by
receive     a word of the hub                 grant, weights, stop, or DeadlineError after silence
episode     its backend, its tools            stop token, tool result, the episode's time-out
deliver     room in the spool, byte credit    acknowledgements of the hub
backends    an active row                     the next message of an episode
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import uvloop

from slipstream.config import RunConfig
from slipstream.errors import CheckpointError, DeadlineError, StorageError
from slipstream.flight_recorder import FLIGHT
from slipstream.inference.embedded import EmbeddedBackend
from slipstream.inference.trial import lease_key
from slipstream.interfaces import Sampler
from slipstream.keys import client_keys
from slipstream.messages import Grant, Stop, Weights
from slipstream.model import choose_device, load_policy
from slipstream.process import collect_garbage_seldom, keep_freed_memory
from slipstream.receiving import canary_tolerance
from slipstream.redaction import Redactor, guard_logs
from slipstream.rendezvous import await_hub, run_id
from slipstream.retries import Backoff, Brake
from slipstream.runners import configured_runner
from slipstream.spool import Spool
from slipstream.stop_signals import STOPPED, end_when_asked
from slipstream.transport.client import ActorClient
from slipstream.transport.zeromq import DealerChannel
from slipstream.types import Lease, Outcome, Sampling, WeightUpdate
from slipstream.weights.filesystem import FilesystemSubscriber

REPORT_EVERY_S = 1.0

log = logging.getLogger(__name__)


def main(config: RunConfig, folder: Path, name: str) -> int:
    """Serve a run as actor `name` until the hub stops it and return 0, or until a signal and return STOPPED.

    Raises AddressError without a hub to wait for, RefusedError, DeadlineError.
    """
    end_when_asked()  # nothing is sampled yet, and a spool keeps what it has
    torch.set_num_threads(config.actor.threads)
    keep_freed_memory()
    collect_garbage_seldom()
    address = await_hub(folder, f"actor {name}")
    return uvloop.run(_serve(config, folder, name, address))


async def _serve(config: RunConfig, folder: Path, name: str, address: str) -> int:
    spool = Spool(folder / "spool" / name, durability=config.hub.durability)
    for note in spool.notes:
        log.warning("%s", note)
    channel = DealerChannel(address, client_keys(config.hub.keys, name))
    client = ActorClient(channel, spool, run_id(folder), name)
    port = config.agent.port + _number_of(name) if config.agent.port else 0
    actor = Actor(config, folder, client, port=port)
    serving, asked = asyncio.create_task(actor.serve()), False

    def stop() -> None:
        nonlocal asked
        asked = True
        actor.stop()
        if client.epoch < 0:  # not let in yet: it has nothing to deliver but its spool
            serving.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        await serving
    except asyncio.CancelledError:
        return STOPPED
    except CheckpointError as error:
        # Weights that were announced and are gone or damaged: another try gets newer ones.
        raise StorageError(str(error)) from error
    except DeadlineError as error:
        if not asked:
            raise
        log.warning("%s; %d trajectories stay in the spool", error, len(spool))
    return STOPPED if asked else 0


def _number_of(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


class Actor:
    """One actor's episodes, backends and connection.

    Example: ``await Actor(config, folder, client).serve()``.
    """

    def __init__(self, config: RunConfig, folder: Path, client: ActorClient, *, port: int = 0) -> None:
        """Load the warm-start policy, which gives tokenizer and architecture; the hub tells of weights.

        port: of a gateway for agents, if the configuration asks for one.
        """
        self._config, self._folder, self._client = config, folder, client
        self._warm = folder / "checkpoints" / "warmup"
        policy = load_policy(self._warm, config=config.model, device=choose_device(config.device))
        redactor = Redactor.of_process(config.environment.canaries)
        guard_logs(redactor)
        self._runner = configured_runner(config, policy.chat, redactor, folder=folder, port=port)
        self._brake = Brake(Backoff(first_s=config.environment.backoff_s))
        self._train = self._sampler(policy.chat.stop_token)
        self._pinned: EmbeddedBackend | None = None
        self._free = [config.actor.concurrency, config.actor.concurrency]
        """Free places for training and for evaluation."""
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] | None = None
        self.episodes = 0

    def stop(self) -> None:
        """Finish: running episodes are given up, finished ones are delivered."""
        self._stopping.set()

    @property
    def idle(self) -> bool:
        """True while no episode runs."""
        return self._free == [self._config.actor.concurrency] * 2

    async def serve(self) -> None:
        """Run until stopped by the hub or by `stop`; whatever fails ends it."""
        self._failed = asyncio.get_running_loop().create_future()
        if url := await self._runner.start():
            log.warning("agents find the gateway of this actor at %s", url)
        welcome = await self._client.connect()
        loops = [self._train.run(), self._receive(), self._ask(), self._report()]
        for loop in loops:
            self._start(loop)
        if welcome.update is not None:
            self._start(self._load(self._train, welcome.update))
        stopping: asyncio.Future[bool] = asyncio.create_task(self._stopping.wait())
        ends: list[asyncio.Future[Any]] = [stopping, self._failed]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._failed.done():
            self._failed.result()
        await self._client.drain()
        await self._train.close()
        await self._client.close()
        await self._runner.close()

    def _sampler(self, stop_token: int) -> Sampler:
        config = self._config
        if config.inference.backend == "embedded":
            return self._backend(config.actor.concurrency)
        from slipstream.inference.vllm.fleet import Fleet

        return Fleet(
            self._folder,
            show=self._client.prove,
            stop_token=stop_token,
            max_tokens=config.environment.max_tokens,
            most=config.actor.concurrency,
            tolerance=canary_tolerance(config),
        )

    def _backend(self, rows: int) -> EmbeddedBackend:
        config = self._config
        policy = load_policy(self._warm, config=config.model, device=choose_device(config.device))
        return EmbeddedBackend(
            policy.model,
            stop_token=policy.chat.stop_token,
            rows=rows,
            max_tokens=config.environment.max_tokens,
            subscriber=FilesystemSubscriber(),
            serial=-1,
        )

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the others; an error in it ends the actor."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or self._failed is None or self._failed.done():
            return
        error = task.exception()
        if error is not None:
            self._failed.set_exception(error)

    async def _receive(self) -> None:
        """Do what the hub says."""
        while True:
            match await self._client.receive():
                case Weights(update=update):
                    self._train.announce(update)
                    # Behind an actor that was busy for long, older versions may be gone from disk already.
                    if update.version.serial == self._client.newest_serial:
                        self._start(self._load(self._train, update))
                case Grant(leases=leases, pinned=None):
                    self._begin(leases, self._train)
                case Grant(leases=leases, pinned=WeightUpdate() as update):
                    self._begin(leases, await self._pinned_backend(update))
                case Stop():
                    self.stop()

    async def _pinned_backend(self, update: WeightUpdate) -> EmbeddedBackend:
        """Return the evaluation backend holding exactly `update`: the hub runs one evaluation at a time."""
        if self._pinned is None:
            self._pinned = self._backend(self._config.actor.concurrency)
            self._start(self._pinned.run())
        if self._pinned.serial != update.version.serial:
            await self._load(self._pinned, update)
        return self._pinned

    async def _load(self, backend: Sampler, update: WeightUpdate) -> None:
        await self._client.prove(await backend.load(update))
        FLIGHT.note(f"serial {update.version.serial} loaded and proven")
        self._changed.set()

    def _begin(self, leases: tuple[Lease, ...], backend: Sampler) -> None:
        for lease in leases:
            self._free[lease.evaluation >= 0] -= 1
            self._start(self._episode(lease, backend))

    async def _episode(self, lease: Lease, backend: Sampler) -> None:
        evaluation, config = lease.evaluation >= 0, self._config
        usual = config.evaluation.temperature if evaluation else config.sampling.temperature
        sampling = Sampling(
            temperature=usual if lease.temperature is None else lease.temperature,
            top_p=config.evaluation.top_p if evaluation else 1.0,
            max_tokens=config.sampling.max_tokens,
        )
        trajectory = await self._runner.sampled(lease, backend, sampling, rollout_id=lease_key(lease))
        failure = trajectory.note if trajectory.outcome is Outcome.INFRASTRUCTURE_FAILURE else ""
        if pause_s := self._brake.wait_s(lease.attempt.task, lease.issue, failure):
            await self._client.send(trajectory)
            await asyncio.sleep(pause_s)
        # The place is free before delivery: waiting for credit must not idle the backend.
        self._free[evaluation] += 1
        self.episodes += not evaluation
        self._changed.set()
        if not pause_s:
            await self._client.send(trajectory)

    async def _ask(self) -> None:
        """Tell the hub of free places, once per turn of the loop whatever number became free."""
        while True:
            self._changed.clear()
            ready = self._train.serial >= 0
            await self._client.want(self._free[0] if ready else 0, self._free[1])
            await self._changed.wait()

    async def _report(self) -> None:
        """Send counters for display, about once a second."""
        last_tokens, last_s = 0, time.monotonic()
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_EVERY_S):
                    await self._stopping.wait()
            now, tokens = time.monotonic(), self._train.tokens_generated
            FLIGHT.beat()
            await self._client.report(
                {
                    "episodes": float(self.episodes),
                    "live": float(self._config.actor.concurrency - self._free[0]),
                    "tokens_generated": float(tokens),
                    "tokens_per_s": (tokens - last_tokens) / max(now - last_s, 1e-9),
                }
            )
            last_tokens, last_s = tokens, now
