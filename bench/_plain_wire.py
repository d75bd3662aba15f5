"""Plain pyzmq in place of hub and actors, for dataflow.py: what the same bytes cost without our promises."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Final

import zmq
from _parts import say

from slipstream import messages as m
from slipstream import synthetic
from slipstream.config import HubConfig
from slipstream.transport.zeromq import HIGH_WATER, receive_frames, send_frames
from slipstream.wire import encode_trajectory

WINDOW: Final = HubConfig().credit_bytes
TURN: Final = 128
"""Messages that the acknowledging receiver takes in one turn, as the hub does."""


@contextlib.contextmanager
def _stored(home: str) -> Iterator[int]:
    """Open a file to write into, or give -1."""
    if not home:
        yield -1
        return
    with tempfile.TemporaryFile(dir=home, buffering=0) as file:
        yield file.fileno()


def part_acked_receiver(count: str, home: str = "") -> None:
    """Receive everything in turns; after each turn tell each sender how much of it came from there.

    With `home` each turn's bytes are first written into a file there, and synced.
    """
    with _stored(home) as store, zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.set_hwm(HIGH_WATER)
        say(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
        left = int(count)
        while left:
            socket.poll()
            taken: Counter[bytes] = Counter()
            with contextlib.suppress(zmq.Again):
                for _ in range(TURN):
                    peer, *frames = receive_frames(socket)
                    taken[bytes(peer)] += 1
                    if store >= 0:
                        os.writev(store, frames)
            if store >= 0:
                os.fdatasync(store)
            for peer, number in taken.items():
                socket.send_multipart([peer, number.to_bytes(4, "little")])
            left -= taken.total()
        sys.stdin.readline()


def part_acked_sender(address: str, size: str, count: str) -> None:
    """Send the same frames, at most a window of bytes ahead of the acknowledgements."""
    tokens = int(size) // synthetic.BYTES_PER_TOKEN
    # As many different ones as the actor sends: a single one would never leave the processor's cache.
    messages = [
        [m.encode_message(m.Deliver(seq=seq)), encode_trajectory(synthetic.trajectory(tokens, seed=seq))]
        for seq in range(int(count))
    ]
    most = max(1, WINDOW // sum(map(len, messages[0])))
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.set_hwm(HIGH_WATER)
        socket.connect(address)
        say("ready")
        sys.stdin.readline()
        ahead = 0
        while messages or ahead:
            if messages and ahead < most:
                socket.poll(flags=zmq.POLLOUT)
                send_frames(socket, messages.pop())
                ahead += 1
            while ahead and socket.poll(0 if messages and ahead < most else None):
                ahead -= int.from_bytes(socket.recv(), "little")
        say("done")
        sys.stdin.readline()


def part_unacked_receiver(count: str) -> None:
    """Receive everything, then tell each sender."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        say(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
        peers = set()
        for _ in range(int(count)):
            peer, _frame = socket.recv_multipart(copy=False)
            peers.add(peer.bytes)
        for peer in peers:
            socket.send_multipart([peer, b"done"])
        sys.stdin.readline()


def part_unacked_sender(address: str, size: str, count: str) -> None:
    """Send the same bytes as one frame each."""
    tokens = int(size) // synthetic.BYTES_PER_TOKEN
    records = [encode_trajectory(synthetic.trajectory(tokens, seed=seq)) for seq in range(int(count))]
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(address)
        say("ready")
        sys.stdin.readline()
        for record in records:
            socket.send(record, copy=False)
        socket.recv()
        say("done")
        sys.stdin.readline()
