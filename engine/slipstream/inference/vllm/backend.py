"""Floor 4. An inference backend over one vLLM server that proves which weights it holds.

    load      pause (drops keys and values), start, update, finish, reset of prefixes, resume, proof
    proof     1. the serial and the checksum of all tensors, computed by every worker from what arrived
              2. the server's log-probabilities of the update's canary, against the learner's own
              3. tokens sampled behind a prompt that earlier proofs have left in the prefix cache, against
                 their log-probabilities computed without the cache: none of it may be of older weights

    loop      waits for                         released by
    generate  one answer                        it, its deadline, or the fence
    load      the update before it              its end

A delivery that fails is made once more, whole, while the server is paused. When that fails as well, or the
proof does, the server is fenced: it may be half loaded while it answers "healthy", so that every later call
fails until another server takes its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import numpy as np

from slipstream.errors import (
    ConfigurationError,
    DeadlineError,
    InfrastructureError,
    NumericsError,
    ProtocolError,
)
from slipstream.flight_recorder import FLIGHT
from slipstream.inference.sampling import rollout_key
from slipstream.inference.vllm.answers import whole_message
from slipstream.inference.vllm.contract import Generated, VllmClient
from slipstream.inference.vllm.identity import vocabulary_digest
from slipstream.inference.vllm.transports import FilesystemTransport, Held, Offer, WeightTransport
from slipstream.receiving import CANARY_TOLERANCE, refuse_proof
from slipstream.types import Completion, Int32Array, Sampling, WeightProof, WeightUpdate

PROBE_TOKENS: Final = 4
_FAILURES: Final = (InfrastructureError, DeadlineError, ProtocolError, NumericsError)


class Speaks(Protocol):
    """A tokenizer."""

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens with their ids."""


class VllmBackend:
    """An `InferenceBackend` over one vLLM server.

    Example: ``backend = VllmBackend(VllmClient(server.url), stop_token=4); await backend.attach(tokenizer)``.
    """

    def __init__(
        self,
        client: VllmClient,
        *,
        stop_token: int,
        transport: WeightTransport | None = None,
        tolerance: float = CANARY_TOLERANCE["float32"],
    ) -> None:
        """Use the server behind `client`; `tolerance` in nats is that of both checks of log-probabilities."""
        self._client = client
        self._stop_token = stop_token
        self._transport = transport or FilesystemTransport()
        self._tolerance = tolerance
        self._updating = asyncio.Lock()
        self._loaded: WeightUpdate | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._workers = 0
        self._probe: tuple[int, ...] = ()
        self.fenced = ""
        """Why the server may not be used any more, or ""."""
        self.serial = -1
        """Of the weights proven last, or -1."""

    async def attach(self, tokenizer: Speaks) -> None:
        """Make sure that the server speaks the tokens of `tokenizer`, and agree on how weights come.

        Raises ConfigurationError for another vocabulary or other log-probabilities.
        """
        vocabulary = tokenizer.get_vocab()
        for identity in await self._client.worker_call("slipstream_identity"):
            self._refuse_stranger(identity, vocabulary)
        self._workers = await self._client.world_size()
        (model,) = await self._client.models()
        block, longest = int(identity["block_tokens"]), model.max_model_len or 0
        # One full block, which the prefix cache keeps, and a token to sample behind.
        length = min(block + 1, longest - PROBE_TOKENS - 1)
        self._probe = tuple(int(i) for i in np.resize(np.linspace(0, len(vocabulary) - 1, 31), length))
        await self._client.init_weight_transfer({"transport": self._transport.name})

    async def generate(self, token_ids: Int32Array, sampling: Sampling, *, rollout_id: int) -> Completion:
        """Sample one message after the [T] tokens of a rollout.

        Random numbers are keyed by rollout and position. An answer that the server cuts off is gone on with.
        Raises InfrastructureError, also for a fenced server, DeadlineError and ProtocolError.
        """

        async def ask(tokens: Sequence[int], rest: Sampling) -> Generated:
            seed = rollout_key(rollout_id, len(tokens))
            return await self._client.generate(tokens, rest, stop_token=self._stop_token, seed=seed)

        async with self._unless_fenced():
            return await whole_message(ask, token_ids, sampling)

    def release(self, rollout_id: int) -> None:
        """Do nothing: the server's prefix cache forgets by itself what is not used."""

    async def load(self, update: WeightUpdate) -> WeightProof:
        """Give the server new weights between two of its steps and have it prove them.

        Raises InfrastructureError once the server is fenced, which it is after a delivery that failed twice
        or a proof that is none, and CheckpointError, having done nothing, for damaged published weights.
        """
        async with self._updating:
            self._check_fence()
            name = f"update to serial {update.version.serial}"
            try:
                await self._delivered(update, name)
                await self._client.resume()
                proof = await self.prove(update)
            except _FAILURES as error:
                # Not tried again: tokens sampled since it goes on would pass as those of a second try.
                self._fence(f"{name} failed: {error}")
                raise self._fence_error() from error
            except asyncio.CancelledError:
                self._fence(f"{name} was given up half-way")
                raise
            self.serial, self._loaded = update.version.serial, update
            return proof

    async def prove_again(self) -> WeightProof:
        """Return a new proof of the weights loaded last; an update that is under way is waited for.

        Raises InfrastructureError when there is none.
        """
        async with self._updating:
            self._check_fence()
            if self._loaded is None:
                raise InfrastructureError(
                    f"{self._client.base_url}: it has loaded no weights that it could prove"
                )
            return await self.prove(self._loaded)

    async def prove(self, update: WeightUpdate) -> WeightProof:
        """Return the server's proof of an update; raises InfrastructureError when it is not one."""
        await self._check_prefix_cache()
        answers = await self._client.worker_call("slipstream_proof")
        odd = [answer for answer in answers if answer != answers[0]]
        if odd or not answers:
            raise InfrastructureError(
                f"{self._client.base_url}: its workers hold different weights: {answers}"
            )
        held = self._held_of(answers[0])
        canary = await self._client.score(update.canary_tokens) if update.canary_tokens else ()
        proof = WeightProof(serial=held.serial, checksum64=held.checksum64, canary_logprobs=canary)
        if held.serial != update.version.serial:
            raise InfrastructureError(
                f"{self._client.base_url}: expected serial {update.version.serial}, it holds {held.serial}"
            )
        if reason := refuse_proof(proof, update, self._tolerance):
            raise InfrastructureError(f"{self._client.base_url}: {reason}")
        return proof

    async def _delivered(self, update: WeightUpdate, name: str) -> None:
        """Deliver an update, once more if that fails; the server is paused then, and samples nothing."""
        try:
            await self._deliver(update, await self._held())
        except _FAILURES as error:
            FLIGHT.note(f"{name} failed and is made once more, whole: {error}")
            await self._deliver(update, None)

    async def _deliver(self, update: WeightUpdate, held: Held | None) -> None:
        client = self._client
        # To read and compare all weights takes a while, in which the server goes on.
        offer = await asyncio.to_thread(self._transport.offer, update, workers=self._workers, held=held)
        await client.pause()
        # What an earlier update left half-way would refuse this one.
        await client.worker_call("slipstream_abandon")
        await client.start_weight_update()
        await self._hand_over(offer)
        await client.finish_weight_update(str(update.version.serial))
        await client.reset_prefix_cache()

    async def _held(self) -> Held | None:
        """Return the weights of which all workers say they hold the tensors, or None."""
        answers = await self._client.worker_call("slipstream_held")
        if not answers or any(answer is None or answer != answers[0] for answer in answers):
            return None
        return self._held_of(answers[0])

    def _held_of(self, answer: Any) -> Held:
        """Return the weights that a worker says it holds."""
        try:
            return Held(serial=int(answer["serial"]), checksum64=int(answer["checksum64"], 16))
        except (KeyError, TypeError, ValueError):
            raise ProtocolError(
                f"{self._client.base_url}: expected a proof, got {str(answer)[:200]}"
            ) from None

    async def _hand_over(self, offer: Offer) -> None:
        """Have the workers take an offer, and send it meanwhile where its transport sends."""
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._client.update_weights({"info": offer.info}))
                if offer.send is not None:
                    both.create_task(asyncio.to_thread(offer.send))
        except* _FAILURES as group:
            # The other end only breaks off because of the first.
            raise group.exceptions[0] from group
        finally:
            if offer.withdraw is not None:
                offer.withdraw()

    async def _check_prefix_cache(self) -> None:
        """Compare tokens sampled behind the probe, maybe cached, with scores computed without the cache."""
        greedy = Sampling(temperature=0.0, max_tokens=PROBE_TOKENS)
        drawn = await self._client.generate(self._probe, greedy, stop_token=self._stop_token, seed=0)
        fresh = await self._client.score(self._probe + drawn.token_ids)
        found, expected = np.array(drawn.logprobs), np.array(fresh[len(self._probe) - 1 :])
        error = float(np.abs(found - expected).max(initial=0.0))
        if not error <= self._tolerance:
            raise InfrastructureError(
                f"{self._client.base_url}: its prefix cache is of other weights: behind a cached prompt "
                f"log-probabilities are {error:.3g} nats off, expected at most {self._tolerance:g}"
            )

    def _refuse_stranger(self, identity: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
        server, expected = self._client.base_url, vocabulary_digest(vocabulary)
        if identity["vocabulary"] != expected:
            raise ConfigurationError(
                f"{server}: expected the run's vocabulary (sha256 {expected[:16]}, {len(vocabulary)} ids), "
                f"got another ({identity['vocabulary'][:16]}); start the server from this run's model folder"
            )
        if int(identity["rows"]) < len(vocabulary):
            raise ConfigurationError(
                f"{server}: expected a model of at least {len(vocabulary)} tokens, got {identity['rows']}"
            )
        if not identity["logprobs_mode"].endswith("processed_logprobs"):
            raise ConfigurationError(
                f"{server}: expected --logprobs-mode processed_logprobs, got {identity['logprobs_mode']}"
            )

    @asynccontextmanager
    async def _unless_fenced(self) -> AsyncIterator[None]:
        """Let the current task go on until the server is fenced; raises InfrastructureError then."""
        self._check_fence()
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self.fenced or task not in self._running or task.uncancel() > 0:
                raise
            raise self._fence_error() from None
        finally:
            self._running.discard(task)

    def _fence(self, reason: str) -> None:
        self.fenced = reason
        FLIGHT.note(f"{self._client.base_url} is fenced: {reason}")
        # They wait for a server that stays paused.
        for task in self._running:
            task.cancel()

    def _check_fence(self) -> None:
        if self.fenced:
            raise self._fence_error()

    def _fence_error(self) -> InfrastructureError:
        return InfrastructureError(f"{self._client.base_url} is fenced and must be restarted: {self.fenced}")
