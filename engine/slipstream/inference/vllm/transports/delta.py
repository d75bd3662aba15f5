"""Floor 4. Weights by what changed in them since the weights that the workers hold, bit by bit.

A step of an optimizer changes a few per cent of bfloat16 weights, of float32 ones nearly all: then, or when
the workers hold nothing that this process knows, an offer is the whole weights. Either goes by gloo; between
processes of one machine that can all read the learner's folder, "filesystem" moves no bytes at all.

Four checks stand between a delta and the model, each a CheckpointError that leaves the model as it was:
the serial and checksum of what the worker holds, then for each tensor that of its base, of the delta's own
bytes and of its result, then that of all tensors together. Behind any of them the worker holds nothing, so
that the next offer is whole.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from slipstream.errors import CheckpointError
from slipstream.inference.vllm.transports.broadcast import received
from slipstream.inference.vllm.transports.gloo import GLOO, GlooTransport
from slipstream.inference.vllm.transports.offers import Held, Offer, announcement, hexadecimal, verified
from slipstream.types import WeightUpdate
from slipstream.weights.filesystem import FilesystemSubscriber
from slipstream_kernels import DeltaError

if TYPE_CHECKING:
    import torch

KEPT: Final = 4
"""Publications that stay mapped, as bases of later ones; their files keep their disk space meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What turns one publication into another."""

    base: Held
    deltas: dict[str, torch.Tensor]
    """[B] uint8 for each tensor that changed (slipstream_kernels.weight_delta)."""


class DeltaTransport:
    """The sending end.

    Example: ``DeltaTransport().offer(update, workers=1, held=Held(serial=6, checksum64=...))``.
    """

    name = "delta"

    def __init__(self, *, host: str = "127.0.0.1", timeout_s: float = 120.0) -> None:
        """Listen on `host`, an address of this machine that workers reach."""
        self._carrier = GlooTransport(host=host, timeout_s=timeout_s)
        self._lock = threading.Lock()
        self._known: dict[Held, dict[str, torch.Tensor]] = {}
        self._made: tuple[Held, Changes] | None = None

    def offer(self, update: WeightUpdate, *, workers: int, held: Held | None = None) -> Offer:
        """Listen at once; raises CheckpointError when the published weights are damaged."""
        version = update.version
        new = Held(serial=version.serial, checksum64=version.checksum64)
        # Several servers that hold the same ask for the same changes.
        with self._lock:
            tensors = self._tensors_of(update, new)
            changes = self._changes(held, new)
        if changes is None or _size(changes.deltas) >= _size(tensors):
            return self._carrier.offer_tensors(tensors, announcement(update), workers=workers)
        base = {"serial": changes.base.serial, "checksum64": hexadecimal(changes.base.checksum64)}
        info = announcement(update) | {"base": base}
        return self._carrier.offer_tensors(changes.deltas, info, workers=workers)

    def _tensors_of(self, update: WeightUpdate, new: Held) -> dict[str, torch.Tensor]:
        """Map the weights of an update, and keep them as the newest."""
        tensors = self._known.pop(new, None) or FilesystemSubscriber().fetch(update)
        self._known[new] = tensors
        while len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return tensors

    def _changes(self, held: Held | None, new: Held) -> Changes | None:
        """Return what turns `held` into `new`, or None when only the whole weights will do."""
        if self._made is not None and (self._made[1].base, self._made[0]) == (held, new):
            return self._made[1]
        if held is None or held not in self._known:
            return None
        before, after = self._known[held], self._known[new]
        if {name: (t.dtype, t.shape) for name, t in before.items()} != {
            name: (t.dtype, t.shape) for name, t in after.items()
        }:
            return None
        changes = encoded(before, after, base=held)
        self._made = new, changes
        return changes


class DeltaReceiver:
    """A worker's end; keeps a copy of all weights, as they were published, in main memory.

    While changes are applied it holds, beside that copy, their bytes and one more tensor in each thread.
    """

    held: Held | None = None

    def __init__(self) -> None:
        """Hold nothing."""
        self._tensors: dict[str, torch.Tensor] = {}

    def take(self, info: Mapping[str, Any], *, worker: int) -> tuple[dict[str, torch.Tensor], int]:
        """Take the whole weights, or apply changes to those held; check the sum of all, and hold them."""
        held, tensors = self.held, self._tensors
        self.held, self._tensors = None, {}
        if "base" in info:
            _refuse_other_base(info["base"], held)
            apply(tensors, received(info, carrier=GLOO, worker=worker))
        else:
            tensors.clear()
            tensors = received(info, carrier=GLOO, worker=worker)
        checksum = verified(tensors, info, "delta")
        self.held = Held(serial=info["serial"], checksum64=checksum)
        self._tensors = dict(tensors)
        return tensors, checksum


def encoded(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], *, base: Held) -> Changes:
    """Return what turns `before`, the tensors of `base`, into `after`: the same names, dtypes and shapes."""
    from slipstream_kernels import Delta, delta_encode

    def one(name: str) -> Delta:
        return delta_encode(_words(before[name]), _words(after[name]), threads=1)

    with _threads() as pool:
        made = dict(zip(after, pool.map(one, after), strict=True))
    return Changes(base=base, deltas={name: delta.data for name, delta in made.items() if delta.changed})


def apply(tensors: dict[str, torch.Tensor], deltas: Mapping[str, torch.Tensor]) -> None:
    """Replace the tensors that changed; raises CheckpointError for an odd one, when some are replaced."""
    from slipstream_kernels import Delta, delta_apply

    def one(name: str) -> None:
        base = tensors.get(name)
        if base is None:
            raise CheckpointError(f"weights by delta: {name}: expected one of the tensors held, got another")
        try:
            result = delta_apply(_words(base), Delta.of(deltas[name]), threads=1)
        except DeltaError as error:
            raise CheckpointError(f"weights by delta: {name}: {error}") from error
        tensors[name] = result.view(base.dtype).reshape(base.shape)

    with _threads() as pool:
        for _ in pool.map(one, deltas):
            pass


def _size(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _threads() -> ThreadPoolExecutor:
    """Return threads for tensors: several in one tensor would wait for one another on a busy machine."""
    import torch

    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="delta")


def _refuse_other_base(base: Mapping[str, Any], held: Held | None) -> None:
    wanted = Held(serial=base["serial"], checksum64=int(base["checksum64"], 16))
    if held != wanted:
        got = "nothing" if held is None else f"serial {held.serial} ({hexadecimal(held.checksum64)})"
        raise CheckpointError(
            f"weights by delta: expected a worker that holds serial {wanted.serial} "
            f"({base['checksum64']}), this one holds {got}"
        )


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's memory as [N] of 2 bytes each, as deltas are made of, whatever its type."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.int16)
