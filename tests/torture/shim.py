"""The shim in C (shim.c): built once, loaded into the processes of the rig, spoken to with ctypes.

shim.prepare()                        in whoever starts a process: the environment that loads it
shim.arm(folder, when=3, what="torn")  in the process itself: at the third call that changes `folder`
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).with_name("shim.c")
WHAT: Final = {
    "count": 0,
    "kill_before": 1,
    "kill_after": 2,
    "torn": 3,
    "fail": 4,
    "fail_ever": 5,
    "short": 6,
}
"""What happens at the chosen call; a torn or shortened write is written by half."""
WRITE, SYNC, NAME, SIZE = 1, 2, 4, 8
EVERY: Final = WRITE | SYNC | NAME | SIZE
"""Kinds of calls: writes; fsync and fdatasync; open, rename, link, unlink, mkdir, rmdir; truncate."""
NEVER: Final = 1 << 40


class MissingShimError(Exception):
    """The shim cannot be built here."""


def prepare() -> dict[str, str]:
    """Build the shim where that is not done yet and return the environment that loads it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path("/proc/self/fd").exists():
        raise MissingShimError("no C compiler, or no Linux")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"slipstream-torture-{os.getuid()}-{digest}.so"
    if not built.exists():
        fresh = built.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O1", "-fPIC", "-shared", "-o", str(fresh), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        if done.returncode:
            raise MissingShimError(f"the shim does not compile: {done.stderr[-500:]}")
        fresh.replace(built)
    return {"LD_PRELOAD": str(built)}


def load_into_this_program() -> None:
    """Start this program again under the shim, where it can be built."""
    if loaded() or "SLIPSTREAM_UNDER_SHIM" in os.environ:
        return
    try:
        environment = prepare()
    except MissingShimError as error:
        sys.stderr.write(f"without the shim: {error}\n")
        return
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(command[0], command, {**os.environ, **environment, "SLIPSTREAM_UNDER_SHIM": "1"})


def loaded() -> bool:
    """Return whether this process runs under the shim."""
    return hasattr(ctypes.CDLL(None), "torture_arm")


def arm(
    folder: Path, *, when: int = NEVER, what: str = "count", error: int = errno.EIO, kinds: int = EVERY
) -> None:
    """Start counting the calls that change `folder`; at number `when`, from 1, something happens."""
    ctypes.CDLL(None).torture_arm(
        os.fsencode(folder), ctypes.c_long(when), WHAT[what], ctypes.c_int(error), ctypes.c_int(kinds)
    )


def calls() -> int:
    """Return the calls since `arm`."""
    count = ctypes.CDLL(None).torture_calls
    count.restype = ctypes.c_long
    return int(count())


def trace(file: int) -> None:
    """Record every call under the armed folder into an open file (power.py reads it)."""
    ctypes.CDLL(None).torture_trace(file)


def mark(number: int) -> None:
    """Put a number into the record."""
    ctypes.CDLL(None).torture_mark(ctypes.c_long(number))
