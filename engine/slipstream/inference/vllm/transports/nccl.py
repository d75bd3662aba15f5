"""Floor 4. Weights by NCCL: broadcast from a GPU of this process to the workers' GPUs.

Workers take them with this module rather than with vLLM's own engine "nccl": so they compute the same proof
as by every other way, before the model is touched, with vLLM 0.32 and 0.33 alike. All tensors are staged in a
worker's main memory, and only one buffer of 256 MiB on its GPU, which the cache of keys and values fills.

Both ends need a torch built with CUDA, and NCCL of the same major version. NCCL_SOCKET_IFNAME chooses the
network, as anywhere. The communicator is made anew for each update, about a second each time.

What is tested where: the meeting of the ranks, layout, buffers, order, checks and what a worker that stays
away or dies does to the others are broadcast.py, the same code that gloo runs, and tested with it on CPUs.
What this file adds, `_joined` and `_NcclGroup`, needs two GPUs: its test is left out where they are missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from slipstream.deadlines import Deadline
from slipstream.errors import ConfigurationError, InfrastructureError
from slipstream.inference.vllm.transports.broadcast import Carrier, Group, Join, first_line, offered, received
from slipstream.inference.vllm.transports.offers import Held, Offer, announcement, verified
from slipstream.types import WeightUpdate
from slipstream.weights.filesystem import FilesystemSubscriber

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroupNCCL, Store  # type: ignore[attr-defined]

BUFFER_BYTES: Final = 256 << 20
_POLL_S: Final = 0.001
_WATCHDOG: Final = 10
"""Times our deadline: torch's own watchdog would end the whole process, so that ours must be first."""


class NcclTransport:
    """The sending end: this process holds rank 0, with a GPU of its own.

    Example: ``NcclTransport(host="10.0.0.7", device="cuda:0").offer(update, workers=8)``.
    """

    name = "nccl"

    def __init__(self, *, host: str = "127.0.0.1", timeout_s: float = 120.0, device: str = "cuda") -> None:
        """Meet at `host`, an address of this machine that workers reach."""
        self._host, self._timeout_s, self._device = host, timeout_s, device

    def offer(self, update: WeightUpdate, *, workers: int, held: Held | None = None) -> Offer:
        """Listen at once; raises CheckpointError for damaged weights, ConfigurationError without a GPU."""
        _require_cuda()
        tensors = FilesystemSubscriber().fetch(update)
        return offered(
            tensors,
            announcement(update),
            carrier=_carrier(self._device),
            host=self._host,
            workers=workers,
            timeout_s=self._timeout_s,
        )


class NcclReceiver:
    """A worker's end."""

    held: Held | None = None

    def __init__(self, *, device: str) -> None:
        """Receive on a GPU, such as "cuda:3"."""
        self._device = device

    def take(self, info: Mapping[str, Any], *, worker: int) -> tuple[dict[str, torch.Tensor], int]:
        """Take all tensors, and check their sum."""
        _require_cuda()
        tensors = received(info, carrier=_carrier(self._device), worker=worker)
        return tensors, verified(tensors, info, "nccl")


class _NcclGroup:
    def __init__(self, group: ProcessGroupNCCL, device: str, timeout_s: float) -> None:
        self.device = device
        self._group, self._timeout_s = group, timeout_s

    def broadcast(self, buffer: torch.Tensor) -> None:
        deadline = Deadline(self._timeout_s, "nccl", f"a broadcast of {buffer.numel()} bytes")
        try:
            work = self._group.broadcast(buffer, 0)  # type: ignore[attr-defined]
            # It runs on a stream of its own: to wait for it would only make our stream wait.
            while not work.is_completed():
                if deadline.expired():
                    self._group.abort()
                    raise deadline.error()
                time.sleep(_POLL_S)
            work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise InfrastructureError(f"nccl: the broadcast broke: {first_line(error)}") from error

    def close(self) -> None:
        self._group.abort()


def _join(device: str) -> Join:
    def joined(store: Store, *, rank: int, size: int, host: str, timeout_s: float) -> Group:
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=_WATCHDOG * timeout_s)
        try:
            return _NcclGroup(ProcessGroupNCCL(store, rank, size, options), device, timeout_s)
        except RuntimeError as error:
            raise InfrastructureError(f"nccl: rank {rank} of {size}: {first_line(error)}") from error

    return joined


def _carrier(device: str) -> Carrier:
    return Carrier(name="nccl", join=_join(device), buffer_bytes=BUFFER_BYTES)


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ConfigurationError(
            "transport nccl: expected a GPU and a torch built with CUDA, got none; choose gloo"
        )
