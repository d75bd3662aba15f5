"""Floor 4. Weights through the folder they were published in, which every worker can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slipstream.inference.vllm.transports.offers import Held, Offer, announcement, verified
from slipstream.types import Version, WeightUpdate
from slipstream.weights.filesystem import FilesystemSubscriber

if TYPE_CHECKING:
    import torch


class FilesystemTransport:
    """The sending end: it only names the folder."""

    name = "filesystem"

    def offer(self, update: WeightUpdate, *, workers: int, held: Held | None = None) -> Offer:
        """Name the folder."""
        return Offer(info=announcement(update) | {"folder": update.folder})


class FilesystemReceiver:
    """A worker's end: it maps the files into its memory."""

    held: Held | None = None

    def take(self, info: Mapping[str, Any], *, worker: int) -> tuple[dict[str, torch.Tensor], int]:
        """Map the tensors; raises CheckpointError when they are missing, damaged or others."""
        checksum = int(info["checksum64"], 16)
        version = Version(serial=info["serial"], incarnation=0, step=0, fork_step=0, checksum64=checksum)
        update = WeightUpdate(version=version, folder=info["folder"], canary_tokens=(), canary_logprobs=())
        tensors = FilesystemSubscriber().fetch(update)
        return tensors, verified(tensors, info, "filesystem")
