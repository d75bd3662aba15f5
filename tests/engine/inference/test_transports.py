"""Both ends of each way of weights into a server: real groups over real sockets, and what damage does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.errors import CheckpointError, ConfigurationError, DeadlineError, InfrastructureError
from slipstream.inference.vllm.transports import (
    NAMES,
    DeltaReceiver,
    DeltaTransport,
    GlooTransport,
    Held,
    NcclTransport,
    Offer,
    receiver_of,
    transport_of,
)
from slipstream.inference.vllm.transports import delta as delta_module
from slipstream.inference.vllm.transports.broadcast import Piece, cuts, offered, received
from slipstream.inference.vllm.transports.gloo import GLOO
from slipstream.types import Version, WeightUpdate
from slipstream.weights.filesystem import FilesystemPublisher
from slipstream_kernels import checksum64_named, delta_encode

Tensors = dict[str, torch.Tensor]
TIMEOUT_S = 20.0


class Learner:
    """Publishes weights, and changes a few of their values between two versions."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"embedding": (300, 16), "norm": (16,), "layer.0": (7, 11), "layer.1": (513,), "scale": ()}
        self.tensors: Tensors = {
            name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
        }
        self._publisher = FilesystemPublisher(folder, keep=2)
        self.serial = -1

    def publish(self) -> WeightUpdate:
        """Publish what there is under the next serial."""
        self.serial += 1
        self.folder = self._publisher.publish(self.tensors, serial=self.serial)
        checksum = checksum64_named(self.tensors)
        version = Version(serial=self.serial, incarnation=0, step=0, fork_step=0, checksum64=checksum)
        return WeightUpdate(version=version, folder=self.folder, canary_tokens=(), canary_logprobs=())

    def step(self, share: float = 0.02) -> WeightUpdate:
        """Change this share of the values, at least one, and publish."""
        generator = torch.Generator().manual_seed(100 + self.serial)
        for name, tensor in self.tensors.items():
            changed = torch.rand(tensor.shape, generator=generator) < share
            self.tensors[name] = torch.where(changed, tensor * 1.25 + 0.5, tensor).to(tensor.dtype)
        self.tensors["embedding"].view(-1)[self.serial] += 1
        return self.publish()

    def updates(self, count: int) -> Iterator[WeightUpdate]:
        """Publish so many times, with a step between each two."""
        yield self.publish()
        for _ in range(count - 1):
            yield self.step()


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    return Learner(tmp_path / "weights")


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Return whether names, dtypes, shapes and all bits are equal."""
    if left.keys() != right.keys():
        return False
    pairs = [(left[name], right[name]) for name in left]
    return all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs) and all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in pairs
    )


@contextmanager
def sending(offer: Offer) -> Iterator[None]:
    """Send in a thread of its own until the block ends; then nobody comes any more."""
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(offer.send) if offer.send is not None else None
        try:
            yield
            if sent is not None:
                sent.result(timeout=TIMEOUT_S)
        finally:
            if offer.withdraw is not None:
                offer.withdraw()


def delivered(offer: Offer, *receivers: Any) -> list[Tensors]:
    """Have workers, each in a thread, take an offer, and return what each got."""
    with sending(offer), ThreadPoolExecutor(len(receivers)) as pool:
        taken = [pool.submit(one.take, offer.info, worker=n) for n, one in enumerate(receivers)]
        return [future.result(timeout=TIMEOUT_S)[0] for future in taken]


def test_a_stream_is_cut_where_a_buffer_is_full() -> None:
    assert list(cuts([3, 5], 4)) == [[Piece(0, 0, 3, 0), Piece(1, 0, 1, 3)], [Piece(1, 1, 5, 0)]]
    assert list(cuts([0, 4, 0, 4], 4)) == [[Piece(1, 0, 4, 0)], [Piece(3, 0, 4, 0)]]
    assert list(cuts([10], 4)) == [[Piece(0, 0, 4, 0)], [Piece(0, 4, 8, 0)], [Piece(0, 8, 10, 0)]]
    assert list(cuts([1, 1], 100)) == [[Piece(0, 0, 1, 0), Piece(1, 0, 1, 1)]]
    assert list(cuts([], 4)) == list(cuts([0, 0], 4)) == []


@pytest.mark.parametrize("seed", range(20))
def test_buffers_hold_all_bytes_in_order(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 40, random.integers(1, 12)).tolist()
    limit = int(random.integers(1, 60))
    buffers = list(cuts(sizes, limit))
    stream = [(n, i) for n, size in enumerate(sizes) for i in range(size)]
    assert [(p.tensor, i) for pieces in buffers for p in pieces for i in range(p.start, p.stop)] == stream
    for pieces in buffers:
        ends = [0, *(p.at + p.stop - p.start for p in pieces)]
        assert [p.at for p in pieces] == ends[:-1]
        assert ends[-1] == limit or pieces is buffers[-1]


@pytest.mark.parametrize("buffer_bytes", [1, 7, 64, 1 << 20])
def test_all_workers_get_the_bits_of_every_type(buffer_bytes: int) -> None:
    if buffer_bytes == 1:
        sent: Tensors = {"a": torch.tensor([float("nan"), -0.0], dtype=torch.float16)}
    else:
        sent = {
            "nan": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.bfloat16),
            "none": torch.empty(0, 3),
            "point": torch.tensor(0.1, dtype=torch.float64),
            "turned": torch.randn(5, 9).T,
            "half": torch.randn(33).half(),
            "bytes": torch.arange(50, dtype=torch.uint8),
        }
    carrier = replace(GLOO, buffer_bytes=buffer_bytes)
    offer = offered(sent, {"x": 1}, carrier=carrier, host="127.0.0.1", workers=2, timeout_s=TIMEOUT_S)
    with sending(offer), ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(received, offer.info, carrier=GLOO, worker=worker) for worker in range(2)]
        for future in taken:
            assert same(future.result(timeout=TIMEOUT_S), sent)


def offer_of_one(timeout_s: float = TIMEOUT_S, workers: int = 1) -> Offer:
    tensors = {"a": torch.zeros(1 << 20)}
    return GlooTransport(timeout_s=timeout_s).offer_tensors(
        tensors, {"serial": 1, "checksum64": "0"}, workers=workers
    )


def test_a_worker_that_stays_away_ends_the_wait_of_all() -> None:
    offer = offer_of_one(timeout_s=0.5, workers=2)
    assert offer.send is not None
    with ThreadPoolExecutor(1) as pool:
        alone = pool.submit(received, offer.info, carrier=GLOO, worker=0)
        with pytest.raises(DeadlineError, match=r"gloo waited 0.5 s for 2 workers at 127.0.0.1:\d+: here"):
            offer.send()
        with pytest.raises(InfrastructureError, match="gloo: rank 1 of 3"):
            alone.result(timeout=TIMEOUT_S)


def test_a_withdrawn_offer_waits_no_longer() -> None:
    offer = offer_of_one(timeout_s=600.0)
    assert offer.send is not None and offer.withdraw is not None
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(offer.send)
        offer.withdraw()
        with pytest.raises(InfrastructureError, match="was withdrawn"):
            sent.result(timeout=TIMEOUT_S)


class Fails:
    """A group whose worker fails over the buffer that it has just got."""

    device = "cpu"

    def __init__(self, group: Any) -> None:
        self._group = group

    def broadcast(self, buffer: torch.Tensor) -> None:
        self._group.broadcast(buffer)
        raise InfrastructureError("failed over it")

    def close(self) -> None:
        pass


def test_an_offer_of_which_a_worker_failed_at_the_last_byte_has_failed() -> None:
    offer = offer_of_one(timeout_s=1.0)
    failing = replace(GLOO, buffer_bytes=1 << 30, join=lambda store, **k: Fails(GLOO.join(store, **k)))
    offer.info["buffer_bytes"] = failing.buffer_bytes
    assert offer.send is not None
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(offer.send)
        with pytest.raises(InfrastructureError, match="failed over it"):
            received(offer.info, carrier=failing, worker=0)
        with pytest.raises(DeadlineError, match=r"gloo waited 1 s for 1 workers at .*: done"):
            sent.result(timeout=TIMEOUT_S)


def test_an_offer_of_a_sender_that_is_gone_is_refused() -> None:
    info = offer_of_one().info | {"timeout_s": 0.5}
    with pytest.raises(InfrastructureError, match=r"gloo: nobody at 127.0.0.1:\d+|gloo: rank 1 of 2"):
        received(info, carrier=GLOO, worker=0)


def test_a_type_that_is_none_is_refused() -> None:
    offer = offer_of_one()
    offer.info["layout"][0][1] = "load"
    with pytest.raises(CheckpointError, match=r"expected float64, .*, got 'load'"):
        received(offer.info, carrier=GLOO, worker=0)


@pytest.mark.parametrize("name", ["filesystem", "gloo", "delta"])
def test_each_way_brings_all_weights_and_their_sum(learner: Learner, name: str) -> None:
    transport, receiver = transport_of(name, timeout_s=TIMEOUT_S), receiver_of(name)
    assert transport.name == name
    for update in learner.updates(3):
        offer = transport.offer(update, workers=1, held=receiver.held)
        with sending(offer):
            tensors, checksum = receiver.take(offer.info, worker=0)
        assert same(tensors, learner.tensors)
        assert checksum == update.version.checksum64


@pytest.mark.parametrize("name", ["filesystem", "gloo", "delta"])
def test_weights_that_are_not_those_announced_are_refused(learner: Learner, name: str) -> None:
    offer = transport_of(name).offer(learner.publish(), workers=1)
    info = offer.info | {"checksum64": "0" * 16}
    with sending(offer), pytest.raises(CheckpointError, match=r"expected checksum64 0x0+ for serial 0"):
        receiver_of(name).take(info, worker=0)


@pytest.mark.parametrize("name", ["gloo", "delta"])
def test_damaged_publications_are_not_offered(learner: Learner, name: str) -> None:
    update = learner.publish()
    with (Path(update.folder) / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(CheckpointError, match="expected checksum64"):
        transport_of(name).offer(update, workers=1)


def test_names_of_ways() -> None:
    for name in NAMES:
        assert transport_of(name).name == name
        assert receiver_of(name).held is None
    for make in (transport_of, receiver_of):
        with pytest.raises(ConfigurationError, match='expected filesystem, gloo, delta, nccl, got "pigeon"'):
            make("pigeon")


# Deltas


def taken(transport: DeltaTransport, receiver: DeltaReceiver, update: WeightUpdate) -> tuple[Tensors, bool]:
    """Deliver an update; return what the worker got, and whether it came as changes."""
    offer = transport.offer(update, workers=1, held=receiver.held)
    return delivered(offer, receiver)[0], "base" in offer.info


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_changes_give_the_same_bits_update_after_update(tmp_path: Path, dtype: torch.dtype) -> None:
    learner = Learner(tmp_path, dtype)
    transport, receiver = DeltaTransport(timeout_s=TIMEOUT_S), DeltaReceiver()
    ways = []
    for update in learner.updates(6):
        tensors, sparse = taken(transport, receiver, update)
        assert same(tensors, learner.tensors)
        assert receiver.held == Held(serial=learner.serial, checksum64=update.version.checksum64)
        ways.append(sparse)
    assert ways == [False, True, True, True, True, True]


def test_what_changed_is_all_that_is_sent(learner: Learner) -> None:
    transport, receiver = DeltaTransport(), DeltaReceiver()
    taken(transport, receiver, learner.publish())
    learner.tensors["norm"][3] += 1
    offer = transport.offer(learner.publish(), workers=1, held=receiver.held)
    ((name, dtype, (size,)),) = offer.info["layout"]
    assert (name, dtype) == ("norm", "uint8") and size < 200
    assert same(delivered(offer, receiver)[0], learner.tensors)
    unchanged = transport.offer(learner.publish(), workers=1, held=receiver.held)
    assert unchanged.info["layout"] == []
    assert same(delivered(unchanged, receiver)[0], learner.tensors)


def test_weights_given_out_are_not_changed_by_a_later_update(learner: Learner) -> None:
    """A model may still use their memory."""
    transport, receiver = DeltaTransport(), DeltaReceiver()
    tensors, _ = taken(transport, receiver, learner.publish())
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    taken(transport, receiver, learner.step(0.5))
    assert same(tensors, before)


@pytest.mark.parametrize(
    "reason", ["nothing held", "other serial", "other bits", "other shapes", "smaller so"]
)
def test_where_changes_will_not_do_the_whole_is_sent(learner: Learner, reason: str) -> None:
    transport, receiver = DeltaTransport(), DeltaReceiver()
    taken(transport, receiver, learner.publish())
    held = receiver.held
    assert held is not None
    match reason:
        case "other serial":
            held = replace(held, serial=17)
        case "other bits":
            held = replace(held, checksum64=held.checksum64 ^ 1)
        case "other shapes":
            learner.tensors["norm"] = learner.tensors["norm"].reshape(4, 4)
        case "smaller so":
            learner.tensors = {name: tensor + 1 for name, tensor in learner.tensors.items()}
    given = None if reason == "nothing held" else held
    offer = transport.offer(learner.publish(), workers=1, held=given)
    assert "base" not in offer.info
    assert same(delivered(offer, receiver)[0], learner.tensors)


def test_bases_that_retention_has_removed_still_serve_and_only_a_few(learner: Learner) -> None:
    transport = DeltaTransport()
    updates = []
    for update in learner.updates(delta_module.KEPT + 2):
        transport.offer(update, workers=1)
        updates.append(update)
    assert not Path(updates[3].folder).exists()
    sparse = [
        "base"
        in transport.offer(updates[-1], workers=1, held=Held(serial=n, checksum64=u.version.checksum64)).info
        for n, u in enumerate(updates[:-1])
    ]
    assert sparse == [False, False, True, True, True]


def test_servers_that_hold_the_same_share_the_work(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    transport, workers = DeltaTransport(), [DeltaReceiver(), DeltaReceiver()]
    first = learner.publish()
    for worker in workers:
        delivered(transport.offer(first, workers=1), worker)
    second, made = learner.step(), []
    encode = delta_module.encoded
    monkeypatch.setattr(delta_module, "encoded", lambda *a, **k: made.append(1) or encode(*a, **k))
    for worker in workers:
        offer = transport.offer(second, workers=1, held=worker.held)
        assert "base" in offer.info
        assert same(delivered(offer, worker)[0], learner.tensors)
    assert len(made) == 1


def test_all_workers_of_a_server_apply_the_changes(learner: Learner) -> None:
    transport, workers = DeltaTransport(), [DeltaReceiver(), DeltaReceiver()]
    delivered(transport.offer(learner.publish(), workers=2), *workers)
    offer = transport.offer(learner.step(), workers=2, held=workers[0].held)
    for tensors in delivered(offer, *workers):
        assert same(tensors, learner.tensors)


def refused(receiver: DeltaReceiver, offer: Offer, reason: str) -> None:
    """Check that a worker refuses an offer and then holds nothing, so that the next comes whole."""
    with pytest.raises(CheckpointError, match=reason), sending(offer):
        receiver.take(offer.info, worker=0)
    assert receiver.held is None


@pytest.fixture
def pair(learner: Learner) -> tuple[DeltaTransport, DeltaReceiver, WeightUpdate]:
    """A worker that holds serial 0, and the update to serial 1."""
    transport, receiver = DeltaTransport(timeout_s=TIMEOUT_S), DeltaReceiver()
    taken(transport, receiver, learner.publish())
    return transport, receiver, learner.step()


Pair = tuple[DeltaTransport, DeltaReceiver, WeightUpdate]


def whole_again(learner: Learner, pair: Pair) -> None:
    """Check that what the sender then does mends the worker."""
    transport, receiver, update = pair
    tensors, sparse = taken(transport, receiver, update)
    assert not sparse and same(tensors, learner.tensors)


def test_a_worker_that_was_restarted_refuses_changes(learner: Learner, pair: Pair) -> None:
    transport, receiver, update = pair
    offer = transport.offer(update, workers=1, held=receiver.held)
    restarted = DeltaReceiver()
    refused(restarted, offer, r"expected a worker that holds serial 0 .*, this one holds nothing")
    whole_again(learner, (transport, restarted, update))


def test_a_worker_that_missed_an_update_refuses_changes(learner: Learner, pair: Pair) -> None:
    transport, receiver, missed = pair
    transport.offer(missed, workers=1)
    known = Held(serial=1, checksum64=missed.version.checksum64)
    update = learner.step()
    offer = transport.offer(update, workers=1, held=known)
    refused(receiver, offer, r"holds serial 1 .*, this one holds serial 0")
    whole_again(learner, (transport, receiver, update))


def test_changes_are_not_applied_twice(learner: Learner, pair: Pair) -> None:
    transport, receiver, update = pair
    held = receiver.held
    taken(transport, receiver, update)
    again = transport.offer(update, workers=1, held=held)
    assert "base" in again.info
    refused(receiver, again, r"holds serial 0 .*, this one holds serial 1")
    whole_again(learner, pair)


def test_changes_for_another_base_are_found_out_whatever_their_label_says(
    learner: Learner, pair: Pair
) -> None:
    transport, receiver, update = pair
    held = receiver.held
    taken(transport, receiver, update)
    again = transport.offer(update, workers=1, held=held)
    again.info["base"] = {"serial": 1, "checksum64": f"{update.version.checksum64:016x}"}
    refused(receiver, again, "embedding: .*got other weights")
    whole_again(learner, pair)


Plant = Callable[[delta_module.Changes], delta_module.Changes]


def planted(pair: Pair, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Offer changes with a fault in them."""
    transport, receiver, update = pair
    encode = delta_module.encoded
    with monkeypatch.context() as patch:
        patch.setattr(delta_module, "encoded", lambda *a, **k: plant(encode(*a, **k)))
        offer = transport.offer(update, workers=1, held=receiver.held)
    assert "base" in offer.info
    transport._made = None
    return offer


@pytest.mark.parametrize("place", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_any_flipped_bit_is_found_out(
    learner: Learner, pair: Pair, place: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(changes: delta_module.Changes) -> delta_module.Changes:
        data = changes.deltas["embedding"].clone()
        data[round(place * (len(data) - 1))] ^= 1
        return replace(changes, deltas=changes.deltas | {"embedding": data})

    refused(pair[1], planted(pair, flip, monkeypatch), "weights by delta: ")
    whole_again(learner, pair)


def test_sound_changes_to_other_weights_are_found_out_by_the_sum_of_all(
    learner: Learner, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor's checks pass: the delta is of other values, made from the right base."""

    def other(changes: delta_module.Changes) -> delta_module.Changes:
        base = pair[1]._tensors["embedding"].reshape(-1).view(torch.int16)
        wrong = base.clone()
        wrong[0] ^= 1
        return replace(changes, deltas=changes.deltas | {"embedding": delta_encode(base, wrong).data})

    refused(pair[1], planted(pair, other, monkeypatch), "weights by delta: expected checksum64")
    whole_again(learner, pair)


def test_a_changed_tensor_that_is_left_out_is_found_out(
    learner: Learner, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave_out(changes: delta_module.Changes) -> delta_module.Changes:
        return replace(changes, deltas={name: d for name, d in changes.deltas.items() if name != "embedding"})

    refused(pair[1], planted(pair, leave_out, monkeypatch), "weights by delta: expected checksum64")
    whole_again(learner, pair)


def test_changes_of_a_tensor_that_is_not_held_are_refused(pair: Pair) -> None:
    transport, receiver, update = pair
    offer = transport.offer(update, workers=1, held=receiver.held)
    offer.info["layout"][0][0] = "other"
    refused(receiver, offer, "other: expected one of the tensors held")


def test_a_delta_of_another_size_than_its_tensor_is_refused(learner: Learner) -> None:
    base = torch.zeros(8, dtype=torch.bfloat16)
    made = delta_encode(base, base + 1)
    with pytest.raises(CheckpointError, match=r"norm: .*must hold 16 values"):
        delta_module.apply({"norm": learner.tensors["norm"]}, {"norm": made.data})


# NCCL


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu_is_the_users_mistake(learner: Learner) -> None:
    with pytest.raises(ConfigurationError, match=r"transport nccl: expected a GPU .* choose gloo"):
        NcclTransport().offer(learner.publish(), workers=1)
    with pytest.raises(ConfigurationError, match="choose gloo"):
        receiver_of("nccl").take({}, worker=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
def test_nccl_brings_all_weights_from_one_gpu_to_another(learner: Learner) -> None:
    transport = NcclTransport(device="cuda:0", timeout_s=TIMEOUT_S)
    receiver = receiver_of("nccl", device="cuda:1")
    for update in learner.updates(2):
        assert same(delivered(transport.offer(update, workers=1), receiver)[0], learner.tensors)
