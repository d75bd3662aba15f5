"""Floor 5. The role that serves: it starts vLLM servers, feeds them new weights, and lets actors ask them.

    hub ── Weights ──▶ serve ── update, proof ──▶ vLLM, on the loopback
                         │ front (inference/vllm/front.py): key, allow-listed routes, proofs
    actors ──────────────┘

loop       waits for                         released by
receive    a word of the hub                 weights, stop, or DeadlineError after silence
keepers    newer weights                     `offer`, or the end of their server (inference/vllm/keeper.py)

It joins the hub as actors do, so that it hears of weights, and asks for no episode.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import uvloop

from slipstream.chat import Chat
from slipstream.config import RunConfig
from slipstream.errors import AddressError, ConfigurationError, InfrastructureError, SlipstreamError
from slipstream.flight_recorder import FLIGHT
from slipstream.http_server import HttpServer
from slipstream.inference.vllm import serving
from slipstream.inference.vllm.backend import VllmBackend
from slipstream.inference.vllm.contract import VllmClient
from slipstream.inference.vllm.front import Front, FrontClient
from slipstream.inference.vllm.keeper import Keeper, RunningServer, Server
from slipstream.inference.vllm.server import ServerOptions, VllmServer, check_head_size
from slipstream.inference.vllm.transports import transport_of
from slipstream.keys import client_keys
from slipstream.messages import Stop, Weights
from slipstream.model import choose_device, choose_dtype
from slipstream.receiving import canary_tolerance
from slipstream.rendezvous import await_hub, run_id
from slipstream.spool import Spool
from slipstream.stop_signals import STOPPED, end_when_asked
from slipstream.tokenizer import load_tokenizer
from slipstream.transport.client import ActorClient
from slipstream.transport.zeromq import DealerChannel
from slipstream.types import Sampling

REPORT_EVERY_S: Final = 1.0
CHECK_TOKENS: Final = 8
CHECKS: Final = 5
"""Tries to look at a server between two updates."""

log = logging.getLogger(__name__)


def main(config: RunConfig, folder: Path, name: str) -> int:
    """Serve a run until the hub says stop and return 0, or until a signal and return STOPPED.

    Raises ConfigurationError when servers do not start, AddressError without a hub, RefusedError and
    DeadlineError.
    """
    end_when_asked()
    if config.inference.backend != "vllm":
        raise ConfigurationError(
            f'inference.backend: expected "vllm", got "{config.inference.backend}": the actors of this run '
            "sample by themselves; start it with inference.backend=vllm"
        )
    address = await_hub(folder, f"serve {name}")
    return uvloop.run(_serve(config, folder, name, address))


async def _serve(config: RunConfig, folder: Path, name: str, address: str) -> int:
    spool = Spool(folder / "spool" / name, durability=config.hub.durability)
    channel = DealerChannel(address, client_keys(config.hub.keys, name))
    client = ActorClient(channel, spool, run_id(folder), name)
    role, asked = Serve(config, folder, client, name), False

    def stop() -> None:
        nonlocal asked
        asked = True
        role.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    await role.serve()
    return STOPPED if asked else 0


class Serve:
    """The servers of one role, their front, and its connection to the hub.

    Example: ``await Serve(config, folder, client, "serve-0").serve()``.
    """

    def __init__(self, config: RunConfig, folder: Path, client: ActorClient, name: str) -> None:
        """Prepare the servers that `config.inference` asks for; none is started yet."""
        self._config, self._folder, self._client, self._name = config, folder, client, name
        self._stopping = asyncio.Event()
        chat = _chat(folder)
        tolerance = canary_tolerance(config)

        transport = transport_of(config.inference.transport)

        def backend(client: VllmClient) -> VllmBackend:
            return VllmBackend(client, stop_token=chat.stop_token, transport=transport, tolerance=tolerance)

        self._keepers = [
            Keeper(server, name=f"{name}/{index}", backend=backend, tokenizer=chat.tokenizer)
            for index, server in enumerate(self._servers())
        ]

    def stop(self) -> None:
        """Finish: end the servers."""
        self._stopping.set()

    async def serve(self) -> None:
        """Run until stopped by the hub or by `stop`; whatever fails ends it."""
        key = secrets.token_urlsafe(32)
        front = Front(self._keepers, key=key)
        inference = self._config.inference
        server = HttpServer(front.app, who="serve", host=inference.host, port=inference.port)
        url = await server.start()
        serving.announce(self._folder, self._name, url=url, key=key, count=len(self._keepers))
        log.warning("%d vLLM servers behind %s", len(self._keepers), url)
        if inference.insecure:
            log.warning("inference.insecure: whoever listens on the way to %s reads its key", url)
        try:
            await self._until_stopped()
        finally:
            serving.withdraw(self._folder, self._name)
            await server.stop()
            await front.close()
            await self._client.close()

    async def _until_stopped(self) -> None:
        welcome = await self._client.connect()
        if welcome.update is not None:
            self._offer(Weights(update=welcome.update))
        loops: list[Coroutine[Any, Any, None]] = [keeper.run() for keeper in self._keepers]
        tasks = [asyncio.create_task(loop) for loop in (*loops, self._receive(), self._report())]
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        failed = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in failed:
            task.result()

    def _servers(self) -> list[Server]:
        inference, config = self._config.inference, self._config
        if inference.attach:
            return [RunningServer(url) for url in inference.attach]
        device = choose_device(config.device)
        if device.type == "cpu":
            check_head_size(self._folder / "checkpoints" / "warmup")
        dtype = choose_dtype(config.model.dtype, device)
        folder = self._folder / "vllm" / self._name
        return [
            VllmServer(
                ServerOptions(
                    model=str(self._folder / "checkpoints" / "warmup"),
                    program=inference.program,
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=config.environment.max_tokens,
                    max_num_seqs=inference.requests,
                    eager=inference.eager,
                    arguments=inference.arguments,
                    devices=inference.devices[index] if index < len(inference.devices) else "",
                ),
                folder=folder / str(index),
            )
            for index in range(inference.servers)
        ]

    async def _receive(self) -> None:
        """Do what the hub says."""
        while True:
            match await self._client.receive():
                case Weights() as weights:
                    self._offer(weights)
                case Stop():
                    self.stop()

    def _offer(self, weights: Weights) -> None:
        for keeper in self._keepers:
            keeper.offer(weights.update)

    async def _report(self) -> None:
        """Give signs of life, and counters for display, about once a second."""
        while True:
            FLIGHT.beat()
            await self._client.report(
                {
                    "servers": float(sum(bool(keeper.life) for keeper in self._keepers)),
                    "server_starts": float(sum(keeper.lives for keeper in self._keepers)),
                }
            )
            await asyncio.sleep(REPORT_EVERY_S)


def check(config: RunConfig, folder: Path) -> tuple[str, bool]:
    """Have all servers of a run prove what they hold; return a line for each, and whether all is well.

    Raises AddressError when the run has no servers.
    """
    found = serving.served(folder)
    if not found:
        raise AddressError(
            f"{folder / serving.FOLDER}: expected servers, there are none; start `slipstream serve`, or the "
            "run with inference.backend=vllm"
        )
    chat, tolerance = _chat(folder), canary_tolerance(config)

    async def examine(name: str, server: serving.Served) -> tuple[str, bool]:
        async with FrontClient(server.url, key=server.key) as client:
            try:
                return f"{name} {await _examined(client, chat.stop_token, tolerance)}", True
            except SlipstreamError as error:
                return f"{name} FAILED: {error}", False

    async def examine_all() -> list[tuple[str, bool]]:
        return [await examine(name, server) for name, server in found.items()]

    lines = uvloop.run(examine_all())
    return "".join(f"{line}\n" for line, _ in lines), all(well for _, well in lines)


def _chat(folder: Path) -> Chat:
    return Chat(load_tokenizer(folder / "checkpoints" / "warmup"))


async def _examined(client: FrontClient, stop_token: int, tolerance: float) -> str:
    """Return what a server proves; raises SlipstreamError when it does not."""
    for _ in range(CHECKS):
        proof = await client.recheck()
        began = time.monotonic()
        greedy = Sampling(temperature=0.0, max_tokens=CHECK_TOKENS)
        answer = await client.generate((stop_token,), greedy, stop_token=stop_token, seed=0)
        milliseconds = (time.monotonic() - began) * 1e3
        scores = await client.score((stop_token, *answer.token_ids))
        versions = {span.version for span in answer.spans}
        # It says so only when it has proven them, and samples from them before.
        updated = any(version.isdecimal() and int(version) > proof.serial for version in versions)
        if not updated and (await client.load()).serial == proof.serial:
            break
    else:
        raise InfrastructureError(f"it took new weights {CHECKS} times while it was checked; try again")
    if versions != {str(proof.serial)}:
        raise InfrastructureError(f"expected tokens of serial {proof.serial}, got {sorted(versions)}")
    error = max(abs(a - b) for a, b in zip(answer.logprobs, scores, strict=True))
    if not error <= tolerance:
        raise InfrastructureError(f"its tokens' scores are {error:.3g} nats off, expected {tolerance:g}")
    return (
        f"is {answer.server}: serial {proof.serial} proven anew, checksum64 {proof.checksum64:016x}, "
        f"{len(proof.canary_logprobs)} canary log-probabilities agree to {tolerance:g} nats; "
        f"{len(answer.token_ids)} tokens in {milliseconds:.0f} ms, scored again to {error:.1g} nats"
    )
