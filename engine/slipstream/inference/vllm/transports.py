"""Floor 4. How published weights reach a server's workers: both ends of each way. Workers import it, too.

    filesystem   the learner's folder, mapped into memory by each worker
    gloo         broadcast from this process, which holds rank 0, to all workers over TCP

An offer is made for one update and answered in full or not at all: a gloo group is built anew for each, so
that nothing is left of one that failed. Workers check the sum of all bytes before anything is loaded.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol

from slipstream.errors import CheckpointError, ConfigurationError, InfrastructureError
from slipstream.types import Version, WeightUpdate
from slipstream.weights.filesystem import FilesystemSubscriber
from slipstream_kernels import checksum64_named

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

DTYPES: Final = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One update as a transport offers it."""

    info: dict[str, Any]
    """What workers need to take it, as JSON."""
    send: Callable[[], None] | None = None
    """Gives the tensors to all workers while they take them; blocks, at most for the transport's time."""


class WeightTransport(Protocol):
    """The sending end."""

    name: str

    def offer(self, update: WeightUpdate, *, workers: int) -> Offer:
        """Offer an update to so many workers."""


class FilesystemTransport:
    """Weights through the folder they were published in."""

    name = "filesystem"

    def offer(self, update: WeightUpdate, *, workers: int) -> Offer:
        """Name the folder; every worker must be able to read it."""
        return Offer(info=_announcement(update) | {"folder": update.folder})


class GlooTransport:
    """Weights by broadcast.

    Example: ``GlooTransport(host="127.0.0.1").offer(update, workers=1).send()`` in a thread of its own.
    """

    name = "gloo"

    def __init__(self, *, host: str = "127.0.0.1", timeout_s: float = 120.0) -> None:
        """Listen on `host`, an address of this machine that workers reach."""
        self._host, self._timeout_s = host, timeout_s
        self._subscriber = FilesystemSubscriber()

    def offer(self, update: WeightUpdate, *, workers: int) -> Offer:
        """Listen at once; raises CheckpointError when the published weights are damaged."""
        import torch
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        tensors = self._subscriber.fetch(update)
        # A socket of our own, because the store's would listen on all interfaces.
        listener = socket.create_server((self._host, 0))
        port = listener.getsockname()[1]
        size = workers + 1
        store = TCPStore(
            self._host,
            port,
            size,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._timeout_s),
            master_listen_fd=listener.detach(),
        )
        layout = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
        group = {"host": self._host, "port": port, "size": size, "layout": layout}

        def send() -> None:
            with torch.no_grad():
                group = _joined(store, rank=0, size=size, host=self._host, timeout_s=self._timeout_s)
                for tensor in tensors.values():
                    _broadcast(group, tensor.contiguous(), timedelta(seconds=self._timeout_s))

        return Offer(info=_announcement(update) | group | {"timeout_s": self._timeout_s}, send=send)


def transport_of(name: str) -> WeightTransport:
    """Return a transport by its name in the configuration."""
    return GlooTransport() if name == "gloo" else FilesystemTransport()


def receive(transport: str, info: Mapping[str, Any], *, worker: int) -> tuple[dict[str, torch.Tensor], int]:
    """Take an offer in worker number `worker`; return the tensors and their checksum64, as received.

    Raises CheckpointError when they are not those announced, InfrastructureError when they do not come.
    """
    match transport:
        case "filesystem":
            tensors = FilesystemSubscriber().fetch(_announced(info))
        case "gloo":
            tensors = _received(info, rank=worker + 1)
        case _:
            raise ConfigurationError(f'transport: expected "filesystem" or "gloo", got "{transport}"')
    checksum, expected = checksum64_named(tensors), int(info["checksum64"], 16)
    if checksum != expected:
        raise CheckpointError(
            f"weights by {transport}: expected checksum64 {expected:#018x} for serial {info['serial']}, "
            f"got {checksum:#018x}"
        )
    return tensors, checksum


def _announcement(update: WeightUpdate) -> dict[str, Any]:
    # As text: JSON's numbers end at 53 bits in many a reader.
    return {"serial": update.version.serial, "checksum64": f"{update.version.checksum64:016x}"}


def _announced(info: Mapping[str, Any]) -> WeightUpdate:
    version = Version(
        serial=info["serial"], incarnation=0, step=0, fork_step=0, checksum64=int(info["checksum64"], 16)
    )
    return WeightUpdate(version=version, folder=info["folder"], canary_tokens=(), canary_logprobs=())


def _received(info: Mapping[str, Any], *, rank: int) -> dict[str, torch.Tensor]:
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port, size, timeout_s = info["host"], info["port"], info["size"], info["timeout_s"]
    for _, dtype, _ in info["layout"]:
        if dtype not in DTYPES:
            raise CheckpointError(f"weights by gloo: expected dtype {', '.join(DTYPES)}, got {dtype!r}")
    tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in info["layout"]}
    try:
        store = TCPStore(
            host, port, size, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
    except RuntimeError as error:
        raise InfrastructureError(f"gloo: nobody at {host}:{port}: {_first_line(error)}") from error
    group = _joined(store, rank=rank, size=size, host=_own_address(host, port), timeout_s=timeout_s)
    for tensor in tensors.values():
        _broadcast(group, tensor, timedelta(seconds=timeout_s))
    return tensors


def _joined(store: Store, *, rank: int, size: int, host: str, timeout_s: float) -> ProcessGroupGloo:
    """Return the group once all are in it; raises InfrastructureError when somebody stays away."""
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # The default device is that of the machine's name, which may resolve to one that nobody reaches.
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_s)
    try:
        return ProcessGroupGloo(store, rank, size, options)
    except RuntimeError as error:
        raise InfrastructureError(
            f"gloo: rank {rank} of {size} waits in vain: {_first_line(error)}"
        ) from error


def _broadcast(group: ProcessGroupGloo, tensor: torch.Tensor, timeout: timedelta) -> None:
    try:
        group.broadcast(tensor, 0).wait(timeout)  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise InfrastructureError(f"gloo: the broadcast broke: {_first_line(error)}") from error


def _own_address(host: str, port: int) -> str:
    """Return this machine's address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0]
