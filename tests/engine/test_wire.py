"""Trajectories and messages survive the wire, and nothing else does."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from unittest import mock

import google_crc32c
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream import messages, synthetic, wire
from slipstream.errors import DamageError, FrameError
from slipstream.integrity import crc32c
from slipstream.types import Outcome, Trajectory

ARRAYS = [name for name, _ in wire.ARRAYS]


def assert_same(left: Trajectory, right: Trajectory) -> None:
    for field in dataclasses.fields(Trajectory):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name in ARRAYS:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b, field.name


def checked(body: bytes) -> bytes:
    """Return a message's frame with the right check."""
    return body + struct.pack("<I", google_crc32c.value(body))


def with_check(record: bytes | bytearray) -> bytes:
    """Return a record whose check is right again, so that what is behind it is tested."""
    return bytes(record[:-4]) + crc32c([bytes(record[:-4])]).to_bytes(4, "little")


def offset(name: str, made: Trajectory) -> int:
    """Where an array begins in the record of a trajectory."""
    before = ARRAYS[: ARRAYS.index(name)]
    return 32 + sum(getattr(made, other).nbytes for other in before)


@pytest.mark.parametrize("tokens", [0, 1, 2, 33, 4096])
def test_round_trip(tokens: int) -> None:
    made = synthetic.trajectory(tokens, turns=min(tokens, 3) or 0) if tokens else empty()
    assert_same(wire.decode_trajectory(wire.encode_trajectory(made)), made)


@pytest.mark.parametrize("shift", range(8))
def test_a_record_may_lie_at_any_address(shift: int) -> None:
    made = synthetic.trajectory(33)
    record = wire.encode_trajectory(made)
    room = memoryview(bytearray(len(record) + 8))[shift : shift + len(record)]
    room[:] = record
    for view in (room, room.toreadonly()):
        assert_same(wire.decode_trajectory(view), made)


def empty() -> Trajectory:
    arrays = {name: np.zeros(0, dtype) for name, dtype in wire.ARRAYS}
    return dataclasses.replace(
        synthetic.trajectory(2), **arrays, outcome=Outcome.INFRASTRUCTURE_FAILURE, note="tool died"
    )


def test_an_independent_reader_finds_the_documented_format() -> None:
    made = synthetic.trajectory(33)
    record = bytes(wire.encode_trajectory(made))
    lengths = struct.unpack_from("<8I", record)
    assert lengths[:6] == (132, 132, 132, 8, 66, 33)
    parts, position = [], 32
    for length in lengths:
        parts.append(record[position : position + length])
        position += length
    assert np.frombuffer(parts[0], "<i4").tolist() == made.token_ids.tolist()
    assert np.frombuffer(parts[1], "<f4").tolist() == made.behavior_logprobs.tolist()
    assert np.frombuffer(parts[4], "<i2").tolist() == made.turns.tolist()
    header = msgpack.unpackb(parts[6])
    assert header["outcome"] == "completed"
    assert header["identity"] == {"run": "run", "actor": "actor", "epoch": 0, "seq": 0}
    assert msgpack.unpackb(parts[7])[0]["arguments"] == {"query": "x"}
    assert record[position:] == google_crc32c.value(record[:position]).to_bytes(4, "little")


@pytest.mark.parametrize("tokens", [1, 2, 33, 4096])
def test_arrays_lie_at_multiples_of_their_items(tokens: int) -> None:
    made = synthetic.trajectory(tokens, turns=1)
    assert all(offset(name, made) % dtype.itemsize == 0 for name, dtype in wire.ARRAYS)


def test_decoded_arrays_share_the_record_and_are_read_only() -> None:
    record = wire.encode_trajectory(synthetic.trajectory(4096))
    decoded = wire.decode_trajectory(record)
    assert np.shares_memory(np.frombuffer(record, np.uint8), decoded.token_ids)
    with pytest.raises(ValueError, match="read-only"):
        decoded.token_ids[0] = 1


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("loss_mask", 20, 2, "loss_mask: expected 0 or 1, got 2"),
        ("behavior_logprobs", 20, np.nan, "behavior_logprobs: expected finite"),
        ("turn_rewards", 0, np.inf, "turn_rewards: expected finite"),
        ("token_ids", 0, -1, "token_ids: expected values >= 0, got -1"),
        ("versions", 0, 5, "versions: expected a serial where loss_mask is 1"),
        ("turns", 31, 2, "turns: expected 0 .. 1"),
    ],
)
def test_wrong_values_are_named_by_both_ends(name: str, position: int, value: float, message: str) -> None:
    made = synthetic.trajectory(32)
    bad = getattr(made, name).copy()
    bad[position] = value
    with pytest.raises(FrameError, match=message):
        wire.encode_trajectory(dataclasses.replace(made, **{name: bad}))
    record = wire.encode_trajectory(made)
    start = offset(name, made)
    record[start : start + bad.nbytes] = bad.tobytes()
    with pytest.raises(FrameError, match=message):
        wire.decode_trajectory(with_check(record))


def test_wrong_shapes_are_named() -> None:
    made = synthetic.trajectory(32)
    with pytest.raises(FrameError, match=r"versions: expected length 32, got 31"):
        wire.encode_trajectory(dataclasses.replace(made, versions=made.versions[:31]))
    with pytest.raises(FrameError, match=r"token_ids: expected one dimension of int32, got int64"):
        wire.encode_trajectory(dataclasses.replace(made, token_ids=made.token_ids.astype(np.int64)))
    record = bytes(wire.encode_trajectory(made))
    for part, length, message in (
        (5, 31, "token_ids: expected 31 x 4 bytes, got 128"),
        (1, 124, "behavior_logprobs: expected 32 x 4 bytes, got 124"),
        (3, 9, "turn_rewards: expected 2 x 4 bytes, got 9"),
    ):
        lengths = list(struct.unpack_from("<8I", record))
        lengths[6] += lengths[part] - length
        lengths[part] = length
        with pytest.raises(FrameError, match=message):
            wire.decode_trajectory(with_check(struct.pack("<8I", *lengths) + record[32:]))
    with pytest.raises(FrameError, match=rf"expected {len(record)} bytes, got {len(record) - 1}"):
        wire.decode_trajectory(record[:-1])
    with pytest.raises(FrameError, match="expected at least 36 bytes, got 35"):
        wire.decode_trajectory(record[:35])


def test_who_sampled_goes_with_the_record() -> None:
    samplers = (("serve-0/0#1f", 3), ("serve-0/1#2e", 4))
    made = dataclasses.replace(synthetic.trajectory(32, serial=3), samplers=samplers)
    record = wire.encode_trajectory(made)
    assert wire.decode_trajectory(record).samplers == samplers
    assert wire.inspect_trajectory(record).header.samplers == samplers


@pytest.mark.parametrize("segments", [(0,), (32,), (9, 9), (20, 10), (-1,)])
def test_segments_that_are_none_are_refused_by_both_ends(segments: tuple[int, ...]) -> None:
    made = synthetic.trajectory(32)
    cut = dataclasses.replace(made, segments=(9, 20))
    assert wire.decode_trajectory(wire.encode_trajectory(cut)).segments == (9, 20)
    with pytest.raises(FrameError, match=r"segments: expected ascending starts within 1 .. 31, got"):
        wire.encode_trajectory(dataclasses.replace(made, segments=segments))
    with mock.patch.object(wire, "_check_segments"):
        record = wire.encode_trajectory(dataclasses.replace(made, segments=segments))
    with pytest.raises(FrameError, match="segments: expected"):
        wire.inspect_trajectory(record)


def test_more_turns_than_tokens_are_refused() -> None:
    made = synthetic.trajectory(2)
    with pytest.raises(FrameError, match="expected turns <= tokens"):
        wire.encode_trajectory(dataclasses.replace(made, turn_rewards=np.zeros(3, np.float32)))


def test_a_flipped_bit_anywhere_is_found() -> None:
    record = bytes(wire.encode_trajectory(synthetic.trajectory(8)))
    for bit in range(8 * len(record)):
        flipped = bytearray(record)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError, match=r"check: expected CRC-32C|record: expected \d+ bytes"):
            wire.decode_trajectory(flipped)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_records_raise_only_frame_errors(data: st.DataObject) -> None:
    record = wire.encode_trajectory(synthetic.trajectory(8))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(record)))
        end = data.draw(st.integers(start, min(len(record), start + 8)))
        record[start:end] = data.draw(st.binary(min_size=end - start, max_size=end - start))
    with contextlib.suppress(FrameError):
        wire.decode_trajectory(with_check(record))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_message_or_record_raise_only_frame_errors(data: bytes) -> None:
    for frame in (data, checked(data)):
        with pytest.raises(FrameError):
            messages.decode_message(frame)
    with pytest.raises(FrameError):
        wire.decode_trajectory(data)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x91" * 60_000,
        b"\x80" * 60_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc7\x01\x01\x00",
        b"\x91" * 100_000,
        b"",
    ],
)
def test_bombs_are_refused(bomb: bytes) -> None:
    with pytest.raises(FrameError):
        messages.decode_message(checked(bomb))


def test_every_message_survives() -> None:
    announced = synthetic.update(3, step=2)
    made = [
        messages.Want(train=3, evaluate=1, received_train=7, received_evaluate=0),
        messages.Publish(update=announced),
        messages.Proof(proof=synthetic.proof(announced)),
        messages.Welcome(epoch=1, credit_bytes=5, update=announced),
        messages.Ack(seqs=(1, 2), bytes=9),
    ]
    for message in made:
        assert messages.decode_message(messages.encode_message(message)) == message


def test_one_flipped_bit_of_a_message_is_damage() -> None:
    frame = messages.encode_message(messages.Ack(seqs=(1, 2), bytes=9))
    for bit in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamageError, match="CRC-32C is not the one behind them"):
            messages.decode_message(bytes(flipped))


def test_unknown_fields_and_kinds_are_refused() -> None:
    with pytest.raises(FrameError, match="unknown field"):
        messages.decode_message(checked(msgpack.packb({"kind": "Pull", "step": 1, "extra": 2})))
    with pytest.raises(FrameError, match="Invalid value"):
        messages.decode_message(checked(msgpack.packb({"kind": "Exec", "step": 1})))
