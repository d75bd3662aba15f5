"""Floor 4. What both ends of every way of weights agree on: an offer, who makes it and who takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from slipstream.errors import CheckpointError
from slipstream.types import WeightUpdate
from slipstream_kernels import checksum64_named

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One update as a transport offers it."""

    info: dict[str, Any]
    """What workers need to take it, as JSON."""
    send: Callable[[], None] | None = None
    """Gives the tensors to all workers while they take them; blocks, at most for the transport's time."""
    withdraw: Callable[[], None] | None = None
    """Has `send`, in another thread, stop waiting for workers that will not come any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Weights of which workers hold all tensors in their memory, as they were published."""

    serial: int
    checksum64: int


class WeightTransport(Protocol):
    """The sending end; may serve several servers, from several threads."""

    name: str

    def offer(self, update: WeightUpdate, *, workers: int, held: Held | None = None) -> Offer:
        """Offer an update to so many workers, all of which hold `held`, or None: then it comes whole.

        Raises CheckpointError when the published weights are damaged.
        """


class WeightReceiver(Protocol):
    """A worker's end."""

    held: Held | None
    """What it keeps for the next offer, or None."""

    def take(self, info: Mapping[str, Any], *, worker: int) -> tuple[dict[str, torch.Tensor], int]:
        """Take an offer in worker number `worker`; return the tensors and their checksum64, as received.

        Raises CheckpointError when they are not those announced, InfrastructureError or DeadlineError when
        they do not come.
        """


def announcement(update: WeightUpdate) -> dict[str, Any]:
    """Return the part of an offer that says which weights it is of."""
    return {"serial": update.version.serial, "checksum64": hexadecimal(update.version.checksum64)}


def hexadecimal(checksum: int) -> str:
    """Return a checksum as text: JSON's numbers end at 53 bits in many a reader."""
    return f"{checksum:016x}"


def verified(tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any], way: str) -> int:
    """Return the checksum64 of all tensors; raises CheckpointError unless it is the announced one."""
    checksum, expected = checksum64_named(tensors), int(info["checksum64"], 16)
    if checksum != expected:
        raise CheckpointError(
            f"weights by {way}: expected checksum64 {expected:#018x} for serial {info['serial']}, "
            f"got {checksum:#018x}"
        )
    return checksum
