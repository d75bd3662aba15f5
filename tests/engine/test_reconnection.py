"""A connection that breaks and is made anew: what was on its way is said again at once, hub quiet or not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slipstream import synthetic
from slipstream.config import RunConfig
from slipstream.deadlines import Deadline, Deadlines
from slipstream.ingest import IngestLog
from slipstream.ledger import Ledger
from slipstream.spool import Spool
from slipstream.transport.client import ActorClient, LearnerClient
from slipstream.transport.zeromq import DealerChannel, RouterServer, SyncDealerChannel

SECONDS = 20.0
PATIENT = Deadlines(ping_s=10 * SECONDS, silence_s=20 * SECONDS)
"""Nobody pings: only the connection itself can tell."""


class Relay:
    """A TCP connection's middle, which can swallow what the client says, and break it."""

    def __init__(self, address: str) -> None:
        """Listen for clients of a hub."""
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self._hub = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self.swallowing, self.swallowed = False, threading.Event()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def cut(self) -> None:
        """Break the connection once it has swallowed something, and let the next one pass everything."""
        assert self.swallowed.wait(SECONDS)
        self.swallowing = False
        self._shut(*self._ends)

    def close(self) -> None:
        """End all connections."""
        self._shut(self._listener, *self._ends)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._ends):
            end.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments))
        self._threads[-1].start()

    def _shut(self, *ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                hub = socket.create_connection(self._hub)
                self._ends += [client, hub]
                self._start(self._pass, client, hub, True)
                self._start(self._pass, hub, client, False)

    def _pass(self, source: socket.socket, target: socket.socket, upwards: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if upwards and self.swallowing:
                    self.swallowed.set()
                else:
                    target.sendall(data)
        self._shut(target)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    log = IngestLog(tmp_path / "log")
    yield Ledger(RunConfig(), "run", log, lambda _: "nowhere")
    log.close()


@pytest.fixture
def relay(ledger: Ledger) -> Iterator[Relay]:
    server = RouterServer(ledger, "tcp://127.0.0.1:*", lost=ledger.lost)
    stopping = threading.Event()
    thread = threading.Thread(target=server.run, args=(stopping.is_set,))
    thread.start()
    between = Relay(server.address)
    yield between
    between.close()
    stopping.set()
    thread.join()
    server.close()


def test_an_actor_sends_again_what_a_broken_connection_swallowed(
    relay: Relay, ledger: Ledger, tmp_path: Path
) -> None:
    async def go() -> None:
        channel, spool = DealerChannel(relay.address), Spool(tmp_path / "a.spool")
        client = ActorClient(channel, spool, "run", "a", deadlines=PATIENT)
        await client.connect()
        relay.swallowing = True
        await client.send(synthetic.trajectory(8))
        await asyncio.to_thread(relay.cut)
        await client.drain(SECONDS)
        assert client.epoch == 1
        await client.close()

    asyncio.run(go())
    assert ledger.books()["quarantined"] == 1  # no lease was ever granted for it
    assert ledger.books()["duplicate"] == 0


def test_the_learner_says_again_what_a_broken_connection_swallowed(relay: Relay, ledger: Ledger) -> None:
    learner = LearnerClient(SyncDealerChannel(relay.address), "run", "learner", deadlines=PATIENT)
    learner.connect(0)
    relay.swallowing = True
    learner.publish(synthetic.update(0, step=0))
    relay.cut()
    heard = Deadline(SECONDS, "the hub", "the weights whose announcement was swallowed")
    while ledger.state.newest is None:
        assert learner.pull(0, 0.05) is None
        heard.check()
    learner.close()
    assert ledger.state.newest.version.serial == 0
    assert ledger.state.incarnation == 0
