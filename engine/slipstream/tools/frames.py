"""Floor 4. What an actor and a sandbox's worker say to each other.

    u32 length, big-endian | one MessagePack value of at most so many bytes as the reader takes

A worker first says `Ready`, then answers each `Request` with one `Answer` of the same number. Neither side
unpickles anything; a reader refuses a length beyond its limit before it reads on.
"""

from __future__ import annotations

import socket
import struct
from typing import Any, Final, Literal

import msgspec

from slipstream.errors import FrameError
from slipstream.tools.confinement import Confinement, Limits

LENGTH: Final = struct.Struct(">I")
MAX_REQUEST_BYTES: Final = 8 << 20


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a fork server is to serve."""

    service: str
    """"module:function"; the function takes `options` and returns a maker of one service per worker."""
    options: dict[str, Any]
    limits: Limits
    answer_bytes: int
    """Most bytes of one answer."""
    remove_scratch: bool
    """The scratch folder is the host's, and goes in the end."""


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """A worker, or the fork server itself, is there."""

    confinement: Confinement | None = None
    error: str = ""
    """Why it is not."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A call of one of the service's methods."""

    number: int
    method: str
    arguments: dict[str, Any]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a call."""

    number: int
    kind: Literal["value", "refused", "crashed", "oversized", "infrastructure"]
    value: msgspec.Raw = msgspec.Raw(b"\xc0")
    """What the method returned, MessagePack."""
    text: str = ""
    """What went wrong."""


def frame_of(value: Any) -> bytes:
    """Return a value as one frame."""
    body = msgspec.msgpack.encode(value)
    return LENGTH.pack(len(body)) + body


def length_of(header: bytes, most: int) -> int:
    """Return the length that a frame declares; raises FrameError beyond `most` bytes."""
    (length,) = LENGTH.unpack(header)
    if length > most:
        raise FrameError(f"frame of a worker: expected at most {most} bytes, got {length}")
    return int(length)


def read_frame(channel: socket.socket, most: int) -> bytes | None:
    """Return the next frame's body, waiting as long as it takes; None at the end. Raises FrameError."""
    header = _exactly(channel, LENGTH.size)
    return None if header is None else _exactly(channel, length_of(header, most))


def _exactly(channel: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = channel.recv(size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)
