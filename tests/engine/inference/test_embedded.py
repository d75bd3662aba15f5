"""Continuous batching: what was sampled is what the weights say, whoever runs beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from slipstream.attention import PackedSegments, run_decoder
from slipstream.errors import CheckpointError, NumericsError
from slipstream.inference import embedded
from slipstream.inference.embedded import EmbeddedBackend
from slipstream.model import canary_logprobs, head, named_weights
from slipstream.types import Completion, Float32Array, Int32Array, Sampling, Version, WeightUpdate
from slipstream.weights.filesystem import FilesystemPublisher, FilesystemSubscriber
from slipstream_kernels import checksum64_named

STOP = 3
HIDDEN = 96
"""That of the recipe: products of tiny matrices, such as heads of 4, round by their shape."""
T = TypeVar("T")
ModelMaker = Callable[..., PreTrainedModel]


def serve(backend: EmbeddedBackend, work: Callable[[], Awaitable[T]], *, limit_s: float = 30.0) -> T:
    """Run `work` beside the backend's loop."""

    async def both() -> T:
        serving = asyncio.ensure_future(backend.run())
        working = asyncio.ensure_future(work())
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.wait([serving, working], return_when=asyncio.FIRST_COMPLETED)
                if serving.done():
                    serving.result()
                return await working
        finally:
            serving.cancel()
            working.cancel()
            await asyncio.gather(serving, working, return_exceptions=True)

    return asyncio.run(both())


async def drawn(backend: EmbeddedBackend, count: int) -> None:
    """Wait until the backend has drawn `count` tokens; `serve` holds the deadline."""
    while backend.tokens_generated < count:  # noqa: ASYNC110
        await asyncio.sleep(0)


def backend_of(model: PreTrainedModel, *, rows: int = 4, **options: Any) -> EmbeddedBackend:
    return EmbeddedBackend(model, stop_token=STOP, rows=rows, max_tokens=128, **options)


@torch.no_grad()
def rescored(model: PreTrainedModel, tokens: Int32Array, temperature: float = 1.0) -> Float32Array:
    """[T] log-probabilities of every token after the first by one whole pass; 0 for the first."""
    bounds = torch.tensor([0, len(tokens)])
    hidden = run_decoder(model, torch.from_numpy(tokens), torch.arange(len(tokens)), PackedSegments(bounds))
    logprobs = torch.log_softmax((hidden @ head(model).T)[:-1] / temperature, -1)
    values = logprobs.gather(1, torch.from_numpy(tokens[1:]).long()[:, None])[:, 0]
    return np.append(np.float32(0), values.numpy()).astype(np.float32)


class Rollout:
    """A multi-turn rollout with made-up observations; holds what a trajectory would."""

    def __init__(self, backend: EmbeddedBackend, number: int, *, sampling: Sampling) -> None:
        self.backend, self.number, self.sampling = backend, number, sampling
        self.random = np.random.default_rng(number)
        self.tokens = self.random.integers(4, 37, 3 + number % 11).astype(np.int32)
        self.logprobs = np.zeros(len(self.tokens), np.float32)
        self.versions = np.full(len(self.tokens), -1, np.int32)

    async def turn(self) -> Completion:
        said = await self.backend.generate(self.tokens, self.sampling, rollout_id=self.number)
        self.extend(said.token_ids, said.logprobs, said.versions)
        return said

    def observe(self) -> None:
        seen = self.random.integers(4, 37, int(self.random.integers(1, 9))).astype(np.int32)
        self.extend(seen, np.zeros(len(seen), np.float32), np.full(len(seen), -1, np.int32))

    def extend(self, tokens: Int32Array, logprobs: Float32Array, versions: Int32Array) -> None:
        self.tokens = np.concatenate([self.tokens, tokens])
        self.logprobs = np.concatenate([self.logprobs, logprobs])
        self.versions = np.concatenate([self.versions, versions])

    async def play(self, turns: int) -> Rollout:
        for turn in range(turns):
            if turn:
                self.observe()
            await self.turn()
        self.backend.release(self.number)
        return self

    def check(self, model: PreTrainedModel) -> None:
        sampled = self.versions >= 0
        expected = rescored(model, self.tokens, self.sampling.temperature)[sampled]
        np.testing.assert_allclose(self.logprobs[sampled], expected, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probabilities_equal_a_rescore(
    make_model: ModelMaker, kv_heads: int, temperature: float
) -> None:
    """Eleven rollouts of one to four turns in four rows: they join and leave at any time."""
    model = make_model(kv_heads=kv_heads)
    backend = backend_of(model)
    sampling = Sampling(temperature=temperature, max_tokens=9)

    async def work() -> list[Rollout]:
        rollouts = [Rollout(backend, n, sampling=sampling) for n in range(11)]
        return await asyncio.gather(*(rollout.play(1 + rollout.number % 4) for rollout in rollouts))

    rollouts = serve(backend, work)
    for rollout in rollouts:
        rollout.check(model)
    assert backend.tokens_generated == sum(int((r.versions >= 0).sum()) for r in rollouts) > 50


def test_a_rollout_does_not_depend_on_its_neighbours(make_model: ModelMaker) -> None:
    """Bit for bit, whatever spans and lengths its neighbours bring."""
    sampling = Sampling(max_tokens=9)

    def played(numbers: list[int]) -> Rollout:
        # torch's SiLU takes the last numbers of all rows, where they fill no vector, by another way.
        backend = backend_of(make_model(hidden_size=HIDDEN, intermediate_size=4 * 64), rows=8)

        async def work() -> list[Rollout]:
            return await asyncio.gather(*(Rollout(backend, n, sampling=sampling).play(3) for n in numbers))

        return next(r for r in serve(backend, work) if r.number == 5)

    alone = played([5])
    for crowd in ([5, 6], [9, 8, 7, 5], list(range(20))):
        among = played(crowd)
        np.testing.assert_array_equal(among.tokens, alone.tokens)
        assert among.logprobs.tobytes() == alone.logprobs.tobytes()


def test_between_two_passes_a_tool_ends_its_episode_goes_on_and_whoever_waits_for_the_same(
    make_model: ModelMaker,
) -> None:
    """Three rounds of the event loop; a pass in each would keep them waiting for three."""
    backend = backend_of(make_model(hidden_size=HIDDEN))

    async def tokens_of_rounds() -> list[int]:
        one = asyncio.ensure_future(
            backend.generate(np.array([5, 6], np.int32), Sampling(max_tokens=64), rollout_id=1)
        )
        await drawn(backend, 1)
        counts = []
        for _ in range(8):
            counts.append(backend.tokens_generated)
            await asyncio.sleep(0)
        one.cancel()
        return counts

    assert serve(backend, tokens_of_rounds) == [1, 1, 1, 1, 2, 2, 2, 2]


def test_a_borrowed_beginning_changes_nothing(make_model: ModelMaker) -> None:
    """Rollouts of one prompt, at once and after one another, feed it once and draw what they draw alone."""
    prompt = np.array([5, 9, 4, 11, 30, 6, 8], np.int32)
    sampling = Sampling(max_tokens=9)

    def played(numbers: list[int]) -> tuple[list[Completion], int]:
        backend = backend_of(make_model(hidden_size=HIDDEN), rows=3)

        async def message(number: int) -> Completion:
            said = await backend.generate(prompt, sampling, rollout_id=number)
            backend.release(number)
            return said

        async def work() -> list[Completion]:
            return await asyncio.gather(*(message(number) for number in numbers))

        return serve(backend, work), backend.tokens_prefilled

    crowd, prefilled = played([1, 2, 3, 4, 5])
    for number, among in enumerate(crowd, start=1):
        (alone,), lone = played([number])
        np.testing.assert_array_equal(among.token_ids, alone.token_ids)
        assert among.logprobs.tobytes() == alone.logprobs.tobytes()
        assert lone == len(prompt)
    # Two came when the others were there; the last token is always fed.
    assert prefilled == len(prompt) + 2


def test_passes_bounded_by_tokens_change_nothing(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def played() -> list[list[int]]:
        backend = backend_of(make_model())

        async def work() -> list[Rollout]:
            rollouts = [Rollout(backend, n, sampling=Sampling(max_tokens=5)) for n in range(6)]
            return await asyncio.gather(*(rollout.play(2) for rollout in rollouts))

        return [rollout.tokens.tolist() for rollout in serve(backend, work)]

    whole = played()
    monkeypatch.setattr(embedded, "PASS_TOKENS", 4)
    assert played() == whole


def publication(folder: Path, model: PreTrainedModel, serial: int) -> WeightUpdate:
    weights = named_weights(model)
    version = Version(
        serial=serial, incarnation=0, step=serial, fork_step=0, checksum64=checksum64_named(weights)
    )
    canary = (1, 5, 9, 13)
    return WeightUpdate(
        version=version,
        folder=FilesystemPublisher(folder).publish(weights, serial=serial),
        canary_tokens=canary,
        canary_logprobs=canary_logprobs(model, canary),
    )


def test_new_weights_rebuild_the_cache_of_live_rollouts(make_model: ModelMaker, tmp_path: Path) -> None:
    """Later tokens carry the new serial and are those of the new weights on the whole history."""
    old, new = make_model(seed=0), make_model(seed=1)
    backend = backend_of(make_model(seed=0), subscriber=FilesystemSubscriber(), serial=7)
    update = publication(tmp_path, new, 8)
    rollout = Rollout(backend, 4, sampling=Sampling(max_tokens=9))

    async def work() -> tuple[Any, Any]:
        await rollout.turn()
        rollout.observe()
        return await backend.load(update), await rollout.turn()

    proof, _ = serve(backend, work)
    assert proof.serial == 8
    assert proof.checksum64 == update.version.checksum64
    assert proof.canary_logprobs == pytest.approx(update.canary_logprobs, abs=1e-6)
    for serial, model in ((7, old), (8, new)):
        spot = rollout.versions == serial
        assert spot.any()
        np.testing.assert_allclose(rollout.logprobs[spot], rescored(model, rollout.tokens)[spot], atol=1e-5)


def test_weights_may_change_within_a_message(make_model: ModelMaker, tmp_path: Path) -> None:
    models = {7: make_model(seed=0), 8: make_model(seed=1)}
    backend = backend_of(make_model(seed=0), subscriber=FilesystemSubscriber(), serial=7)
    update = publication(tmp_path, models[8], 8)
    # Never drawn: the message goes on to its limit.
    backend._stop_token = 1000
    rollout = Rollout(backend, 4, sampling=Sampling(max_tokens=24))

    async def work() -> None:
        turn = asyncio.ensure_future(rollout.turn())
        await drawn(backend, 10)
        await backend.load(update)
        await turn

    serve(backend, work)
    assert set(rollout.versions.tolist()) == {-1, 7, 8}
    for serial, model in models.items():
        spot = rollout.versions == serial
        np.testing.assert_allclose(rollout.logprobs[spot], rescored(model, rollout.tokens)[spot], atol=1e-5)


def test_weights_that_do_not_fit_are_refused(make_model: ModelMaker, tmp_path: Path) -> None:
    backend = backend_of(make_model(), subscriber=FilesystemSubscriber(), serial=7)
    update = publication(tmp_path, make_model(vocabulary=38), 8)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \[38, 16\], expected \[37, 16\]"):
        asyncio.run(backend.load(update))
    assert backend.serial == 7


def sampled_alone(model: PreTrainedModel, prompt: list[int], sampling: Sampling) -> Completion:
    backend = backend_of(model)
    tokens = np.array(prompt, np.int32)
    return serve(backend, lambda: backend.generate(tokens, sampling, rollout_id=1))


def test_a_message_ends_at_its_own_limit_or_the_rollouts(make_model: ModelMaker) -> None:
    model = make_model()
    with torch.no_grad():
        # Greedy sampling from equal rows of the head takes token 0 for ever.
        head(model).copy_(head(model)[:1].expand(37, -1))
    greedy = Sampling(temperature=0.0, max_tokens=6)
    said = sampled_alone(model, [5] * 10, greedy)
    assert said.token_ids.tolist() == [0] * 6 and not said.stopped
    said = sampled_alone(model, [5] * 125, greedy)
    assert said.token_ids.tolist() == [0] * 3 and not said.stopped


def test_the_stop_token_ends_a_message_and_is_kept(make_model: ModelMaker) -> None:
    said = sampled_alone(make_model(), [5, 9, 4], Sampling(max_tokens=100))
    assert said.stopped
    assert said.token_ids[-1] == STOP
    assert STOP not in said.token_ids[:-1]
    assert set(said.versions.tolist()) == {0}


@pytest.mark.parametrize("length", [0, 128, 200])
def test_tokens_without_room_for_more_are_refused(make_model: ModelMaker, length: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to 127 tokens, got {length}"):
        sampled_alone(make_model(), [5] * length, Sampling())


def test_non_finite_weights_stop_the_backend(make_model: ModelMaker) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericsError, match="serial 0"):
        sampled_alone(model, [5, 9], Sampling())


Action = Callable[[EmbeddedBackend, "asyncio.Task[Completion]"], Coroutine[Any, Any, None]]


async def cancelled(backend: EmbeddedBackend, task: asyncio.Task[Completion]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    backend.release(0)


async def released(backend: EmbeddedBackend, task: asyncio.Task[Completion]) -> None:
    backend.release(0)
    assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)


@pytest.mark.parametrize("action", [cancelled, released])
def test_a_message_given_up_leaks_no_row(make_model: ModelMaker, action: Action) -> None:
    """With one row, the next rollout could not start; and it is sampled as if nothing had been."""
    model = make_model()
    backend = backend_of(model, rows=1)
    sampling = Sampling(max_tokens=100)
    prompt = np.array([5, 9, 4], np.int32)

    async def work() -> Rollout:
        for _ in range(3):
            task = asyncio.create_task(backend.generate(prompt, sampling, rollout_id=0))
            await drawn(backend, backend.tokens_generated + 1)
            await action(backend, task)
        return await Rollout(backend, 6, sampling=Sampling(max_tokens=9)).play(3)

    serve(backend, work).check(model)
    assert not backend._active.any() and not backend._requests and not backend._row_of
    assert backend._free == [0]


def test_a_call_cancelled_while_it_waits_for_a_row(make_model: ModelMaker) -> None:
    model = make_model()
    backend = backend_of(model, rows=1)

    async def work() -> Rollout:
        first = Rollout(backend, 1, sampling=Sampling(max_tokens=5))
        await first.turn()
        waiting = asyncio.create_task(Rollout(backend, 2, sampling=Sampling(max_tokens=5)).turn())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        backend.release(2)
        backend.release(1)
        return await Rollout(backend, 3, sampling=Sampling(max_tokens=5)).play(2)

    serve(backend, work).check(model)


def test_a_cancelled_message_can_be_asked_for_again(make_model: ModelMaker) -> None:
    """Tokens drawn before are forgotten; equal random numbers then give the same message."""
    model = make_model()
    sampling = Sampling(max_tokens=100)
    prompt = np.array([5, 9, 4], np.int32)
    backend = backend_of(model)

    async def work() -> Completion:
        task = asyncio.create_task(backend.generate(prompt, sampling, rollout_id=1))
        await drawn(backend, 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # Nothing is drawn for nobody.
        assert not backend._active.any() and not backend._requests
        return await backend.generate(prompt, sampling, rollout_id=1)

    again = serve(backend, work)
    expected = sampled_alone(model, prompt.tolist(), sampling)
    np.testing.assert_array_equal(again.token_ids, expected.token_ids)
    np.testing.assert_allclose(again.logprobs, expected.logprobs, atol=1e-6)


def test_a_history_that_broke_off_is_fed_again(make_model: ModelMaker) -> None:
    """A prefix that differs from the last call's is not read from the cache."""
    model = make_model()
    backend = backend_of(model)

    async def work() -> Rollout:
        rollout = Rollout(backend, 10, sampling=Sampling(max_tokens=9))
        await rollout.turn()
        rollout.observe()
        rollout.tokens[1] = 36 - rollout.tokens[1] % 30
        rollout.versions[:] = -1
        await rollout.turn()
        return rollout

    serve(backend, work).check(model)
