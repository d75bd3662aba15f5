"""Floor 4. Tensors by broadcast from rank 0: where the ranks meet, in which order the bytes go, who waits.

Gloo and NCCL differ only in how a group is made of the ranks that have met (`Join`). Tensors go as one
stream of bytes, in the order of the layout, cut into buffers wherever one is full: a device holds one
buffer beside the model, and hundreds of small tensors cost a few collectives.

    wait                              ends by
    a worker for the sender           connection, `timeout_s`
    each rank for all others          a key of each in the sender's store, `timeout_s`; the sender: `withdraw`
    each broadcast                    the group's own deadline of `timeout_s`, or a rank's end
    the sender for all to be done     a key of each worker, `timeout_s`, `withdraw`
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from slipstream.deadlines import Deadline
from slipstream.errors import CheckpointError, InfrastructureError
from slipstream.inference.vllm.transports.offers import Offer

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

DTYPES: Final = ("float64", "float32", "bfloat16", "float16", "uint8")
_POLL_S: Final = 0.002


class Group(Protocol):
    """Ranks that have met."""

    device: str
    """Where the buffers that it sends must lie."""

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Give [B] uint8 of rank 0 to all; raises InfrastructureError or DeadlineError."""

    def close(self) -> None:
        """Free what it holds."""


class Join(Protocol):
    """Makes a group of the ranks that have met in a store."""

    def __call__(self, store: Store, *, rank: int, size: int, host: str, timeout_s: float) -> Group:
        """Return the group; `host` is this rank's own address. Raises InfrastructureError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Carrier:
    """A way of bytes: how groups are made, and how large their buffers are."""

    name: str
    join: Join
    buffer_bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `start` .. `stop` - 1 of one tensor, which begin at `at` in a buffer."""

    tensor: int
    start: int
    stop: int
    at: int


def offered(
    tensors: Mapping[str, torch.Tensor],
    info: Mapping[str, Any],
    *,
    carrier: Carrier,
    host: str,
    workers: int,
    timeout_s: float,
) -> Offer:
    """Listen for workers at `host` at once, and return the offer of these tensors, with `info` in it."""
    store, port = _listening(host, workers + 1, timeout_s)
    layout = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
    meeting = {"host": host, "port": port, "size": workers + 1, "timeout_s": timeout_s, "layout": layout}

    withdrawn = threading.Event()

    def send() -> None:
        _wait_for_workers(carrier, store, "here", meeting, withdrawn)
        group = carrier.join(store, rank=0, size=workers + 1, host=host, timeout_s=timeout_s)
        try:
            _send(group, [_bytes_of(tensor) for tensor in tensors.values()], carrier.buffer_bytes)
            # They may still read what this rank holds ready for them.
            _wait_for_workers(carrier, store, "done", meeting, withdrawn)
        finally:
            group.close()

    info = {**info, **meeting, "buffer_bytes": carrier.buffer_bytes}
    return Offer(info=info, send=send, withdraw=withdrawn.set)


def received(info: Mapping[str, Any], *, carrier: Carrier, worker: int) -> dict[str, torch.Tensor]:
    """Take part in the broadcast of an offer as worker number `worker`; return its tensors, on the CPU."""
    import torch

    for name, dtype, _ in info["layout"]:
        if dtype not in DTYPES:
            raise CheckpointError(f"{carrier.name}: {name}: expected {', '.join(DTYPES)}, got {dtype!r}")
    tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in info["layout"]}
    rank, host = worker + 1, info["host"]
    store = _connected(carrier.name, info)
    try:
        store.set(f"here/{rank}", "")
        everybody = [f"here/{other}" for other in range(info["size"])]
        store.wait(everybody, timedelta(seconds=info["timeout_s"]))
        own = _own_address(host, info["port"])
        group = carrier.join(store, rank=rank, size=info["size"], host=own, timeout_s=info["timeout_s"])
        try:
            _receive(group, [_bytes_of(tensor) for tensor in tensors.values()], info["buffer_bytes"])
            store.set(f"done/{rank}", "")
        finally:
            group.close()
    except RuntimeError as error:
        raise InfrastructureError(
            f"{carrier.name}: rank {rank} of {info['size']}: {first_line(error)}"
        ) from error
    return tensors


def cuts(sizes: Sequence[int], buffer_bytes: int) -> Iterator[list[Piece]]:
    """Cut a stream of tensors of so many bytes each into full buffers, and a last one that may not be.

    Example: ``list(cuts([3, 5], 4))`` is ``[[Piece(0, 0, 3, 0), Piece(1, 0, 1, 3)], [Piece(1, 1, 5, 0)]]``.
    """
    pieces: list[Piece] = []
    at = 0
    for tensor, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + buffer_bytes - at)
            pieces.append(Piece(tensor, start, stop, at))
            at += stop - start
            start = stop
            if at == buffer_bytes:
                yield pieces
                pieces, at = [], 0
    if pieces:
        yield pieces


def _send(group: Group, sources: Sequence[torch.Tensor], buffer_bytes: int) -> None:
    for pieces, buffer in _buffers(group, sources, buffer_bytes):
        for piece in pieces:
            end = piece.at + piece.stop - piece.start
            _copy(buffer[piece.at : end], sources[piece.tensor][piece.start : piece.stop])
        group.broadcast(buffer)


def _receive(group: Group, targets: Sequence[torch.Tensor], buffer_bytes: int) -> None:
    for pieces, buffer in _buffers(group, targets, buffer_bytes):
        group.broadcast(buffer)
        for piece in pieces:
            end = piece.at + piece.stop - piece.start
            _copy(targets[piece.tensor][piece.start : piece.stop], buffer[piece.at : end])


def _buffers(
    group: Group, tensors: Sequence[torch.Tensor], buffer_bytes: int
) -> Iterator[tuple[list[Piece], torch.Tensor]]:
    """Yield the pieces of each buffer, and the buffer, of their size: the same memory each time."""
    import torch

    sizes = [tensor.numel() for tensor in tensors]
    memory = torch.empty(min(buffer_bytes, sum(sizes)), dtype=torch.uint8, device=group.device)
    for pieces in cuts(sizes, buffer_bytes):
        last = pieces[-1]
        yield pieces, memory[: last.at + last.stop - last.start]


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    if target.is_cpu and source.is_cpu:
        # PyTorch would use several threads, which wait for one another on a busy machine.
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)


def _listening(host: str, size: int, timeout_s: float) -> tuple[TCPStore, int]:
    """Return the store in which the ranks meet, and its port."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # A socket of our own, because the store's would listen on all interfaces.
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        size,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    return store, port


def _connected(name: str, info: Mapping[str, Any]) -> TCPStore:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = info["host"], info["port"]
    timeout = timedelta(seconds=info["timeout_s"])
    try:
        return TCPStore(host, port, info["size"], is_master=False, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise InfrastructureError(f"{name}: nobody at {host}:{port}: {first_line(error)}") from error


def _wait_for_workers(
    carrier: Carrier, store: Store, stage: str, meeting: Mapping[str, Any], withdrawn: threading.Event
) -> None:
    """Have rank 0 wait until all workers are at a stage: NCCL itself would wait for them without end."""
    store.set(f"{stage}/0", "")
    workers = [f"{stage}/{rank}" for rank in range(1, meeting["size"])]
    address = f"{meeting['host']}:{meeting['port']}"
    deadline = Deadline(meeting["timeout_s"], carrier.name, f"{len(workers)} workers at {address}: {stage}")
    while not store.check(workers):
        if withdrawn.wait(_POLL_S):
            raise InfrastructureError(f"{carrier.name}: the offer at {address} was withdrawn")
        deadline.check()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's memory as [B] uint8."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _own_address(host: str, port: int) -> str:
    """Return this machine's address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def first_line(error: RuntimeError) -> str:
    """Return what an error of torch says before its stack."""
    return str(error).splitlines()[0]
