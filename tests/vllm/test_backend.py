"""A real vLLM server: its log-probabilities are the policy's, its versions right, its lies found out."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch

from slipstream.attention import PackedSegments, run_decoder
from slipstream.errors import CheckpointError, ConfigurationError, InfrastructureError
from slipstream.inference.vllm.backend import VllmBackend
from slipstream.inference.vllm.contract import VllmClient
from slipstream.inference.vllm.transports import (
    DeltaTransport,
    FilesystemTransport,
    GlooTransport,
    Held,
    Offer,
    WeightTransport,
)
from slipstream.inference.vllm.transports import delta as delta_module
from slipstream.model import canary_logprobs, copy_weights, head
from slipstream.types import Completion, Sampling, WeightUpdate

if TYPE_CHECKING:
    from conftest import World

PROMPT = np.arange(5, 25, dtype=np.int32)
AGREE = 1e-4
"""Nats between float32 holders of the same weights, on every token."""


def logprobs_under(world: World, tokens: tuple[int, ...], serial: int) -> np.ndarray:
    """Return our own model's log-probabilities of tokens 1.., with the weights of a serial."""
    model = world.policy.model
    with torch.no_grad():
        copy_weights(model, world.history[serial])
    found = np.array(canary_logprobs(model, tokens))
    with torch.no_grad():
        copy_weights(model, world.history[world.serial])
    return found


def check_every_token(world: World, prompt: np.ndarray, completion: Completion) -> None:
    """Check each token's log-probability under the version it claims."""
    tokens = (*prompt.tolist(), *completion.token_ids.tolist())
    for serial in np.unique(completion.versions).tolist():
        own = logprobs_under(world, tokens, serial)[len(prompt) - 1 :]
        claimed = completion.versions == serial
        assert np.abs(own - completion.logprobs)[claimed].max() < AGREE


@asynccontextmanager
async def in_flight(backend: VllmBackend) -> AsyncIterator[list[asyncio.Task[Completion]]]:
    """Yield requests that the server works on for seconds more: meanwhile each of its steps takes 20 ms."""
    client = backend._client
    await client.worker_call("linger", seconds=0.02)
    ask = client._ask

    async def endless(token_ids: Sequence[int], parameters: dict[str, Any]) -> Any:
        return await ask(token_ids, {**parameters, "stop_token_ids": []})

    sampling = Sampling(max_tokens=480)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "_ask", endless)
        running = [asyncio.create_task(backend.generate(PROMPT, sampling, rollout_id=n)) for n in range(8)]
        # One that comes later is answered only once they run.
        await backend.generate(PROMPT, Sampling(max_tokens=1), rollout_id=8)
    assert not any(task.done() for task in running)
    try:
        yield running
    finally:
        await client.worker_call("linger", seconds=0.0)


def test_seeded_requests_survive_a_prefill_in_parts(world: World) -> None:
    """Together they are longer than a step of the server, as after an update with many in flight."""
    prompts = [np.arange(5 + n, 5 + n + 450, dtype=np.int32) % 700 for n in range(32)]

    async def work(backend: VllmBackend) -> list[Completion]:
        await backend.load(world.publish())
        sampling = Sampling(max_tokens=8)
        asked = [backend.generate(prompt, sampling, rollout_id=n) for n, prompt in enumerate(prompts)]
        return await asyncio.gather(*asked)

    for prompt, completion in zip(prompts, world.run(work), strict=True):
        assert completion.versions.tolist() == [world.serial] * len(completion.token_ids)
        check_every_token(world, prompt, completion)


async def fenced(running: list[asyncio.Task[Completion]]) -> bool:
    """Return whether all requests that were running have ended by the fence."""
    ends = await asyncio.gather(*running, return_exceptions=True)
    return all("fenced and must be restarted" in str(end) for end in ends)


@pytest.mark.parametrize("transport", [FilesystemTransport(), GlooTransport()], ids=lambda t: t.name)
def test_logprobs_are_the_policys_after_each_update(world: World, transport: WeightTransport) -> None:
    async def work(backend: VllmBackend) -> None:
        for _ in range(3):
            update = world.publish()
            proof = await backend.load(update)
            assert (proof.serial, proof.checksum64) == (update.version.serial, update.version.checksum64)
            assert np.allclose(proof.canary_logprobs, update.canary_logprobs, atol=AGREE)
            tasks = [
                backend.generate(PROMPT[: 4 + n], Sampling(max_tokens=24), rollout_id=n) for n in range(8)
            ]
            for n, completion in enumerate(await asyncio.gather(*tasks)):
                assert set(completion.versions.tolist()) == {world.serial}
                check_every_token(world, PROMPT[: 4 + n], completion)

    world.run(work, transport=transport)


def test_a_tempered_distribution_is_the_one_drawn_from(world: World) -> None:
    async def work(backend: VllmBackend) -> Completion:
        await backend.load(world.publish())
        return await backend.generate(PROMPT, Sampling(temperature=0.7, max_tokens=32), rollout_id=1)

    completion = world.run(work)
    tokens = torch.tensor([*PROMPT.tolist(), *completion.token_ids.tolist()])
    model = world.policy.model
    with torch.no_grad():
        segments = PackedSegments(np.array([0, len(tokens)]), head(model).device)
        hidden = run_decoder(model, tokens, torch.arange(len(tokens)), segments)
        logprobs = torch.log_softmax(hidden @ head(model).T / 0.7, dim=-1)
    own = logprobs[len(PROMPT) - 1 : -1].gather(1, tokens[len(PROMPT) :, None])[:, 0]
    assert np.abs(own.numpy() - completion.logprobs).max() < AGREE


def test_the_same_rollout_draws_the_same_and_another_another(world: World) -> None:
    async def work(backend: VllmBackend) -> list[list[int]]:
        await backend.load(world.publish())
        sampling = Sampling(max_tokens=32)
        drawn = [await backend.generate(PROMPT, sampling, rollout_id=rollout) for rollout in (7, 7, 8)]
        return [completion.token_ids.tolist() for completion in drawn]

    first, again, other = world.run(work)
    assert first == again != other


def test_the_stop_token_ends_a_message_and_is_part_of_it(world: World) -> None:
    async def work(backend: VllmBackend) -> list[Completion]:
        await backend.load(world.publish())
        tasks = [backend.generate(PROMPT, Sampling(max_tokens=400), rollout_id=n) for n in range(12)]
        return await asyncio.gather(*tasks)

    stop = world.policy.chat.stop_token
    completions = world.run(work)
    assert any(completion.stopped for completion in completions)
    for completion in completions:
        assert (completion.token_ids[-1] == stop) == completion.stopped
        assert stop not in completion.token_ids[:-1]


def test_versions_are_right_with_requests_in_flight_over_many_updates(world: World) -> None:
    """Each token, before and after a switch in the middle of a message, is of the weights it claims."""

    async def work(backend: VllmBackend) -> list[Completion]:
        await backend.load(world.publish())
        ends = asyncio.Event()
        done: list[tuple[np.ndarray, Completion]] = []

        async def keep_sampling(rollout: int) -> None:
            turn = 0
            while not ends.is_set():
                prompt = np.append(PROMPT, np.int32(30 + rollout))
                rollout_id = 100 * rollout + turn
                done.append(
                    (prompt, await backend.generate(prompt, Sampling(max_tokens=300), rollout_id=rollout_id))
                )
                turn += 1

        async with asyncio.TaskGroup() as group:
            for rollout in range(4):
                group.create_task(keep_sampling(rollout))
            for _ in range(20):
                before = len(done)
                await backend.load(world.publish())
                async with asyncio.timeout(60):
                    while len(done) < before + 1:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
            ends.set()
        assert sum(len(set(completion.versions.tolist())) > 1 for _, completion in done) >= 10
        for prompt, completion in done:
            assert (np.diff(completion.versions) >= 0).all()
            check_every_token(world, prompt, completion)
        return [completion for _, completion in done]

    versions = {version for completion in world.run(work) for version in completion.versions.tolist()}
    assert len(versions) >= 15


class KeepsPrefixes(VllmClient):
    """Trap 2: keys and values of earlier prompts survive."""

    async def pause(self) -> None:
        await self._control("/pause", params={"mode": "keep", "clear_cache": "false"})

    async def reset_prefix_cache(self) -> None:
        return


def test_a_prefix_cache_of_older_weights_is_found_out(world: World) -> None:
    async def work(backend: VllmBackend) -> None:
        with pytest.raises(InfrastructureError, match=r"fenced.*its prefix cache is of other weights"):
            await backend.load(world.publish(scale=0.5))

    async def mend(backend: VllmBackend) -> None:
        await backend.load(world.publish())

    world.run(mend)
    world.run(work, client=KeepsPrefixes)
    world.run(mend)


class KeepsRunning(VllmClient):
    """Keys and values of requests in flight survive."""

    async def pause(self) -> None:
        await self._control("/pause", params={"mode": "keep", "clear_cache": "false"})


def test_requests_that_keep_what_was_cached_are_found_out(world: World) -> None:
    """They would go on with log-probabilities of neither the old weights nor the new."""

    async def work(backend: VllmBackend) -> None:
        await backend.load(world.publish())
        async with in_flight(backend) as running:
            with pytest.raises(
                InfrastructureError, match=r"fenced.*prefix cache is in use and was not reset"
            ):
                await backend.load(world.publish())
            assert await fenced(running)

    async def mend(backend: VllmBackend) -> None:
        await backend.load(world.publish())

    world.run(work, client=KeepsRunning)
    world.run(mend)


class Loses(FilesystemTransport):
    """Offers another version's tensors under the announced name, as a stale mount would."""

    def __init__(self, other: WeightUpdate) -> None:
        self._other = other

    def offer(self, update: WeightUpdate, *, workers: int, held: Held | None = None) -> Offer:
        mixed = replace(self._other, version=replace(self._other.version, serial=update.version.serial))
        return super().offer(mixed, workers=workers)


def test_a_failed_update_is_made_once_more_and_then_the_server_is_fenced(
    world: World, tmp_path: Path
) -> None:
    """Trap 3: until then requests in flight wait, and none of them is answered by unknown weights."""

    async def work(backend: VllmBackend) -> None:
        update = world.publish()
        await backend.load(update)
        broken = world.publish()
        shutil.copytree(broken.folder, tmp_path / "broken")
        with (tmp_path / "broken" / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x55")
        async with in_flight(backend) as running:
            with pytest.raises(
                InfrastructureError, match=r"fenced and must be restarted.*failed: .*checksum64"
            ):
                await backend.load(replace(broken, folder=str(tmp_path / "broken")))
            assert await fenced(running)
        with pytest.raises(InfrastructureError, match="fenced and must be restarted"):
            await backend.generate(PROMPT, Sampling(), rollout_id=4)
        with pytest.raises(InfrastructureError, match="fenced and must be restarted"):
            await backend.load(update)

    async def after(backend: VllmBackend) -> None:
        # What was refused never reached the model, so that this server can be used by another backend.
        await backend.load(world.publish())
        check_every_token(world, PROMPT, await backend.generate(PROMPT, Sampling(), rollout_id=5))

    world.run(work)
    world.run(after)


class FailsOnce(FilesystemTransport):
    """Its first offer cannot be taken."""

    failed = False

    def offer(self, update: WeightUpdate, *, workers: int, held: Held | None = None) -> Offer:
        offer = super().offer(update, workers=workers)
        if not self.failed:
            self.failed = True
            offer.info["folder"] += "-gone"
        return offer


def test_a_second_attempt_mends_an_update(world: World) -> None:
    async def work(backend: VllmBackend) -> int:
        return (await backend.load(world.publish())).serial

    assert world.run(work, transport=FailsOnce()) == world.serial


def test_an_update_that_somebody_left_open_is_no_hindrance(world: World) -> None:
    async def work(backend: VllmBackend) -> int:
        async with VllmClient(world.server.url) as gone:
            await gone.start_weight_update()
        proof = await backend.load(world.publish())
        assert not backend.fenced
        return proof.serial

    assert world.run(work) == world.serial


def test_weights_of_another_version_are_found_out(world: World) -> None:
    """Trap 4: the server's own checksum of packed weights cannot tell; that of what arrived does."""

    async def work(backend: VllmBackend) -> None:
        with pytest.raises(InfrastructureError, match=r"fenced.*proof of serial \d+: expected checksum"):
            await backend.load(second)

    first, second = world.publish(), world.publish()
    relabelled = replace(first.version, serial=second.version.serial)
    folder = world.publisher.folder / "relabelled"
    other = world.publisher.__class__(folder).publish(
        world.history[first.version.serial], serial=relabelled.serial
    )
    world.run(work, transport=Loses(replace(first, folder=other)))


@pytest.mark.parametrize("fault", ["stale head", "loses a tensor"])
def test_weights_that_arrived_and_are_not_in_use_are_found_out(world: World, fault: str) -> None:
    """Trap 1 and its like: every checksum is right, and the model computes with something else."""

    async def work(backend: VllmBackend) -> None:
        await backend.load(world.publish())
        await world.plant(fault)
        with pytest.raises(InfrastructureError, match=r"fenced.*canary log-probabilities within"):
            await backend.load(world.publish())

    async def mend(backend: VllmBackend) -> Completion:
        await world.plant("")
        await backend.load(world.publish())
        return await backend.generate(PROMPT, Sampling(), rollout_id=8)

    world.run(work)
    check_every_token(world, PROMPT, world.run(mend))


def test_a_model_left_half_loaded_is_loaded_whole_again(world: World) -> None:
    async def work(backend: VllmBackend) -> Completion:
        await world.plant("breaks off once")
        await backend.load(world.publish())
        return await backend.generate(PROMPT, Sampling(), rollout_id=9)

    check_every_token(world, PROMPT, world.run(work))


def test_a_model_that_stays_half_loaded_answers_nobody(world: World) -> None:
    """Trap 3: its /health is 200 all the while."""

    async def work(backend: VllmBackend) -> None:
        await backend.load(world.publish())
        await world.plant("breaks off")
        async with in_flight(backend) as running:
            with pytest.raises(
                InfrastructureError, match=r"fenced and must be restarted.*planted: broke off"
            ):
                await backend.load(world.publish())
            assert await fenced(running)

    async def mend(backend: VllmBackend) -> Completion:
        await world.plant("")
        await backend.load(world.publish())
        return await backend.generate(PROMPT, Sampling(), rollout_id=8)

    world.run(work)
    check_every_token(world, PROMPT, world.run(mend))


def test_a_tokenizer_that_is_not_the_servers_is_refused(world: World) -> None:
    vocabulary = world.policy.tokenizer.get_vocab()
    swapped = dict(zip(vocabulary, reversed(list(vocabulary.values())), strict=True))

    class Other:
        def get_vocab(self) -> dict[str, int]:
            return swapped

    async def work() -> None:
        async with VllmClient(world.server.url) as client:
            with pytest.raises(ConfigurationError, match="expected the run's vocabulary"):
                await world.backend(client).attach(Other())

    asyncio.run(work())


def test_weights_that_do_not_fit_leave_the_model_as_it_was(world: World, tmp_path: Path) -> None:
    async def work(backend: VllmBackend) -> None:
        update = world.publish()
        await backend.load(update)
        weights = dict(world.history[world.serial])
        weights["model.norm.weight"] = weights["model.norm.weight"][:-1]
        folder = world.publisher.__class__(tmp_path).publish(weights, serial=world.serial + 1000)
        from slipstream_kernels import checksum64_named

        version = replace(update.version, serial=world.serial + 1000, checksum64=checksum64_named(weights))
        with pytest.raises(InfrastructureError, match="fenced"):
            await backend.load(replace(update, folder=folder, version=version))

    async def after(backend: VllmBackend) -> Any:
        await backend.load(world.publish())
        return await backend.generate(PROMPT, Sampling(), rollout_id=6)

    world.run(work)
    check_every_token(world, PROMPT, world.run(after))


def test_damage_of_published_weights_is_the_learners_fault(world: World) -> None:
    async def work(backend: VllmBackend) -> None:
        update = world.publish()
        (Path(update.folder) / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="no file"):
            await backend.load(update)
        assert not backend.fenced
        await backend.load(world.publish())

    world.run(work, transport=GlooTransport())


class Recorded(DeltaTransport):
    """Notes how each offer went, and may believe something else than what the workers hold, once."""

    def __init__(self) -> None:
        super().__init__()
        self.ways: list[str] = []
        self.claim: Held | None = None
        self.label: Held | None = None

    def offer(self, update: WeightUpdate, *, workers: int, held: Held | None = None) -> Offer:
        held, self.claim = self.claim or held, None
        offer = super().offer(update, workers=workers, held=held)
        self.ways.append("changes" if "base" in offer.info else "whole")
        if self.label is not None and "base" in offer.info:
            offer.info["base"] = {
                "serial": self.label.serial,
                "checksum64": f"{self.label.checksum64:016x}",
            }
        return offer


def of(update: WeightUpdate) -> Held:
    """Return the weights of an update, as held."""
    return Held(serial=update.version.serial, checksum64=update.version.checksum64)


class Told(VllmClient):
    """Remembers what the server refused."""

    refusals: ClassVar[list[str]] = []

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        try:
            await super().update_weights(update_info)
        except InfrastructureError as error:
            self.refusals.append(str(error))
            raise


async def refused(world: World, backend: VllmBackend, update: WeightUpdate) -> str:
    """Load an update whose first offer is refused; return why, once its tokens are right all the same."""
    Told.refusals.clear()
    proof = await backend.load(update)
    assert (proof.serial, proof.checksum64) == (update.version.serial, update.version.checksum64)
    completion = await backend.generate(PROMPT, Sampling(max_tokens=24), rollout_id=3)
    assert set(completion.versions.tolist()) == {update.version.serial}
    check_every_token(world, PROMPT, completion)
    (refusal,) = Told.refusals
    return refusal


def test_logprobs_are_the_policys_after_each_change(world: World) -> None:
    """With requests in flight, each token is of the weights it claims, before and after each update."""
    transport = Recorded()

    async def work(backend: VllmBackend) -> None:
        await backend.load(world.publish())
        for _ in range(5):
            async with in_flight(backend) as running:
                update = world.publish(share=0.05)
                proof = await backend.load(update)
            assert (proof.serial, proof.checksum64) == (update.version.serial, update.version.checksum64)
            assert np.allclose(proof.canary_logprobs, update.canary_logprobs, atol=AGREE)
            for completion in await asyncio.gather(*running):
                assert {int(completion.versions[0]), int(completion.versions[-1])} == {
                    world.serial - 1,
                    world.serial,
                }
                check_every_token(world, PROMPT, completion)

    world.run(work, transport=transport)
    assert transport.ways == ["whole", *["changes"] * 5]


@pytest.mark.timeout(900)  # It starts a second server.
def test_changes_for_weights_that_a_worker_lost_are_refused_and_the_whole_is_sent(
    world: World, restarted: Callable[[], World]
) -> None:
    """A sender that does not know of the restart is refused, before anything is loaded."""
    transport = Recorded()

    async def before(backend: VllmBackend) -> Held:
        await backend.load(world.publish())
        update = world.publish(share=0.05)
        await backend.load(update)
        return of(update)

    async def after(backend: VllmBackend) -> str:
        transport.claim = known
        said = await refused(again, backend, again.publish(share=0.05))
        await backend.load(again.publish(share=0.05))
        return said

    known = world.run(before, transport=transport)
    again = restarted()
    assert "this one holds nothing" in again.run(after, transport=transport, client=Told)
    assert transport.ways == ["whole", "changes", "changes", "whole", "changes"]


def test_a_flipped_bit_in_what_changed_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = Recorded()
    encoded = delta_module.encoded

    def flipped(*arguments: Any, **options: Any) -> Any:
        changes = encoded(*arguments, **options)
        data = changes.deltas["model.embed_tokens.weight"]
        data[len(data) // 2] ^= 1
        return changes

    async def work(backend: VllmBackend) -> str:
        await backend.load(world.publish())
        with monkeypatch.context() as patch:
            patch.setattr(delta_module, "encoded", flipped)
            return await refused(world, backend, world.publish(share=0.05))

    assert "weights by delta" in world.run(work, transport=transport, client=Told)
    assert transport.ways == ["whole", "changes", "whole"]


@pytest.mark.parametrize("labelled", [False, True])
def test_changes_applied_twice_are_refused(world: World, labelled: bool) -> None:
    transport = Recorded()

    async def work(backend: VllmBackend) -> str:
        first = world.publish()
        await backend.load(first)
        second = world.publish(share=0.05)
        await backend.load(second)
        transport.claim = of(first)
        transport.label = of(second) if labelled else None
        return await refused(world, backend, second)

    expected = "got other weights" if labelled else "expected a worker that holds"
    assert expected in world.run(work, transport=transport, client=Told)
    assert transport.ways == ["whole", "changes", "changes", "whole"]
