"""Deltas: exact round trips, the same bytes from every backend, and no bytes that do harm."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from slipstream_kernels import (
    BackendError,
    Delta,
    DeltaBaseError,
    DeltaError,
    ShapeError,
    checksum64,
    delta_apply,
    delta_encode,
    delta_encode_cast,
    native,
)

needs_native = pytest.mark.skipif(not native.available(), reason=native.description())
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
USABLE = ["reference", "native"] if native.available() else ["reference"]
SIZES = [0, 1, 7, 511, 512, 513, 1024, 5000, 40_001]
SHARES = [0.0, 0.001, 0.02, 0.11, 0.13, 0.5, 1.0]


def pair(count: int, share: float) -> tuple[Tensor, Tensor]:
    """Weights, and the same with a share of them changed at random places."""
    old = torch.randn(count).bfloat16()
    new = old.clone()
    new.view(torch.int16)[torch.rand(count) < share] += 1
    return old, new


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one.view(torch.int16), other.view(torch.int16))


def resealed(data: bytes) -> bytes:
    """The bytes with a trailing checksum that is right, as a forger would send them."""
    return data[:-8] + checksum64(data[:-8]).to_bytes(8, "little")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", SIZES)
def test_round_trip_is_exact(backend: str, count: int) -> None:
    for share in SHARES:
        old, new = pair(count, share)
        delta = delta_encode(old, new, base_version=3, new_version=2**64 - 1, backend=backend)
        assert same_bits(delta_apply(old, delta, backend=backend), new)
        assert (delta.count, delta.base_version, delta.new_version) == (count, 3, 2**64 - 1)
        assert delta.changed == int((old.view(torch.int16) != new.view(torch.int16)).sum())
        assert (delta.base_checksum, delta.result_checksum) == (checksum64(old), checksum64(new))


@needs_native
@pytest.mark.parametrize("count", SIZES)
def test_backends_write_the_same_bytes_and_read_each_other(count: int) -> None:
    for share in SHARES:
        old, new = pair(count, share)
        ours, theirs = (delta_encode(old, new, base_version=1, backend=name) for name in USABLE)
        assert torch.equal(ours.data, theirs.data)
        assert same_bits(delta_apply(old, ours, backend="native"), new)


@needs_native
def test_threads_do_not_change_the_bytes() -> None:
    old, new = pair(200_000, 0.05)
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        delta = delta_encode(old, new, backend="native")
        assert same_bits(delta_apply(old, delta, backend="native"), new)
        made.append(delta.to_bytes())
    assert len(set(made)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_format_is_frozen(backend: str) -> None:
    # Three changes: gaps 2 and 0 in the first block; in the second, 300 equal values are an escape and 45.
    old = torch.zeros(813, dtype=torch.int16)
    new = old.clone()
    new[2], new[3], new[812] = 0x1234, -1, 7
    data = delta_encode(old, new, base_version=5, new_version=6, backend=backend).to_bytes()
    assert data[:4] == b"SLD1"
    assert struct.unpack("<HH5QQQ", data[4:64]) == (1, 512, 813, 5, 6, checksum64(old), checksum64(new), 3, 4)
    assert data[64:72] == struct.pack("<HH4x", 2, 1 | 1 << 10)
    assert data[72:80] == bytes([2, 0, 255, 45, 0, 0, 0, 0])
    assert data[80:88] == struct.pack("<Hhh2x", 0x1234, -1, 7)
    assert data[88:] == checksum64(data[:88]).to_bytes(8, "little")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_takes_the_smaller_of_gaps_and_bitmap(backend: str) -> None:
    old = torch.zeros(512, dtype=torch.int16)
    for changed, position_bytes in ((64, 64), (65, 64), (512, 64), (10, 10)):
        new = old.clone()
        new[:changed] = 1
        delta = delta_encode(old, new, backend=backend)
        frame = 64 + 8 + -(-position_bytes // 8) * 8 + -(-2 * changed // 8) * 8 + 8
        assert delta.data.numel() == frame
        is_bitmap = delta.to_bytes()[65] >> 7
        assert is_bitmap == (changed > 64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("gap", "stored"), [(254, [254]), (255, [255, 0]), (509, [255, 254]), (511, [255, 255, 1])]
)
def test_escapes(backend: str, gap: int, stored: list[int]) -> None:
    old = torch.zeros(600, dtype=torch.int16)
    new = old.clone()
    new[gap] = 1
    delta = delta_encode(old, new, backend=backend)
    assert list(delta.to_bytes()[72 : 72 + len(stored)]) == stored
    assert same_bits(delta_apply(old, delta, backend=backend), new)


@pytest.mark.parametrize("backend", USABLE)
def test_two_percent_of_changes_are_25_times_smaller(backend: str) -> None:
    old, new = pair(1_000_000, 0.02)
    delta = delta_encode(old, new, backend=backend)
    assert old.numel() * 2 / delta.data.numel() > 25


@pytest.mark.parametrize("backend", BACKENDS)
def test_cast_rounds_in_place_and_tells_what_changed(backend: str) -> None:
    for count in (0, 1, 513, 3000):
        weights = torch.randn(count).bfloat16()
        master = weights.float() * (1 + 0.004 * torch.rand(count))
        master[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 3.4e38])[: min(4, count)]
        old, expected = weights.clone(), master.bfloat16()
        expected.view(torch.int16)[master.isnan()] = 0x7FC0
        delta = delta_encode_cast(master, weights, new_version=9, backend=backend)
        assert same_bits(weights, expected)
        assert torch.equal(delta.data, delta_encode(old, expected, new_version=9, backend=backend).data)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int16])
def test_shape_and_type_stay(backend: str, dtype: torch.dtype) -> None:
    old = torch.arange(600).view(20, 30).to(dtype)
    new = (old + 1).T.contiguous().T
    delta = Delta.from_bytes(delta_encode(old, new, backend=backend).to_bytes())
    result = delta_apply(old, delta, backend=backend)
    assert result.shape == old.shape
    assert same_bits(result, new)
    assert same_bits(delta_apply(old, delta, in_place=True, backend=backend), new)
    assert same_bits(old, new)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_another_base_and_leaves_it(backend: str) -> None:
    old, new = pair(2000, 0.02)
    delta = delta_encode(old, new, base_version=41, backend=backend)
    other = old.clone()
    other[1999] += 1.0
    before = other.clone()
    with pytest.raises(DeltaBaseError, match="base"):
        delta_apply(other, delta, in_place=True, backend=backend)
    assert same_bits(other, before)
    with pytest.raises(DeltaError, match="delta must hold 3 values, as base does, got 2000"):
        delta_apply(old[:3], delta, backend=backend)


@needs_native
def test_the_wrong_base_is_named() -> None:
    old, new = pair(10, 0.5)
    delta = delta_encode(old, new, base_version=41, backend="native")
    with pytest.raises(DeltaBaseError, match="delta_apply: base must be version 41 with checksum64 0x"):
        delta_apply(new + 1, delta, backend="native")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_flipped_byte_is_noticed(backend: str) -> None:
    old, new = pair(600, 0.05)
    data = delta_encode(old, new, base_version=1, new_version=2, backend=backend).to_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x10
        with pytest.raises(DeltaError):
            delta_apply(old, Delta.from_bytes(changed), backend=backend)
    for size in range(0, len(data), 7):
        with pytest.raises(DeltaError):
            delta_apply(old, Delta.from_bytes(data[:size]), backend=backend)
    with pytest.raises(DeltaError, match="bytes"):
        Delta.from_bytes(data + bytes(8))


def forged(data: bytes, old: Tensor) -> list[bool]:
    """Whether each backend refuses the bytes; a refusal before the result is checked leaves the base."""
    refused = []
    for backend in USABLE:
        base = old.clone()
        try:
            delta_apply(base, Delta.from_bytes(data), in_place=True, backend=backend)
        except DeltaBaseError:
            refused.append(True)
            assert same_bits(base, old)
        except DeltaError as error:
            refused.append(True)
            assert "result" in str(error) or same_bits(base, old)
        else:
            refused.append(False)
    return refused


@settings(max_examples=150, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.02, 0.2, 1.0]),
    count=st.sampled_from([1, 100, 512, 700, 1500]),
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 40),
)
@example(share=0.02, count=700, edits=[(64, 0xFF), (65, 0xFF)], cut=0)
@example(share=0.02, count=700, edits=[(48, 0xFF), (55, 0x7F)], cut=0)
@example(share=0.02, count=700, edits=[(8, 0xFF), (15, 0xFF)], cut=0)
@example(share=0.02, count=700, edits=[(56, 0xFF), (63, 0xFF)], cut=0)
def test_no_forged_bytes_do_harm(share: float, count: int, edits: list[tuple[int, int]], cut: int) -> None:
    torch.manual_seed(count)
    old, new = pair(count, share)
    data = bytearray(delta_encode(old, new, backend="reference").to_bytes())
    for place, value in edits:
        data[place % len(data)] = value
    shorter = bytes(data[: len(data) - cut])
    outcomes = forged(resealed(shorter) if len(shorter) > 8 else shorter, old)
    assert len(set(outcomes)) == 1


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_no_bytes_at_all_do_harm(data: bytes) -> None:
    old = torch.zeros(20, dtype=torch.int16)
    for sent in (data, b"SLD1" + struct.pack("<HHQ", 1, 512, 20) + data):
        assert all(forged(sent, old))


@needs_native
def test_native_refuses_every_unsound_block() -> None:
    # Positions outside, too few, too many, an escape at the end, unused bits, a bitmap past the end.
    old = torch.zeros(600, dtype=torch.int16)
    new = old.clone()
    new[[2, 3, 599]] = 1
    sound = delta_encode(old, new, backend="native").to_bytes()
    entries, positions = sound[64:72], sound[72:80]
    assert (entries[:4], positions[:3]) == (struct.pack("<HH", 2, 1), bytes([2, 0, 87]))
    for place, edit in (
        (74, bytes([88])),
        (74, bytes([255])),
        (72, bytes([255, 255])),
        (64, struct.pack("<HH", 1, 2)),
        (64, struct.pack("<HH", 2 | 0x1000, 1)),
        (64, struct.pack("<HH", 513, 1)),
        (64, struct.pack("<HH", 2, 0x8001)),
    ):
        damaged = resealed(sound[:place] + edit + sound[place + len(edit) :])
        for backend in USABLE:
            with pytest.raises(DeltaError, match=r"sound|no whole delta"):
                delta_apply(old, Delta.from_bytes(damaged), backend=backend)


def test_refuses_bad_arguments() -> None:
    half, single = torch.ones(4, dtype=torch.bfloat16), torch.ones(4)
    with pytest.raises(ShapeError, match="old must be of a type of 2 bytes, such as bfloat16, got"):
        delta_encode(single, single)
    with pytest.raises(ShapeError, match=r"new must have shape \[4\], got \[3\]"):
        delta_encode(half, half[:3])
    with pytest.raises(ShapeError, match=r"new must be torch\.bfloat16 on cpu, got torch\.float16"):
        delta_encode(half, half.half())
    with pytest.raises(ShapeError, match=r"must be in \[0, 2\^64\), got \(-1, 0\)"):
        delta_encode(half, half, base_version=-1)
    with pytest.raises(ShapeError, match="master must be float32 and weights bfloat16"):
        delta_encode_cast(half, half)
    with pytest.raises(ShapeError, match="weights must be contiguous"):
        delta_encode_cast(torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bfloat16).T)
    with pytest.raises(ShapeError, match="base must be contiguous to be changed in place"):
        delta_apply(torch.ones(3, 2, dtype=torch.bfloat16).T, delta_encode(half, half), in_place=True)
    with pytest.raises(DeltaError, match=r"data must be \[B\] uint8"):
        Delta.of(single)
    with pytest.raises(BackendError, match="backend 'triton' does not exist for this op"):
        delta_encode(half, half, backend="triton")


def test_numpy_words_of_any_alignment_are_read() -> None:
    old, new = pair(600, 0.1)
    data = delta_encode(old, new).to_bytes()
    shifted = torch.from_numpy(np.frombuffer(b"x" + data, np.uint8).copy())[1:]
    for backend in USABLE:
        assert same_bits(delta_apply(old, Delta.of(shifted), backend=backend), new)
