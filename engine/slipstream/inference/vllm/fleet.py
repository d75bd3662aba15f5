"""Floor 4. An actor's backend over all vLLM servers of its run, and the proofs of what they sample.

    servers    RUN/servers/NAME.json, written by `slipstream serve`: looked for once a second
    generate   router ── place ──▶ server ── tokens of (life, serial) ──▶ proof shown to the hub? ──▶ out
                   ▲                 │ failed, or cut off: elsewhere, with the tokens there are
                   └─────────────────┘

    loop       waits for                                released by
    generate   a place, an answer, a proof              each of them, at most `generate_s`
    load       the first server to prove the weights    that one
    run        the next look                            LOOK_S

A proof reaches the hub on the actor's own connection, before the trajectory it is for. Tokens whose proof
does not come in time go on to the hub without it, which counts them as unproven.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from slipstream.deadlines import Deadline
from slipstream.errors import (
    DeadlineError,
    InfrastructureError,
    NumericsError,
    ProtocolError,
)
from slipstream.flight_recorder import FLIGHT
from slipstream.inference.sampling import rollout_key
from slipstream.inference.vllm.answers import whole_message
from slipstream.inference.vllm.contract import Generated, VllmDeadlines
from slipstream.inference.vllm.front import FrontClient
from slipstream.inference.vllm.router import Router
from slipstream.inference.vllm.serving import Served, served
from slipstream.receiving import refuse_proof
from slipstream.retries import Backoff
from slipstream.types import Completion, Int32Array, Sampling, WeightProof, WeightUpdate

LOOK_S: Final = 1.0
KEPT_UPDATES: Final = 256
KEPT_PROOFS: Final = 4096
PROOF_S: Final = 60.0
"""Longest that tokens wait for the proof of their weights."""
_FAILURES: Final = (InfrastructureError, DeadlineError, ProtocolError)

log = logging.getLogger(__name__)


class Fleet:
    """A `Sampler` over the servers of a run folder.

    Example: ``fleet = Fleet(folder, show=client.prove, stop_token=4, max_tokens=256, most=96,
    tolerance=1e-3)``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        show: Callable[[WeightProof], Awaitable[None]],
        stop_token: int,
        max_tokens: int,
        most: int,
        tolerance: float,
        deadlines: VllmDeadlines | None = None,
    ) -> None:
        """Find servers in `folder`; `show` gives their proofs to the hub.

        max_tokens: of a prompt with its answer; most: requests at once; tolerance: of canaries, in nats.
        """
        self._folder, self._show, self._stop_token = folder, show, stop_token
        self._max_tokens, self._tolerance = max_tokens, tolerance
        self._deadlines = deadlines or VllmDeadlines()
        self._router = Router(most=most, backoff=Backoff(first_s=0.5, longest_s=30.0))
        self._known: dict[str, Served] = {}
        self._clients: dict[str, FrontClient] = {}
        self._updates: dict[int, WeightUpdate] = {}
        self._homes: dict[str, FrontClient] = {}
        """Life of a server -> who asks it."""
        self._proving: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self.serial = -1
        self.tokens_generated = 0

    def announce(self, update: WeightUpdate) -> None:
        """Learn of published weights: proofs of them are checked against these."""
        self._updates[update.version.serial] = update
        while len(self._updates) > KEPT_UPDATES:
            del self._updates[next(iter(self._updates))]
        self._wake()

    async def generate(self, token_ids: Int32Array, sampling: Sampling, *, rollout_id: int) -> Completion:
        """Sample one message after the [T] tokens of a rollout, on whichever server has room.

        Raises ValueError when the tokens leave no room for another, and InfrastructureError when no server
        answered in time.
        """
        if not 0 < len(token_ids) < self._max_tokens:
            raise ValueError(f"generate: expected 1 to {self._max_tokens - 1} tokens, got {len(token_ids)}")
        deadline = Deadline(self._deadlines.generate_s, "actor", f"a vLLM server of {self._folder}")

        async def ask(tokens: Sequence[int], rest: Sampling) -> Generated:
            return await self._ask(tokens, rest, rollout_id, deadline)

        room = min(sampling.max_tokens, self._max_tokens - len(token_ids))
        try:
            completion = await whole_message(ask, token_ids, replace(sampling, max_tokens=room))
        except (DeadlineError, ProtocolError, NumericsError) as error:
            raise InfrastructureError(str(error)) from error
        await self._until_shown(completion)
        self.tokens_generated += len(completion.token_ids)
        return completion

    def release(self, rollout_id: int) -> None:
        """Forget a rollout; its server's prefix cache forgets by itself."""
        self._router.release(rollout_id)

    async def load(self, update: WeightUpdate) -> WeightProof:
        """Wait until some server has proven these weights or newer ones, and return that proof.

        The servers take published weights by themselves: their role hears of them as an actor does.
        """
        self.announce(update)
        serial = update.version.serial
        while True:
            asking = [asyncio.create_task(self._proof(client, serial)) for client in self._clients.values()]
            try:
                async with asyncio.timeout(PROOF_S + LOOK_S):
                    for asked in asyncio.as_completed(asking):
                        if (proof := await asked) is not None:
                            self.serial = max(self.serial, proof.serial)
                            return proof
            except TimeoutError:
                FLIGHT.note(f"no server has proven serial {serial} for {PROOF_S:g} s")
            finally:
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
            await self._change(LOOK_S)

    async def run(self) -> None:
        """Look for servers, and at them, until cancelled."""
        while True:
            self._find()
            async with asyncio.TaskGroup() as looks:
                for name in self._clients:
                    looks.create_task(self._look(name))
            await asyncio.sleep(LOOK_S)

    async def close(self) -> None:
        """Close all connections."""
        for task in self._proving.values():
            task.cancel()
        await asyncio.gather(*self._proving.values(), return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    async def _ask(
        self, tokens: Sequence[int], rest: Sampling, rollout_id: int, deadline: Deadline
    ) -> Generated:
        """Ask one server after the other until one answers."""
        seed = rollout_key(rollout_id, len(tokens))
        while True:
            name = await self._place(rollout_id, deadline)
            client = self._clients[name]
            try:
                async with asyncio.timeout(deadline.remaining()):
                    answer = await client.generate(tokens, rest, stop_token=self._stop_token, seed=seed)
            except (InfrastructureError, DeadlineError, TimeoutError) as error:
                self._router.failed(name, time.monotonic())
                FLIGHT.note(f"{name} failed, rollout {rollout_id} goes elsewhere: {error}")
                if deadline.expired():
                    raise InfrastructureError(str(error) or str(deadline.error())) from error
            except BaseException:  # cancelled, or refused: another server would refuse it, too
                self._router.given_up(name)
                raise
            else:
                self._router.done(name)
                self._homes[answer.server] = client
                return answer
            finally:
                self._wake()

    async def _place(self, rollout_id: int, deadline: Deadline) -> str:
        while (name := self._router.place(rollout_id, time.monotonic())) is None:
            deadline.check()
            await self._change(min(LOOK_S, deadline.remaining()))
        return name

    async def _until_shown(self, completion: Completion) -> None:
        """Wait until the hub has been shown the proof of every weight that sampled a token, or give up."""
        for server, serial in completion.samplers:
            task = self._proving.get((server, serial))
            if task is None:
                task = asyncio.create_task(self._show_proof(server, serial))
                self._proving[server, serial] = task
                while len(self._proving) > KEPT_PROOFS:
                    del self._proving[next(iter(self._proving))]
            with suppress(TimeoutError):
                async with asyncio.timeout(PROOF_S):
                    await asyncio.shield(task)

    async def _show_proof(self, server: str, serial: int) -> None:
        proof = await self._proof(self._homes[server], serial, life=server)
        if proof is None:
            log.warning("%s has not proven serial %d: its tokens count as unproven", server, serial)
            return
        await self._show(proof)
        self.serial = max(self.serial, serial)

    async def _proof(self, client: FrontClient, serial: int, *, life: str = "") -> WeightProof | None:
        """Return a sound proof of a server, or None when it has none or a wrong one."""
        try:
            proof = await client.proof(serial, life=life, seconds=PROOF_S)
        except _FAILURES as error:
            FLIGHT.note(f"no proof of serial {serial}: {error}")
            return None
        deadline = Deadline(PROOF_S, "actor", f"the hub to announce serial {proof.serial}")
        while (update := self._updates.get(proof.serial)) is None:
            if deadline.expired():
                FLIGHT.note(f"{proof.server} has proven serial {proof.serial}, of which the hub said nothing")
                return None
            await self._change(LOOK_S)
        if reason := refuse_proof(proof, update, self._tolerance):
            log.warning("%s: %s", proof.server, reason)
            return None
        return proof

    async def _look(self, name: str) -> None:
        try:
            look = await self._clients[name].load()
        except _FAILURES as error:
            FLIGHT.note(f"{name} does not say how it is: {error}")
            return
        self._router.observe(name, kv_cache=look.kv_cache, waiting=look.waiting)
        self._wake()

    def _find(self) -> None:
        """Take in which servers there are now."""
        found = served(self._folder)
        for name in [name for name, known in self._known.items() if found.get(name) != known]:
            # Not closed: answers and proofs may be on their way.
            del self._known[name], self._clients[name]
        for name in found.keys() - self._known.keys():
            self._known[name] = found[name]
            self._clients[name] = FrontClient(found[name].url, key=found[name].key, deadlines=self._deadlines)
        self._router.keep(set(found))

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self, seconds: float) -> None:
        """Wait for a place, a server or weights, for at most so long."""
        changed = self._changed
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await changed.wait()
