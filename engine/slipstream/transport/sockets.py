"""Floor 4. Socket options and messages of many frames, for both ends of the wire (zeromq.py says why)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import zmq

from slipstream.keys import ClientKeys, HubKeys
from slipstream.messages import Buffer

MAX_FRAME_BYTES: Final = 32 << 20
MAX_FRAMES: Final = 16
HIGH_WATER: Final = 4096
ZAP_DOMAIN: Final = "slipstream"
CURVE_FRAME_BYTES: Final = 64
"""More than CURVE adds to a frame."""
_BACKLOG: Final = 4096
_COPY_BELOW: Final = 512 << 10
"""Copying a smaller frame to libzmq costs less than sharing it, which a thread of pyzmq keeps count of."""
_BYTES_BELOW: Final = 4 << 10
"""Copying a smaller frame out of libzmq costs less than a view of it."""
_NOW: Final = int(zmq.NOBLOCK)
_NOT_LAST: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
# Plain integers: one operation on an enum's flags takes longer than a call of libzmq.


def set_router_options(socket: zmq.Socket[Any], keys: HubKeys | None) -> None:
    """Make a socket the hub's; with keys only who proves an allowed key is let in."""
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.SNDHWM, HIGH_WATER),
        (zmq.RCVHWM, HIGH_WATER),
        (zmq.MAXMSGSIZE, MAX_FRAME_BYTES + CURVE_FRAME_BYTES),
        (zmq.HANDSHAKE_IVL, 5000),
        (zmq.BACKLOG, _BACKLOG),
        (zmq.ROUTER_MANDATORY, 1),
    ):
        socket.setsockopt(option, value)
    socket.setsockopt_string(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
    if keys is not None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public_key)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret_key)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def set_dealer_options(socket: zmq.Socket[Any], keys: ClientKeys | None) -> None:
    """Make a socket a client's; with keys it talks to the hub it insists on, and to no other."""
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.IMMEDIATE, 1),
        (zmq.SNDHWM, HIGH_WATER),
        (zmq.RCVHWM, HIGH_WATER),
        (zmq.CONNECT_TIMEOUT, 5000),
        (zmq.HANDSHAKE_IVL, 5000),
        (zmq.RECONNECT_IVL, 100),
        (zmq.RECONNECT_IVL_MAX, 10_000),
    ):
        socket.setsockopt(option, value)
    if keys is not None:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public_key)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret_key)
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.hub_public_key)


def send_frames(socket: zmq.Socket[Any], frames: Sequence[Buffer]) -> None:
    """Hand one message over, large frames not copied; raises zmq.Again when no peer takes it now."""
    for number, frame in enumerate(frames[:-1]):
        try:
            socket.send(frame, _NOT_LAST, copy=len(frame) < _COPY_BELOW)
        except zmq.Again:
            if number:
                # The peer is gone: libzmq drops frames up to a last one, and must not drop the next message.
                socket.send(b"", _NOW)
            raise
    socket.send(frames[-1], _NOW, copy=len(frames[-1]) < _COPY_BELOW)


def receive_frames(socket: zmq.Socket[Any]) -> list[Buffer]:
    """Return one message, large frames not copied; raises zmq.Again when there is none."""
    return receive_with_last(socket)[0]


def receive_with_last(socket: zmq.Socket[Any], *, most: int = 1 << 20) -> tuple[list[Buffer], zmq.Frame]:
    """Return the first `most` frames of a message, and its last one, which knows where it came from.

    Raises zmq.Again when there is no message.
    """
    frames: list[Buffer] = []
    while True:
        frame = socket.recv(_NOW, copy=False)
        if len(frames) < most:
            frames.append(frame.bytes if len(frame) < _BYTES_BELOW else frame.buffer)
        if not frame.more:
            return frames, frame
