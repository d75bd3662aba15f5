"""Process groups, as the kernel sees them."""

from __future__ import annotations

import asyncio
import contextlib
import os

import psutil


def alive(group: int) -> bool:
    """Whether a process of the group runs; one that is dead and that nobody has waited for does not."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


async def gone(group: int) -> bool:
    """Whether the group ends within a few seconds."""
    for _ in range(250):
        if not alive(group):
            return True
        await asyncio.sleep(0.02)
    return False
