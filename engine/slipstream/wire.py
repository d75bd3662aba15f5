"""Floor 1. A trajectory on the wire and at rest: one record everywhere, integers little-endian.

    u32[8]   bytes of each part
    parts    token_ids i32[T], behavior_logprobs f32[T], versions i32[T], turn_rewards f32[U],
             turns i16[T], loss_mask u8[T],
             header      MessagePack map (`Header`), <= 64 KiB, no extension types
             tool calls  MessagePack array of maps, <= 256 KiB
    u32      CRC-32C of everything before

Larger items come first, so that each array lies at a multiple of its item size. An actor writes a record
once; spool, message, log and batch carry the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream.errors import DamageError, FrameError
from slipstream.integrity import ARRAYS as ARRAYS
from slipstream.integrity import address, check_values, crc32c
from slipstream.messages import MAX_HEADER_BYTES, PROTOCOL, Buffer, decode_struct, message_schema
from slipstream.types import (
    Outcome,
    Sampling,
    Score,
    Split,
    TaskAttempt,
    Timings,
    ToolCall,
    Trajectory,
    TrajectoryId,
)
from slipstream_kernels.delivery import Summary, load

MAX_TOOL_CALL_BYTES: Final = 256 << 10
MAX_META_BYTES: Final = MAX_HEADER_BYTES + MAX_TOOL_CALL_BYTES + 256
"""Most that a record adds to the bytes of its arrays."""
MAX_TOKENS: Final = 1 << 22
_NEAR_SERIALS: Final = 32
"""So few serials are looked for one by one faster than by sorting."""
_TOKEN_BYTES: Final = sum(dtype.itemsize for name, dtype in ARRAYS if name != "turn_rewards")
_REWARDS: Final = [name for name, _ in ARRAYS].index("turn_rewards")


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything of a trajectory but its arrays and tool calls."""

    identity: TrajectoryId
    attempt: TaskAttempt
    split: Split
    evaluation: int
    issue: int
    scores: tuple[Score, ...]
    outcome: Outcome
    sampling: Sampling
    timings: Timings
    note: str
    segments: tuple[int, ...] = ()
    samplers: tuple[tuple[str, int], ...] = ()
    stage: int = -1


_ENCODER: Final = msgspec.msgpack.Encoder()
_HEADER: Final = msgspec.msgpack.Decoder(Header)
_TOOL_CALLS: Final = msgspec.msgpack.Decoder(tuple[ToolCall, ...])
_LENGTHS: Final = struct.Struct("<8I")
_CHECK: Final = struct.Struct("<I")


@functools.cache
def schema_hash() -> str:
    """Return 16 hexadecimal digits that change with any struct, array or limit of the wire."""
    arrays = [(name, dtype.str) for name, dtype in ARRAYS]
    parts = [
        PROTOCOL,
        arrays,
        msgspec.json.schema(Header),
        msgspec.json.schema(tuple[ToolCall, ...]),
        message_schema(),
    ]
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()[:16]


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """What the hub needs to know of a trajectory; its arrays stay bytes."""

    header: Header
    turns: int
    reward: float
    """Sum of its turns' rewards."""
    sampled: int
    """Tokens whose loss_mask is 1."""
    serials: tuple[int, ...]
    """Distinct serials of its sampled tokens, ascending."""


def encode_trajectory(trajectory: Trajectory, identity: TrajectoryId | None = None) -> bytearray:
    """Return a trajectory's record, under another identity if one is given.

    Raises FrameError for a trajectory that its reader would refuse.
    """
    arrays = _checked_arrays(trajectory)
    _check_scores(trajectory.scores)
    _check_segments(trajectory.segments, trajectory.token_ids.size)
    header = _ENCODER.encode(_header(trajectory, identity or trajectory.identity))
    calls = _encode_tool_calls(trajectory.tool_calls)
    if len(header) > MAX_HEADER_BYTES or len(calls) > MAX_TOOL_CALL_BYTES:
        raise FrameError(
            f"header and tool calls: expected at most {MAX_HEADER_BYTES} and {MAX_TOOL_CALL_BYTES} "
            f"bytes, got {len(header)} and {len(calls)}"
        )
    return _seal(arrays, header, calls)


def decode_trajectory(record: Buffer) -> Trajectory:
    """Return the trajectory of a record; its arrays are read-only views of it.

    Raises FrameError naming the field, what was expected and what was got.
    """
    checked = _check(record)
    header, calls = _decode_meta(record, checked)
    arrays = dict(zip([name for name, _ in ARRAYS], _views(record, checked), strict=True))
    for array in arrays.values():
        array.flags.writeable = False
    return Trajectory(
        identity=header.identity, attempt=header.attempt, split=header.split, evaluation=header.evaluation,
        issue=header.issue, scores=header.scores, outcome=header.outcome, sampling=header.sampling,
        timings=header.timings, note=header.note, segments=header.segments, samplers=header.samplers,
        stage=header.stage, tool_calls=calls, **arrays,
    )  # fmt: skip


def inspect_trajectory(record: Buffer) -> Arrival:
    """Check a record as `decode_trajectory` does, and return what it adds up to; raises FrameError."""
    found = _check(record)
    header, _ = _decode_meta(record, found)
    serials: tuple[int, ...] = (found.most,) if found.sampled else ()
    if found.least != found.most:
        serials = _serials(_views(record, found)[2], found)
    rewards = struct.unpack_from(f"<{found.turns}f", record, _LENGTHS.size + 12 * found.tokens)
    return Arrival(header=header, turns=found.turns, reward=math.fsum(rewards), sampled=found.sampled,
                   serials=serials)  # fmt: skip


def most_bytes(trajectory: Trajectory) -> int:
    """Return a bound of the bytes of a trajectory's record."""
    return MAX_META_BYTES + _TOKEN_BYTES * trajectory.token_ids.size + trajectory.turn_rewards.nbytes


def _checked_arrays(trajectory: Trajectory) -> list[NDArray[Any]]:
    """Return the arrays in the record's order, contiguous; raises FrameError for a wrong type or length."""
    arrays: list[NDArray[Any]] = []
    tokens, turns = trajectory.token_ids.size, trajectory.turn_rewards.size
    for name, dtype in ARRAYS:
        array: NDArray[Any] = getattr(trajectory, name)
        if array.dtype != dtype or array.ndim != 1:
            raise FrameError(
                f"{name}: expected one dimension of {dtype}, got {array.dtype} of shape {array.shape}"
            )
        if array.size != (turns if name == "turn_rewards" else tokens):
            raise FrameError(f"{name}: expected length {tokens}, got {array.size}")
        arrays.append(np.ascontiguousarray(array))
    if not turns <= tokens <= MAX_TOKENS:
        raise FrameError(f"trajectory: expected turns <= tokens <= {MAX_TOKENS}, got {turns}, {tokens}")
    return arrays


def _seal(arrays: Sequence[NDArray[Any]], header: bytes, calls: bytes) -> bytearray:
    """Return the record of checked parts; raises FrameError for a value that no array may hold."""
    lengths = _LENGTHS.pack(*(array.nbytes for array in arrays), len(header), len(calls))
    record = bytearray().join((lengths, *(array.data for array in arrays), header, calls, bytes(_CHECK.size)))
    native = load()
    if native is None or not native.seal(address(record), len(record)):
        check_values(arrays)
        body = memoryview(record)[: -_CHECK.size]
        _CHECK.pack_into(record, len(body), crc32c([body]))
    return record


def _check(record: Buffer) -> Summary:
    native = load()
    found = native.check(address(record), len(record)) if native is not None else None
    if found is not None and 0 <= found.turns <= found.tokens <= MAX_TOKENS:
        return found
    return _check_in_python(record)


def _check_in_python(record: Buffer) -> Summary:
    """Check lengths, CRC-32C and values of a record; raises FrameError naming what is wrong."""
    least = _LENGTHS.size + _CHECK.size
    if len(record) < least:
        raise DamageError(f"record: expected at least {least} bytes, got {len(record)}")
    sizes = _LENGTHS.unpack_from(record)
    if least + sum(sizes) != len(record):
        raise DamageError(f"record: expected {least + sum(sizes)} bytes, got {len(record)}")
    (expected,) = _CHECK.unpack_from(record, len(record) - _CHECK.size)
    got = crc32c([memoryview(record)[: -_CHECK.size]])
    if got != expected:
        raise DamageError(f"check: expected CRC-32C {expected:08x}, got {got:08x}")
    tokens, turns = sizes[len(ARRAYS) - 1], sizes[_REWARDS] // 4
    if not turns <= tokens <= MAX_TOKENS:
        raise FrameError(f"record: expected turns <= tokens <= {MAX_TOKENS}, got {turns}, {tokens}")
    for (name, dtype), size in zip(ARRAYS, sizes[: len(ARRAYS)], strict=True):
        length = turns if name == "turn_rewards" else tokens
        if size != length * dtype.itemsize:
            raise FrameError(f"{name}: expected {length} x {dtype.itemsize} bytes, got {size}")
    shape = Summary(0, -1, -1, tokens, turns, *sizes[len(ARRAYS) :])
    return Summary(*check_values(_views(record, shape)), *shape[3:])


def _views(record: Buffer, shape: Summary) -> list[NDArray[Any]]:
    """Return the arrays of a record whose lengths are known to fit."""
    views, position = [], _LENGTHS.size
    for name, dtype in ARRAYS:
        length = shape.turns if name == "turn_rewards" else shape.tokens
        views.append(np.frombuffer(record, dtype, length, position))
        position += length * dtype.itemsize
    return views


def _decode_meta(record: Buffer, shape: Summary) -> tuple[Header, tuple[ToolCall, ...]]:
    behind = len(record) - _CHECK.size
    between = behind - shape.call_bytes
    view = memoryview(record)
    header: Header = decode_struct(
        bytes(view[between - shape.header_bytes : between]), _HEADER, what="header", limit=MAX_HEADER_BYTES
    )
    _check_scores(header.scores)
    _check_segments(header.segments, shape.tokens)
    calls = decode_struct(
        bytes(view[between:behind]), _TOOL_CALLS, what="tool calls", limit=MAX_TOOL_CALL_BYTES, free_form=True
    )
    return header, calls


def _serials(versions: NDArray[np.int32], found: Summary) -> tuple[int, ...]:
    if found.most - found.least < _NEAR_SERIALS:
        return tuple(s for s in range(found.least, found.most + 1) if (versions == s).any())
    return tuple(serial for serial in np.unique(versions).tolist() if serial >= 0)


def _header(trajectory: Trajectory, identity: TrajectoryId) -> Header:
    return Header(
        identity=identity,
        attempt=trajectory.attempt,
        split=trajectory.split,
        evaluation=trajectory.evaluation,
        issue=trajectory.issue,
        scores=tuple(trajectory.scores),
        outcome=trajectory.outcome,
        sampling=trajectory.sampling,
        timings=trajectory.timings,
        note=trajectory.note,
        segments=trajectory.segments,
        samplers=trajectory.samplers,
        stage=trajectory.stage,
    )


def _encode_tool_calls(calls: Sequence[ToolCall]) -> bytes:
    try:
        return _ENCODER.encode(tuple(calls))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise FrameError(f"tool calls: expected plain JSON-like arguments, got {error}") from error


def _check_segments(starts: Sequence[int], tokens: int) -> None:
    edges = (0, *starts, tokens)
    if starts and not all(start < end for start, end in pairwise(edges)):
        raise FrameError(f"segments: expected ascending starts within 1 .. {tokens - 1}, got {starts[:8]}")


def _check_scores(scores: Sequence[Score]) -> None:
    for score in scores:
        if not math.isfinite(score.weight) or (score.value is not None and not math.isfinite(score.value)):
            raise FrameError(
                f"scores.{score.name}: expected finite numbers, got {score.value} x {score.weight}"
            )
