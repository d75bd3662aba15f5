"""Trajectories and messages survive the wire, and nothing else does."""

from __future__ import annotations

import contextlib
import dataclasses
import time

import google_crc32c
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream import messages, synthetic, wire
from slipstream.errors import FrameError
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


def with_check(frames: list[messages.Buffer]) -> list[messages.Buffer]:
    """Return frames whose last is right again, so that what is behind it is tested."""
    return [*frames[:-1], crc32c(frames[:-1]).to_bytes(4, "little")]


@pytest.mark.parametrize("tokens", [0, 1, 2, 33, 4096])
def test_round_trip(tokens: int) -> None:
    made = synthetic.trajectory(tokens, turns=min(tokens, 3) or 0) if tokens else empty()
    assert_same(wire.decode_trajectory(wire.encode_trajectory(made)), made)
    assert_same(wire.from_bytes(wire.to_bytes(made)), made)


def empty() -> Trajectory:
    arrays = {name: np.zeros(0, dtype) for name, dtype in wire.ARRAYS}
    return dataclasses.replace(
        synthetic.trajectory(2), **arrays, outcome=Outcome.INFRASTRUCTURE_FAILURE, note="tool died"
    )


def test_an_independent_reader_finds_the_documented_format() -> None:
    made = synthetic.trajectory(33)
    frames = [bytes(frame) for frame in wire.encode_trajectory(made)]
    header = msgpack.unpackb(frames[0])
    assert (header["tokens"], header["turns"], header["outcome"]) == (33, 2, "completed")
    assert header["identity"] == {"run": "run", "actor": "actor", "epoch": 0, "seq": 0}
    assert msgpack.unpackb(frames[1])[0]["arguments"] == {"query": "x"}
    assert np.frombuffer(frames[2], "<i4").tolist() == made.token_ids.tolist()
    assert frames[8] == google_crc32c.value(b"".join(frames[:8])).to_bytes(4, "little")


def test_array_frames_share_memory() -> None:
    made = synthetic.trajectory(4096)
    frame = wire.encode_trajectory(made)[2]
    assert np.shares_memory(np.frombuffer(frame, np.uint8), made.token_ids)


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
    frames = wire.encode_trajectory(made)
    frames[2 + ARRAYS.index(name)] = bad.tobytes()
    with pytest.raises(FrameError, match=message):
        wire.decode_trajectory(with_check(frames))


def test_wrong_shapes_are_named() -> None:
    made = synthetic.trajectory(32)
    with pytest.raises(FrameError, match=r"versions: expected length 32, got 31"):
        wire.encode_trajectory(dataclasses.replace(made, versions=made.versions[:31]))
    with pytest.raises(FrameError, match=r"token_ids: expected one dimension of int32, got int64"):
        wire.encode_trajectory(dataclasses.replace(made, token_ids=made.token_ids.astype(np.int64)))
    frames = wire.encode_trajectory(made)
    frames[3] = frames[3][:-1]
    with pytest.raises(FrameError, match=r"loss_mask: expected 32 x 1 bytes, got 31"):
        wire.decode_trajectory(with_check(frames))
    with pytest.raises(FrameError, match="expected 9 frames, got 8"):
        wire.decode_trajectory(frames[:-1])


def test_a_flipped_bit_anywhere_is_found() -> None:
    frames = [bytes(frame) for frame in wire.encode_trajectory(synthetic.trajectory(8))]
    for number, frame in enumerate(frames):
        for bit in range(8 * len(frame)):
            flipped = bytearray(frame)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(FrameError, match="check: expected CRC-32C"):
                wire.decode_trajectory([*frames[:number], bytes(flipped), *frames[number + 1 :]])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_frames_raise_only_frame_errors(data: st.DataObject) -> None:
    frames: list[messages.Buffer] = [bytes(f) for f in wire.encode_trajectory(synthetic.trajectory(8))]
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, len(frames) - 2))
        frame = bytearray(frames[number])
        start = data.draw(st.integers(0, len(frame)))
        end = data.draw(st.integers(start, min(len(frame), start + 8)))
        frame[start:end] = data.draw(st.binary(max_size=8))
        frames[number] = bytes(frame)
    with contextlib.suppress(FrameError):
        wire.decode_trajectory(with_check(frames))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_message_or_record_raise_only_frame_errors(data: bytes) -> None:
    with pytest.raises(FrameError):
        messages.decode_message(data)
    with pytest.raises(FrameError):
        wire.from_bytes(data)


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
def test_bombs_are_refused_at_once(bomb: bytes) -> None:
    started = time.perf_counter()
    with pytest.raises(FrameError):
        messages.decode_message(bomb)
    assert time.perf_counter() - started < 0.1


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


def test_unknown_fields_and_kinds_are_refused() -> None:
    with pytest.raises(FrameError, match="unknown field"):
        messages.decode_message(msgpack.packb({"kind": "Pull", "step": 1, "extra": 2}))
    with pytest.raises(FrameError, match="Invalid value"):
        messages.decode_message(msgpack.packb({"kind": "Exec", "step": 1}))


def test_encoding_32768_tokens_takes_a_millisecond_at_most() -> None:
    made = synthetic.trajectory(32_768)

    def seconds() -> float:
        started = time.perf_counter()
        wire.encode_trajectory(made)
        return time.perf_counter() - started

    assert sorted(seconds() for _ in range(50))[25] <= 1e-3
