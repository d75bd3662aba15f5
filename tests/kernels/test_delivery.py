"""The native checks of delivery give the values and errors of google-crc32c, NumPy and Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import google_crc32c
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream import integrity, messages, records, synthetic, wire
from slipstream.errors import FrameError
from slipstream.types import Trajectory
from slipstream_kernels import native
from slipstream_kernels.delivery import Delivery, load

needs_library = pytest.mark.skipif(not native.available(), reason=native.description())
SIZES = [0, 1, 7, 8, 9, 255, 767, 768, 769, 12_287, 12_288, 12_289, 300_001]


@pytest.fixture
def library() -> Delivery:
    delivery = load()
    assert delivery is not None
    return delivery


@needs_library
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_crc32c_equals_google(library: Delivery, size: int, portable: bool) -> None:
    data = np.random.default_rng(size).bytes(size + 3)
    for skip in (0, 3):
        part = np.frombuffer(data, np.uint8)[skip : skip + size]
        expected = google_crc32c.extend(0x1234567, part) if size else 0x1234567
        assert library.crc32c(part.ctypes.data, size, 0x1234567, portable=portable) == expected


@needs_library
def test_crc32c_of_the_standard_is_frozen(library: Delivery) -> None:
    # RFC 3720, appendix B.4.
    assert library.crc32c(bytes(32), 32) == 0x8A9136AA
    assert library.crc32c(bytes(range(32)), 32, portable=True) == 0x46DD794E


@needs_library
@pytest.mark.parametrize("size", SIZES)
def test_two_checksums_combine(library: Delivery, size: int) -> None:
    data = np.random.default_rng(size).bytes(size + 5)
    for cut in (0, 5, size):
        head, tail = data[:cut], data[cut:]
        combined = library.combine(google_crc32c.value(head), google_crc32c.value(tail), len(tail))
        assert combined == google_crc32c.value(data)


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (integrity, messages, wire):
        monkeypatch.setattr(module, "load", lambda: None)


def both(monkeypatch: pytest.MonkeyPatch, use: Callable[[], Any]) -> tuple[Any, Any]:
    """What `use` returns or raises with the library and without."""

    def outcome() -> Any:
        try:
            return use()
        except FrameError as error:
            return str(error)

    ours = outcome()
    with monkeypatch.context() as context:
        without_library(context)
        return ours, outcome()


@pytest.mark.parametrize("tokens", [2, 33, 5000, 40_000])
def test_records_are_the_same_without_the_library(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    def record() -> bytes:
        return b"".join(records.pack(7, [b"event"], wire.encode_trajectory(synthetic.trajectory(tokens))))

    ours, theirs = both(monkeypatch, record)
    assert ours == theirs
    assert records.scan(ours).records[0].end == len(ours)


FAULTS = [
    ("loss_mask", 2),
    ("loss_mask", 255),
    ("behavior_logprobs", np.nan),
    ("behavior_logprobs", -np.inf),
    ("turn_rewards", np.inf),
    ("token_ids", -1),
    ("versions", 3),
    ("versions", -1),
    ("turns", -1),
    ("turns", 0),
    ("turns", 2),
    ("turns", 32_767),
    ("versions", 7),
]


@pytest.mark.parametrize("position", [0, 1, 4094, 4095, 4096, 5000, 9999])
def test_faults_are_named_the_same(monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    made = synthetic.trajectory(10_000)
    for faults in [[fault] for fault in FAULTS] + [[a, b] for a in FAULTS[::3] for b in FAULTS[1::3]]:
        arrays = {name: getattr(made, name).copy() for name, _ in wire.ARRAYS}
        for name, value in faults:
            arrays[name][position % arrays[name].size] = value
        record = unchecked_record(dataclasses.replace(made, **arrays))
        ours, theirs = both(monkeypatch, lambda record=record: wire.inspect_trajectory(record))
        assert ours == theirs, faults
        delivery = load()
        assert delivery is None or (delivery.check(record, len(record)) is None) == isinstance(theirs, str)


def unchecked_record(made: Trajectory) -> bytes:
    """The record of a trajectory whose values nobody has looked at."""
    good = synthetic.trajectory(made.token_ids.size, turns=made.turn_rewards.size)
    record = bytes(wire.encode_trajectory(good))
    arrays = b"".join(getattr(made, name).tobytes() for name, _ in wire.ARRAYS)
    body = record[:32] + arrays + record[32 + len(arrays) : -4]
    return body + google_crc32c.value(body).to_bytes(4, "little")


@pytest.mark.parametrize("tokens", [1, 15, 64, 4097])
def test_what_is_counted_is_the_same(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    random = np.random.default_rng(tokens)
    for serials in ([0], [3, 4, 9], [0, 2_000_000_000], []):
        mask = (random.random(tokens) < (0.5 if serials else 0.0)).astype(np.uint8)
        chosen = random.choice(serials or [0], tokens)
        made = dataclasses.replace(
            synthetic.trajectory(tokens, turns=1), loss_mask=mask,
            versions=np.where(mask, chosen, -1).astype(np.int32),
            turns=np.where(mask, 0, -1).astype(np.int16),
        )  # fmt: skip
        record = wire.encode_trajectory(made)
        ours, theirs = both(monkeypatch, lambda record=record: wire.inspect_trajectory(record))
        assert ours == theirs
        assert ours.sampled == mask.sum()
        assert set(ours.serials) == set(chosen[mask == 1].tolist())


@pytest.mark.parametrize("versions", [(4,), (2, 4), (0, 31), (0, 500, 2_000_000)])
def test_serials_are_those_of_the_sampled_tokens(versions: tuple[int, ...]) -> None:
    made = synthetic.trajectory(64)
    made.versions[made.loss_mask == 1] = np.resize(versions, 32)
    assert wire.inspect_trajectory(wire.encode_trajectory(made)).serials == versions


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


GOOD = [
    msgpack.packb([1, -1, 2**63, 1.5, "x" * 300, b"y" * 70_000, None, True, {"a": [1, 2]}, list(range(40))]),
    msgpack.packb({str(n): n for n in range(20_000)} | {"z": "z" * 70_000}),
    nested(messages.MAX_DEPTH - 1),
    b"\xdd\x00\x00\x00\x01\xc0",
    b"\xdf\x00\x00\x00\x00",
]


@needs_library
@pytest.mark.parametrize("data", GOOD)
def test_plain_msgpack_passes(library: Delivery, data: bytes) -> None:
    messages.check_nesting_in_python(data, what="data")
    assert library.is_plain_msgpack(data, most_depth=messages.MAX_DEPTH, most_items=messages.MAX_ITEMS)


@needs_library
@settings(max_examples=500, deadline=None)
@given(st.one_of(
    st.binary(max_size=60),
    st.tuples(st.sampled_from(GOOD), st.integers(0, 400), st.binary(max_size=3)).map(
        lambda made: made[0][: made[1]] + made[2] + made[0][made[1] + len(made[2]) :]
    ),
    st.sampled_from([nested(messages.MAX_DEPTH), b"\xdd\xff\xff\xff\xff", b"\xc7\x01\x01\x00"]),
))  # fmt: skip
def test_both_scans_of_msgpack_agree(data: bytes) -> None:
    delivery = load()
    assert delivery is not None
    try:
        messages.check_nesting_in_python(data, what="data")
        expected = True
    except FrameError:
        expected = False
    found = delivery.is_plain_msgpack(data, most_depth=messages.MAX_DEPTH, most_items=messages.MAX_ITEMS)
    assert found == expected
