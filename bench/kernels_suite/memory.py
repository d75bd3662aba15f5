"""Peak memory of one call beyond what was held before it, and a limit that turns too much into an error."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

STATUS: Final = Path("/proc/self/status")
CLEAR: Final = Path("/proc/self/clear_refs")
RESET_PEAK: Final = "5"
MEMORY: Final = Path("/proc/meminfo")
KEEP_FREE: Final = 0.05


def peak_extra_bytes(call: Callable[[], object], device: str) -> int | None:
    """Run `call` once; return how far memory rose, its results included; None where it cannot be measured.

    On a GPU: torch's allocator. On a CPU: the process's resident memory, whoever allocates, from the high
    water that Linux keeps and lets us reset.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not (trimmed() and reset_peak()):
        call()
        return None
    before = status_bytes("VmRSS")
    call()
    return max(0, status_bytes("VmHWM") - before)


def limit_to_free_memory() -> None:
    """Let an allocation beyond the free memory fail in this process, instead of being killed for it later."""
    if not MEMORY.exists() or not STATUS.exists():
        return
    lines = (line.split() for line in MEMORY.read_text().splitlines())
    free = next((int(words[1]) << 10 for words in lines if words[0] == "MemAvailable:"), None)
    if free is not None:
        most = status_bytes("VmData") + int(free * (1 - KEEP_FREE))
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def trimmed() -> bool:
    """Hand freed memory back to the system, so that using it again counts; False where it cannot be."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return trim is not None


def reset_peak() -> bool:
    """Set the process's high water to what it holds; False where the system has no such switch."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return STATUS.exists()


def status_bytes(name: str) -> int:
    """Return a figure of /proc/self/status."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise KeyError(name)
