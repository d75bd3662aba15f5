"""Floor 4. How published weights reach a server's workers: both ends of each way. Workers import it, too.

    filesystem   the learner's folder, mapped into memory by each worker
    gloo         broadcast from this process, which holds rank 0, to all workers over TCP
    delta        by gloo, but only what changed since the weights that the workers hold
    nccl         broadcast from a GPU of this process to those of the workers

An offer is made for one update and answered in full or not at all: a group is built anew for each, so that
nothing is left of one that failed. Whatever the way, workers compute the checksum of all tensors, as they
are about to be loaded, before anything is.
"""

from __future__ import annotations

from slipstream.errors import ConfigurationError
from slipstream.inference.vllm.transports.delta import DeltaReceiver, DeltaTransport
from slipstream.inference.vllm.transports.filesystem import FilesystemReceiver, FilesystemTransport
from slipstream.inference.vllm.transports.gloo import GlooReceiver, GlooTransport
from slipstream.inference.vllm.transports.nccl import NcclReceiver, NcclTransport
from slipstream.inference.vllm.transports.offers import Held, Offer, WeightReceiver, WeightTransport

__all__ = [
    "DeltaReceiver",
    "DeltaTransport",
    "FilesystemReceiver",
    "FilesystemTransport",
    "GlooReceiver",
    "GlooTransport",
    "Held",
    "NcclReceiver",
    "NcclTransport",
    "Offer",
    "WeightReceiver",
    "WeightTransport",
    "receiver_of",
    "transport_of",
]

NAMES = ("filesystem", "gloo", "delta", "nccl")


def transport_of(
    name: str, *, host: str = "127.0.0.1", timeout_s: float = 120.0, device: str = "cuda"
) -> WeightTransport:
    """Return the sending end of a way.

    host: address of this machine that workers reach; timeout_s: longest wait for one of the steps of a
    broadcast; device: the GPU that sends by nccl. Raises ConfigurationError for another name.

    Example: ``transport_of("gloo", host="10.0.0.7")``.
    """
    match name:
        case "filesystem":
            return FilesystemTransport()
        case "gloo":
            return GlooTransport(host=host, timeout_s=timeout_s)
        case "delta":
            return DeltaTransport(host=host, timeout_s=timeout_s)
        case "nccl":
            return NcclTransport(host=host, timeout_s=timeout_s, device=device)
    raise _unknown(name)


def receiver_of(name: str, *, device: str = "cuda") -> WeightReceiver:
    """Return a worker's end of a way; `device` is its GPU, for nccl. Raises ConfigurationError."""
    match name:
        case "filesystem":
            return FilesystemReceiver()
        case "gloo":
            return GlooReceiver()
        case "delta":
            return DeltaReceiver()
        case "nccl":
            return NcclReceiver(device=device)
    raise _unknown(name)


def _unknown(name: str) -> ConfigurationError:
    return ConfigurationError(f'transport: expected {", ".join(NAMES)}, got "{name}"')
