"""Where it ran: processor, libraries, commit; and the class of machine that baselines belong to."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

ROOT: Final = Path(__file__).resolve().parents[2]
CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")
ASSUMED_CACHE_BYTES: Final = 32 << 20
UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
PACKAGES: Final = (
    "torch", "triton", "numpy", "liger_kernel", "cut-cross-entropy", "torchrl", "quack-kernels",
)  # fmt: skip


def environment(device: str) -> dict[str, Any]:
    """Return what a stranger needs to judge or repeat the figures."""
    found: dict[str, Any] = {
        "class": machine_class(device),
        "device": device,
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


def machine_class(device: str) -> str:
    """Return the name under which ratios of this machine are comparable."""
    if device == "cuda":
        return str(torch.cuda.get_device_name(0))
    return f"{processor()}, {cores()} cores"


def cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Return the CPU's model name."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_bytes(device: str) -> int:
    """Return the size of the last-level cache, or of the GPU's L2."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    known = [int(size[:-1]) * UNITS[size[-1]] for size in sizes if size[-1:] in UNITS]
    return max(known, default=ASSUMED_CACHE_BYTES)


def version_of(package: str) -> str | None:
    """Return a package's version, None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of the source tree, marked when files differ from it; None without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return None
    return done.stdout.strip() or None
