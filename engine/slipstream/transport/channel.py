"""Floor 4. The seam between clients and what carries their messages: both ends of it are here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from slipstream.messages import Buffer, Message

Reply = tuple[bytes, Message, Sequence[Buffer]]
"""(peer, message, data frames behind it)."""


class Handler(Protocol):
    """The hub's end: a state machine without sockets."""

    def handle(self, peer: bytes, message: Message, frames: Sequence[Buffer], now: float) -> list[Reply]:
        """Take one message of a peer and return what to send, once the log is flushed."""

    def progress(self, now: float) -> list[Reply]:
        """Do what the messages of a turn have made possible and return what to send."""

    def tick(self, now: float) -> list[Reply]:
        """Do what time demands and return what to send."""

    def flush(self) -> None:
        """Make everything handled so far durable."""


def nothing() -> None:
    """Do nothing."""


class AsyncChannel(Protocol):
    """An actor's end."""

    address: str
    remade: Callable[[], None]
    """Called when the connection broke and was made anew: what was on its way may be lost."""

    def send_now(self, frames: Sequence[Buffer]) -> bool:
        """Hand one message over; returns False when the hub takes none now."""

    def receive_now(self) -> list[Buffer] | None:
        """Return the next message, or None when there is none now."""

    async def send(self, frames: Sequence[Buffer]) -> None:
        """Hand one message over; waits while the hub takes none."""

    async def receive(self) -> list[Buffer]:
        """Return the next message."""

    def close(self) -> None:
        """Drop the connection."""


class SyncChannel(Protocol):
    """The learner's end."""

    address: str
    remade: Callable[[], None]
    """Called when the connection broke and was made anew: what was on its way may be lost."""

    def send(self, frames: Sequence[Buffer], timeout_s: float) -> bool:
        """Hand one message over; returns False when the hub took none in time."""

    def receive(self, timeout_s: float) -> list[Buffer] | None:
        """Return the next message, or None when there is none in time."""

    def close(self) -> None:
        """Drop the connection."""
