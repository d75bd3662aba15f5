"""Floor 4. Weights by gloo: broadcast over TCP, from memory to memory."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from slipstream.errors import InfrastructureError
from slipstream.inference.vllm.transports.broadcast import Carrier, Group, first_line, offered, received
from slipstream.inference.vllm.transports.offers import Held, Offer, announcement, verified
from slipstream.types import WeightUpdate
from slipstream.weights.filesystem import FilesystemSubscriber

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]


class GlooTransport:
    """The sending end: this process holds rank 0.

    Example: ``GlooTransport(host="127.0.0.1").offer(update, workers=1).send()`` in a thread of its own.
    """

    name = "gloo"

    def __init__(self, *, host: str = "127.0.0.1", timeout_s: float = 120.0) -> None:
        """Listen on `host`, an address of this machine that workers reach."""
        self._host, self._timeout_s = host, timeout_s

    def offer(self, update: WeightUpdate, *, workers: int, held: Held | None = None) -> Offer:
        """Listen at once; raises CheckpointError when the published weights are damaged."""
        return self.offer_tensors(FilesystemSubscriber().fetch(update), announcement(update), workers=workers)

    def offer_tensors(
        self, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any], *, workers: int
    ) -> Offer:
        """Offer any tensors, with `info` for those who take them."""
        return offered(
            tensors, info, carrier=GLOO, host=self._host, workers=workers, timeout_s=self._timeout_s
        )


class GlooReceiver:
    """A worker's end."""

    held: Held | None = None

    def take(self, info: Mapping[str, Any], *, worker: int) -> tuple[dict[str, torch.Tensor], int]:
        """Take all tensors, and check their sum."""
        tensors = received(info, carrier=GLOO, worker=worker)
        return tensors, verified(tensors, info, "gloo")


class _GlooGroup:
    device = "cpu"

    def __init__(self, group: ProcessGroupGloo, timeout_s: float) -> None:
        self._group, self._timeout = group, timedelta(seconds=timeout_s)

    def broadcast(self, buffer: torch.Tensor) -> None:
        try:
            self._group.broadcast(buffer, 0).wait(self._timeout)  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise InfrastructureError(f"gloo: the broadcast broke: {first_line(error)}") from error

    def close(self) -> None:
        """Leave its connections to their owner's end."""


def _joined(store: Store, *, rank: int, size: int, host: str, timeout_s: float) -> Group:
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # The default device is that of the machine's name, which may resolve to one that nobody reaches.
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_s)
    try:
        return _GlooGroup(ProcessGroupGloo(store, rank, size, options), timeout_s)
    except RuntimeError as error:
        raise InfrastructureError(
            f"gloo: rank {rank} of {size} waits in vain: {first_line(error)}"
        ) from error


GLOO = Carrier(name="gloo", join=_joined, buffer_bytes=16 << 20)
