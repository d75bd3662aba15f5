"""Weights through a folder: what is fetched is what was published, or a named error."""

from pathlib import Path

import pytest
import torch

from slipstream.errors import CheckpointError, StorageError
from slipstream.interfaces import WeightPublisher, WeightSubscriber
from slipstream.types import Version, WeightUpdate
from slipstream.weights.filesystem import FILE, FilesystemPublisher, FilesystemSubscriber
from slipstream_kernels import checksum64_named


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"head": torch.full((4, 3), float(value)).T, "norm": torch.full((5,), value, dtype=torch.bfloat16)}


def update(folder: str, serial: int, held: dict[str, torch.Tensor]) -> WeightUpdate:
    checksum = checksum64_named(held)
    version = Version(serial=serial, incarnation=0, step=serial, fork_step=0, checksum64=checksum)
    return WeightUpdate(version=version, folder=folder, canary_tokens=(), canary_logprobs=())


def test_fetch_returns_what_was_published(tmp_path: Path) -> None:
    publisher: WeightPublisher = FilesystemPublisher(tmp_path / "weights")
    subscriber: WeightSubscriber = FilesystemSubscriber()
    fetched = subscriber.fetch(update(publisher.publish(tensors(2.5), serial=3), 3, tensors(2.5)))
    assert fetched.keys() == tensors(0).keys()
    assert all(torch.equal(fetched[name], tensor) for name, tensor in tensors(2.5).items())


def test_mapped_weights_outlive_their_folder(tmp_path: Path) -> None:
    publisher = FilesystemPublisher(tmp_path, keep=1)
    fetched = FilesystemSubscriber().fetch(update(publisher.publish(tensors(1.0), serial=1), 1, tensors(1.0)))
    publisher.publish(tensors(2.0), serial=2)
    assert not (tmp_path / "serial-00000001").exists()
    assert torch.equal(fetched["head"], tensors(1.0)["head"])


def test_retention_keeps_the_newest_and_the_pinned(tmp_path: Path) -> None:
    publisher = FilesystemPublisher(tmp_path, keep=2)
    publisher.pin(1)
    for serial in range(5):
        publisher.publish(tensors(serial), serial=serial)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"serial-0000000{n}" for n in (1, 3, 4)]
    publisher.unpin(1)
    publisher.publish(tensors(5), serial=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["serial-00000004", "serial-00000005"]
    assert FilesystemPublisher(tmp_path).newest_serial() == 5
    assert FilesystemPublisher(tmp_path / "none").newest_serial() == -1


def test_a_restarted_learner_keeps_what_may_still_be_evaluated(tmp_path: Path) -> None:
    before = FilesystemPublisher(tmp_path, keep=2)
    for serial in range(2):
        before.publish(tensors(serial), serial=serial)
    after = FilesystemPublisher(tmp_path, keep=2)
    after.pin_all()
    for serial in range(2, 6):
        after.publish(tensors(serial), serial=serial)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"serial-{n:08d}" for n in (0, 1, 4, 5)]
    after.unpin_up_to(0)
    after.publish(tensors(6), serial=6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"serial-{n:08d}" for n in (1, 5, 6)]


def test_a_serial_is_never_published_twice(tmp_path: Path) -> None:
    publisher = FilesystemPublisher(tmp_path)
    publisher.publish(tensors(1), serial=1)
    with pytest.raises(StorageError, match="serial 1 was published before"):
        publisher.publish(tensors(2), serial=1)


def test_damage_and_mistaken_identity_are_named(tmp_path: Path) -> None:
    publisher, subscriber = FilesystemPublisher(tmp_path), FilesystemSubscriber()
    folder = publisher.publish(tensors(1), serial=1)
    file = Path(folder) / FILE
    with pytest.raises(CheckpointError, match="expected serial 2, got 1"):
        subscriber.fetch(update(folder, 2, tensors(1)))
    with pytest.raises(CheckpointError, match=f"{file}: expected checksum64 0x.* for serial 1, got 0x"):
        subscriber.fetch(update(folder, 1, tensors(9)))
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(CheckpointError, match="expected checksum64"):
        subscriber.fetch(update(folder, 1, tensors(1)))
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"expected {len(whole)} bytes, got {len(whole) - 1}"):
        subscriber.fetch(update(folder, 1, tensors(1)))
    file.unlink()
    with pytest.raises(CheckpointError, match="got no file"):
        subscriber.fetch(update(folder, 1, tensors(1)))
    with pytest.raises(CheckpointError, match="expected a manifest"):
        subscriber.fetch(update(str(tmp_path / "none"), 1, tensors(1)))
