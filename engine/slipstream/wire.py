"""Floor 1. A trajectory on the wire and at rest.

A trajectory is 9 frames, integers little-endian:

    0      header      MessagePack map (`Header`), <= 64 KiB, no extension types
    1      tool calls  MessagePack array of maps, <= 256 KiB
    2..7   arrays      token_ids i32[T], loss_mask u8[T], behavior_logprobs f32[T], versions i32[T],
                       turns i16[T],
                       turn_rewards f32[U]
    8      check       u32: CRC-32C of frames 0..7 in order

A record (logs, spools, batches) is the same in one piece: u32 number of frames, u32 length of each, then
the frames.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream.errors import FrameError
from slipstream.integrity import ARRAYS as ARRAYS
from slipstream.integrity import check_values, crc32c
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
from slipstream_kernels.delivery import Summary

MAX_TOOL_CALL_BYTES: Final = 256 << 10
MAX_META_BYTES: Final = MAX_HEADER_BYTES + MAX_TOOL_CALL_BYTES + 256
"""Most that a record adds to the bytes of its arrays."""
MAX_TOKENS: Final = 1 << 22
FRAMES: Final = 2 + len(ARRAYS) + 1
_NEAR_SERIALS: Final = 32
"""So few serials are looked for one by one faster than by sorting."""


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
    tokens: int
    """T, the length of five arrays."""
    turns: int
    """U, the length of turn_rewards."""


_ENCODER: Final = msgspec.msgpack.Encoder()
_HEADER: Final = msgspec.msgpack.Decoder(Header)
_TOOL_CALLS: Final = msgspec.msgpack.Decoder(tuple[ToolCall, ...])
_U32: Final = struct.Struct("<I")


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
    reward: float
    """Sum of its turns' rewards."""
    sampled: int
    """Tokens whose loss_mask is 1."""
    serials: tuple[int, ...]
    """Distinct serials of its sampled tokens, ascending."""


def encode_trajectory(trajectory: Trajectory, identity: TrajectoryId | None = None) -> list[Buffer]:
    """Return the 9 frames of a trajectory, under another identity if one is given.

    Array frames share its memory. Raises FrameError for a trajectory that its reader would refuse.
    """
    arrays: list[NDArray[Any]] = [getattr(trajectory, name) for name, _ in ARRAYS]
    for (name, dtype), array in zip(ARRAYS, arrays, strict=True):
        if array.dtype != dtype or array.ndim != 1:
            raise FrameError(
                f"{name}: expected one dimension of {dtype}, got {array.dtype} of shape {array.shape}"
            )
        if array.size != (trajectory.turn_rewards if name == "turn_rewards" else trajectory.token_ids).size:
            raise FrameError(f"{name}: expected length {trajectory.token_ids.size}, got {array.size}")
    header = _header(trajectory, identity or trajectory.identity)
    arrays = [np.ascontiguousarray(array) for array in arrays]
    _check(header, arrays)
    frames: list[Buffer] = [_ENCODER.encode(header), _encode_tool_calls(trajectory.tool_calls)]
    frames += [array.data.cast("B") if array.size else b"" for array in arrays]
    if len(frames[0]) > MAX_HEADER_BYTES or len(frames[1]) > MAX_TOOL_CALL_BYTES:
        raise FrameError(
            f"header and tool calls: expected at most {MAX_HEADER_BYTES} and {MAX_TOOL_CALL_BYTES} "
            f"bytes, got {len(frames[0])} and {len(frames[1])}"
        )
    frames.append(_U32.pack(crc32c(frames)))
    return frames


def decode_trajectory(frames: Sequence[Buffer]) -> Trajectory:
    """Return the trajectory in 9 frames; its arrays are read-only views of them.

    Raises FrameError naming the field, what was expected and what was got.
    """
    header, calls, _ = _decode(frames)
    arrays = [np.frombuffer(frame, dtype) for frame, (_, dtype) in zip(frames[2:-1], ARRAYS, strict=True)]
    for array in arrays:
        array.flags.writeable = False
    return Trajectory(
        identity=header.identity, attempt=header.attempt, split=header.split, evaluation=header.evaluation,
        issue=header.issue, scores=header.scores, outcome=header.outcome, sampling=header.sampling,
        timings=header.timings, note=header.note, tool_calls=calls, token_ids=arrays[0], loss_mask=arrays[1],
        behavior_logprobs=arrays[2], versions=arrays[3], turns=arrays[4], turn_rewards=arrays[5],
    )  # fmt: skip


def inspect_trajectory(frames: Sequence[Buffer]) -> Arrival:
    """Check the 9 frames of a trajectory as `decode_trajectory` does, and return what they add up to."""
    header, _, found = _decode(frames)
    rewards = np.frombuffer(frames[7], "<f4")
    serials: tuple[int, ...] = (found.most,) if found.sampled else ()
    if found.least != found.most:
        serials = _serials(np.frombuffer(frames[5], "<i4"), found)
    return Arrival(header=header, reward=float(rewards.sum()), sampled=found.sampled, serials=serials)


def _serials(versions: NDArray[np.int32], found: Summary) -> tuple[int, ...]:
    if found.most - found.least < _NEAR_SERIALS:
        return tuple(s for s in range(found.least, found.most + 1) if (versions == s).any())
    return tuple(serial for serial in np.unique(versions).tolist() if serial >= 0)


def _decode(frames: Sequence[Buffer]) -> tuple[Header, tuple[ToolCall, ...], Summary]:
    header = decode_header(frames)
    calls = decode_struct(
        frames[1], _TOOL_CALLS, what="tool calls", limit=MAX_TOOL_CALL_BYTES, free_form=True
    )
    for frame, (name, dtype) in zip(frames[2:-1], ARRAYS, strict=True):
        length = header.turns if name == "turn_rewards" else header.tokens
        if len(frame) != length * dtype.itemsize:
            raise FrameError(f"{name}: expected {length} x {dtype.itemsize} bytes, got {len(frame)}")
    return header, calls, _check(header, frames[2:-1])


def decode_header(frames: Sequence[Buffer]) -> Header:
    """Check the number of frames and their CRC-32C, and return the header."""
    if len(frames) != FRAMES:
        raise FrameError(f"trajectory: expected {FRAMES} frames, got {len(frames)}")
    if len(frames[-1]) != 4:
        raise FrameError(f"check: expected 4 bytes, got {len(frames[-1])}")
    (expected,) = _U32.unpack(frames[-1])
    found = crc32c(frames[:-1])
    if found != expected:
        raise FrameError(f"check: expected CRC-32C {expected:08x}, got {found:08x}")
    header = decode_struct(frames[0], _HEADER, what="header", limit=MAX_HEADER_BYTES)
    if not (0 <= header.tokens <= MAX_TOKENS and 0 <= header.turns <= header.tokens):
        raise FrameError(
            f"header: expected 0 <= turns <= tokens <= {MAX_TOKENS}, got {header.turns}, {header.tokens}"
        )
    return header


def record_prefix(frames: Sequence[Buffer]) -> list[Buffer]:
    """Return what a record of these frames begins with; nothing for no frames."""
    return [struct.pack(f"<{len(frames) + 1}I", len(frames), *map(len, frames))] if frames else []


def record_frames(frames: Sequence[Buffer]) -> list[Buffer]:
    """Return the buffers of one record: its prefix, then the frames themselves, not copied."""
    return [*record_prefix(frames), *frames]


def to_bytes(trajectory: Trajectory) -> bytes:
    """Return a trajectory as one record."""
    return b"".join(record_frames(encode_trajectory(trajectory)))


def split_record(record: Buffer) -> list[Buffer]:
    """Return the frames of a record as views; raises FrameError when its lengths do not add up."""
    view = memoryview(record)
    count = _U32.unpack_from(view)[0] if len(view) >= 4 else 0
    if not 0 < count <= 64 or len(view) < 4 * (count + 1):
        raise FrameError(
            f"record: expected 1 to 64 frames and their lengths, got {count} in {len(view)} bytes"
        )
    lengths = struct.unpack_from(f"<{count}I", view, 4)
    position = 4 * (count + 1)
    if position + sum(lengths) != len(view):
        raise FrameError(f"record: expected {position + sum(lengths)} bytes, got {len(view)}")
    frames: list[Buffer] = []
    for length in lengths:
        frames.append(view[position : position + length])
        position += length
    return frames


def from_bytes(record: Buffer) -> Trajectory:
    """Return the trajectory of one record; raises FrameError."""
    return decode_trajectory(split_record(record))


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
        tokens=trajectory.token_ids.size,
        turns=trajectory.turn_rewards.size,
    )


def _encode_tool_calls(calls: Sequence[ToolCall]) -> bytes:
    try:
        return _ENCODER.encode(tuple(calls))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise FrameError(f"tool calls: expected plain JSON-like arguments, got {error}") from error


def _check(header: Header, parts: Sequence[Buffer | NDArray[Any]]) -> Summary:
    found = check_values(parts)
    for score in header.scores:
        if not math.isfinite(score.weight) or (score.value is not None and not math.isfinite(score.value)):
            raise FrameError(
                f"scores.{score.name}: expected finite numbers, got {score.value} x {score.weight}"
            )
    return found
