"""Floor 1. What a supervised process does for its supervisor."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import time
import weakref
from dataclasses import dataclass

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_KEPT_BYTES = 1 << 30
_GROWTH_BYTES = 16 << 20
_LARGEST_BYTES = 32 << 20
_NEW_CONTAINERS = 10_000


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a process, as the kernel counts them."""

    resident: int
    """In memory: what the process wrote, and what it maps of files."""
    shared: int
    """The part of `resident` that belongs to files."""
    data: int
    """What it may write, whether it ever did or not: the sum that RLIMIT_DATA bounds."""


class MemoryGauge:
    """This process's memory; a look at it is one system call.

    Example: ``gauge = MemoryGauge(); gauge.read().resident``.
    """

    def __init__(self) -> None:
        """Open the kernel's account of this process."""
        self._file = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._page = os.sysconf("SC_PAGE_SIZE")

    def read(self) -> Memory:
        """Return what there is now."""
        _, resident, shared, _, _, data, _ = map(int, os.pread(self._file, 128, 0).split())
        return Memory(resident * self._page, shared * self._page, data * self._page)


def guard_parent(parent: int, *, every_s: float = 0.5) -> None:
    """Make this process end when the process `parent`, which started it, has ended.

    The kernel kills it at once where it can (Linux); a watching thread does so everywhere. No
    clean-up runs: everything that must last is already on disk.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent, every_s), daemon=True, name="guard-parent").start()


def keep_freed_memory() -> None:
    """Let the allocator of glibc reuse what is freed instead of giving it back to the system.

    A process that takes message after message would otherwise pay a page fault for each 4 KiB of each
    large one: half of its time at 1 MB. Call it before any thread is started; elsewhere it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # One arena: what the I/O thread allocates the main thread frees.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TOP_PAD, _GROWTH_BYTES)


def collect_garbage_seldom() -> None:
    """Let Python's search for cycles of garbage skip what there is now, and run less often.

    Reference counts free nearly everything, and modules' objects would be looked at again and again, by a
    process that keeps a few objects for each of many messages.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_CONTAINERS)


def _watch(parent: int, every_s: float) -> None:
    # Read at once: the parent may have died before the kernel was asked.
    while os.getppid() == parent:
        time.sleep(every_s)
    os.kill(os.getpid(), signal.SIGKILL)
