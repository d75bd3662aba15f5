"""Floor 4. Keeps one vLLM server alive and on the newest weights; knows what each of its lives has proven.

    starting ── first token, tokenizer checked ──▶ serving ── newest weights, one update after the other
        ▲                                             │
        └───────────── back-off ◀──── died, or fenced: half loaded, or proof that is none

    loop     waits for                           released by
    run      newer weights                       `offer`, or a look at the process every WATCH_S
    proof    a serial to be proven               its proof, the life's end, or the caller's deadline

A life is what lies between two starts: a server that comes back holds other weights than it did.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from slipstream.errors import (
    CheckpointError,
    ConfigurationError,
    DeadlineError,
    InfrastructureError,
    ProtocolError,
)
from slipstream.flight_recorder import FLIGHT
from slipstream.inference.vllm.backend import Speaks, VllmBackend
from slipstream.inference.vllm.contract import VllmClient
from slipstream.retries import Backoff
from slipstream.types import WeightProof, WeightUpdate

WATCH_S: Final = 1.0
KEPT_PROOFS: Final = 256
STARTS: Final = 3
"""So many in a row without a first token are a mistake that another would not mend."""
_FAILURES: Final = (InfrastructureError, DeadlineError, ProtocolError)

log = logging.getLogger(__name__)


class Server(Protocol):
    """A process, or somebody else's, that serves vLLM's routes at `url`."""

    url: str

    async def start(self) -> None:
        """Have it answer; raises ConfigurationError, InfrastructureError, DeadlineError."""

    def check(self) -> None:
        """Raise InfrastructureError when it has died."""

    def stop(self) -> None:
        """End it, if it is ours."""


class RunningServer:
    """A server that somebody else has started, with the same arguments, and ends.

    Example: ``Keeper(RunningServer("http://127.0.0.1:8000"), ...)``.
    """

    def __init__(self, url: str) -> None:
        """Use the server at `url`."""
        self.url = url

    async def start(self) -> None:
        """Have it sample a token; raises InfrastructureError and DeadlineError."""
        async with VllmClient(self.url) as client:
            await client.check_health()

    def check(self) -> None:
        """Do nothing: its next answer tells."""

    def stop(self) -> None:
        """Do nothing: it is not ours."""


class Keeper:
    """One server through all its lives.

    Example: ``keeper = Keeper(server, name="serve-0/0", backend=..., tokenizer=tokenizer)``;
    ``keeper.offer(update)``; ``await keeper.run()``.
    """

    def __init__(
        self,
        server: Server,
        *,
        name: str,
        backend: Callable[[VllmClient], VllmBackend],
        tokenizer: Speaks,
        backoff: Backoff | None = None,
    ) -> None:
        """Keep `server`; its lives are called `name` and a random word."""
        self._server, self._name, self._tokenizer = server, name, tokenizer
        self._make_backend, self._backoff = backend, backoff or Backoff(first_s=1.0, longest_s=60.0)
        self._backend: VllmBackend | None = None
        self._newest: WeightUpdate | None = None
        self._tried = -1
        self._changed = asyncio.Event()
        self._proven = asyncio.Condition()
        self._proofs: dict[tuple[str, int], WeightProof] = {}
        self._failures = 0
        """In a row, without a proof between them."""
        self.lives = 0
        self.life = ""
        """Which life serves, or ""."""
        self.state = "starting"

    @property
    def url(self) -> str:
        """Return where vLLM itself listens."""
        return self._server.url

    @property
    def serial(self) -> int:
        """Return the serial that this life has proven last, or -1."""
        return self._backend.serial if self._backend is not None else -1

    def offer(self, update: WeightUpdate) -> None:
        """Have the server take these weights next; older ones that it has not begun with are left out."""
        if self._newest is None or update.version.serial > self._newest.version.serial:
            self._newest = update
            self._changed.set()

    async def run(self) -> None:
        """Keep the server until cancelled.

        Raises ConfigurationError for a server that is not this run's, or that never starts.
        """
        while True:
            try:
                await self._live()
            except _FAILURES as error:
                failure = error
            finally:
                self.state, self.life, self._backend = "stopped", "", None
                async with self._proven:
                    self._proven.notify_all()
                await asyncio.to_thread(self._server.stop)
            await self._rest(failure)

    async def proof(self, serial: int, *, life: str = "") -> WeightProof | None:
        """Return the proof of a serial by a life, or by the present one of that serial or a newer one.

        Waits for it; None once that life is over without it. Its caller has the deadline.
        """
        async with self._proven:
            while (found := self._found(serial, life)) is None:
                if life and life != self.life:
                    return None
                await self._proven.wait()
        return found

    async def check(self) -> WeightProof:
        """Have the server prove its weights again; raises InfrastructureError."""
        if self._backend is None:
            raise InfrastructureError(f"{self._name}: {self.state}")
        return await self._backend.prove_again()

    def _found(self, serial: int, life: str) -> WeightProof | None:
        if life:
            return self._proofs.get((life, serial))
        known = [proof for (of, _), proof in self._proofs.items() if of == self.life]
        return max((p for p in known if p.serial >= serial), key=lambda p: p.serial, default=None)

    async def _live(self) -> None:
        """Start the server and feed it until it fails."""
        self.state, self._tried = "starting", -1
        await self._server.start()
        async with VllmClient(self._server.url) as client:
            self._backend = backend = self._make_backend(client)
            await backend.attach(self._tokenizer)
            self.lives += 1
            self.life, self.state = f"{self._name}#{secrets.token_hex(4)}", "serving"
            log.warning("%s serves as %s", self._server.url, self.life)
            while True:
                self._changed.clear()
                self._server.check()
                if backend.fenced:
                    raise InfrastructureError(backend.fenced)
                if self._newest is not None and self._newest.version.serial > self._tried:
                    await self._load(backend, self._newest)
                else:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(WATCH_S):
                            await self._changed.wait()

    async def _load(self, backend: VllmBackend, update: WeightUpdate) -> None:
        self._tried = update.version.serial
        try:
            proof = await backend.load(update)
        except CheckpointError as error:
            # Behind a server that was busy for long, weights may be gone from disk: newer ones will come.
            log.warning("%s: serial %d is left out: %s", self.life, self._tried, error)
            return
        self._failures = 0
        async with self._proven:
            self._proofs[self.life, proof.serial] = WeightProof(
                serial=proof.serial,
                checksum64=proof.checksum64,
                canary_logprobs=proof.canary_logprobs,
                server=self.life,
            )
            while len(self._proofs) > KEPT_PROOFS:
                del self._proofs[next(iter(self._proofs))]
            self._proven.notify_all()
        FLIGHT.note(f"{self.life} has proven serial {proof.serial}")

    async def _rest(self, error: Exception) -> None:
        """Wait before the next start; raises ConfigurationError when it never starts."""
        self._failures += 1
        if not self.lives and self._failures >= STARTS:
            raise ConfigurationError(f"{self._name} did not start {STARTS} times in a row; {error}")
        pause = self._backoff.first_s + self._backoff.wait_s(self._failures - 1)
        self.state = f"down, starts again in {pause:.1f} s: {error}"
        log.warning("%s: %s", self._name, self.state)
        FLIGHT.note(f"{self._name}: {self.state}")
        await asyncio.sleep(pause)
