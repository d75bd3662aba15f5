"""Floor 1. What a supervised process does for its supervisor."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

_PR_SET_PDEATHSIG = 1


def guard_parent(parent: int, *, every_s: float = 0.5) -> None:
    """Make this process end when the process `parent`, which started it, has ended.

    The kernel kills it at once where it can (Linux); a watching thread does so everywhere. No
    clean-up runs: everything that must last is already on disk.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent, every_s), daemon=True, name="guard-parent").start()


def _watch(parent: int, every_s: float) -> None:
    # Read at once: the parent may have died before the kernel was asked.
    while os.getppid() == parent:
        time.sleep(every_s)
    os.kill(os.getpid(), signal.SIGKILL)
