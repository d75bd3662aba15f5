"""Floor 4. Which calls of a shared cache are being made just now, and by which process.

A claim is a lock on one byte of a file beside the cache, at an offset drawn from the call's key. It belongs
to the open file (`F_OFD_SETLK`, fcntl(2)): the kernel lets it go with the process that holds it, however that
ends, and nothing of it is ever written. Two keys of one offset wait for each other without need, no more.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from pathlib import Path
from typing import Final

_FLOCK: Final = "hhqqi4x"
"""`struct flock`: type, whence, start, length, process (0 for locks of an open file)."""

log = logging.getLogger(__name__)


class Claims:
    """The claims of one process.

    Example: ``claims.take(key)`` is false while another process works on it.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file; where that or locking fails every claim is granted."""
        self._file: int | None = None
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            self._failed(error)

    def take(self, key: bytes) -> bool:
        """Claim a call, unless another process has; whoever has taken it drops it."""
        return self._set(fcntl.F_WRLCK, key)

    def drop(self, key: bytes) -> None:
        """Let the next process have it."""
        self._set(fcntl.F_UNLCK, key)

    def close(self) -> None:
        """Drop all claims."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _set(self, kind: int, key: bytes) -> bool:
        if self._file is None:
            return True
        # Offsets are signed, and a byte more must still be one.
        offset = int.from_bytes(key[:8], "big") >> 2
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, offset, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            self._failed(error)
        return True

    def _failed(self, error: OSError) -> None:
        log.warning("tool cache: processes may make equal calls at one time: claims fail: %s", error)
        self.close()
