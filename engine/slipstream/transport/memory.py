"""Floor 4. Clients and hub in one thread, without sockets: the same messages, in one fixed order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from slipstream.messages import Buffer, decode_message, encode_message
from slipstream.transport.channel import Handler, Reply, nothing


class MemoryHub:
    """Stands in for the hub process: each message is handled when it is sent.

    Example: ``hub = MemoryHub(ledger); client = ActorClient(hub.channel("actor-0"), spool, run, "actor-0")``.
    """

    def __init__(self, handler: Handler, *, clock: Callable[[], float] = lambda: 0.0) -> None:
        """Serve a state machine; by default its time stands still, so that nothing depends on speed."""
        self._handler, self._clock = handler, clock
        self._channels: dict[bytes, MemoryChannel] = {}

    def channel(self, name: str) -> MemoryChannel:
        """Return a new actor's connection."""
        channel = MemoryChannel(self, f"{name}/{len(self._channels)}".encode())
        self._channels[channel.peer] = channel
        return channel

    def sync_channel(self, name: str) -> MemorySyncChannel:
        """Return a new learner's connection."""
        return MemorySyncChannel(self.channel(name))

    def take(self, peer: bytes, frames: Sequence[Buffer]) -> None:
        """Handle one message and hand the replies out."""
        message = decode_message(frames[0])
        now = self._clock()
        replies = self._handler.handle(peer, message, [bytes(frame) for frame in frames[1:]], now)
        self._hand_out([*replies, *self._handler.progress(now)])

    def tick(self) -> None:
        """Let the state machine do what time demands."""
        self._hand_out(self._handler.tick(self._clock()))

    def _hand_out(self, replies: Iterable[Reply]) -> None:
        self._handler.flush()
        for peer, message, frames in replies:
            channel = self._channels.get(peer)
            if channel is not None:
                channel.put([encode_message(message), *frames])


class MemoryChannel:
    """One actor's end in memory."""

    def __init__(self, hub: MemoryHub, peer: bytes) -> None:
        """Connect; made by `MemoryHub.channel`."""
        self.address, self.peer = "memory", peer
        self.remade: Callable[[], None] = nothing
        self._hub, self._closed = hub, False
        self._messages: deque[list[Buffer]] = deque()
        self._arrived = asyncio.Event()

    def send_now(self, frames: Sequence[Buffer]) -> bool:
        """Let the hub handle one message now."""
        self._hub.take(self.peer, frames)
        return True

    async def send(self, frames: Sequence[Buffer]) -> None:
        """Let the hub handle one message now."""
        self.send_now(frames)

    async def receive(self) -> list[Buffer]:
        """Return the next message."""
        while not self._messages:
            self._arrived.clear()
            await self._arrived.wait()
        return self._messages.popleft()

    def put(self, frames: list[Buffer]) -> None:
        """Take a message of the hub in."""
        if not self._closed:
            self._messages.append(frames)
            self._arrived.set()

    def receive_now(self) -> list[Buffer] | None:
        """Return the next message, or None when there is none."""
        return self._messages.popleft() if self._messages else None

    def close(self) -> None:
        """Take nothing any more."""
        self._closed = True


class MemorySyncChannel:
    """The learner's end in memory; waiting would be in vain in one thread, so it never does."""

    def __init__(self, channel: MemoryChannel) -> None:
        """Wrap a connection; made by `MemoryHub.sync_channel`."""
        self._channel, self._hub = channel, channel._hub
        self.address = channel.address
        self.remade: Callable[[], None] = nothing

    def send(self, frames: Sequence[Buffer], _timeout_s: float) -> bool:
        """Let the hub handle one message now."""
        self._hub.take(self._channel.peer, frames)
        return True

    def receive(self, _timeout_s: float) -> list[Buffer] | None:
        """Return the next message, or None when there is none."""
        return self._channel.receive_now()

    def close(self) -> None:
        """Take nothing any more."""
        self._channel.close()
