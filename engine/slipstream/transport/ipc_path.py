"""Floor 4. Who holds a Unix socket's path: libzmq lets a second bind steal it without a word."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import Final

from slipstream.errors import AddressError

_SCHEME: Final = "ipc://"


class PathLease:
    """Holds the path of an `ipc://` address until released, or until the process ends in any way.

    Addresses of other sorts, and `ipc://*`, which takes a fresh folder, need none.
    """

    def __init__(self, address: str) -> None:
        """Make the socket's folder, for this user alone, and lock the path; raises AddressError."""
        self._descriptor = -1
        path = address.removeprefix(_SCHEME)
        if path in (address, "*") or path.startswith("@"):
            return
        file = Path(path).absolute()
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_private(file.parent)
            self._descriptor = os.open(f"{file}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise AddressError(f"hub.address: cannot use {address} ({error.strerror})") from error
        self._lock(address)

    def release(self) -> None:
        """Let others bind the path."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _lock(self, address: str) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            self.release()
            raise AddressError(
                f"hub.address: {address} is in use by process {holder}; stop it, or set another address"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    @staticmethod
    def _check_private(folder: Path) -> None:
        state = folder.stat()
        if state.st_uid != os.getuid() or stat.S_IMODE(state.st_mode) & 0o077:
            raise AddressError(
                f"hub.address: {folder} must belong to this user alone (chmod 700): whoever may enter it can "
                f"reach or replace the hub's socket; give ipc:// a folder of its own"
            )
