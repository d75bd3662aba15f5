"""Turns whatever a variant raises into a reason: a missing backend, too little memory, a failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from slipstream_kernels import BackendError

Result = TypeVar("Result")
NONE: Final = "none"
NOT_IMPLEMENTED: Final = "does not exist for this op"
"""What slipstream_kernels says of a backend that an op does not have: nothing to report."""
OUT_OF_MEMORY: Final = (
    "out of memory",
    "can't allocate",
    "not enough memory",
    "cannot allocate",
    "bad_alloc",
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a variant gave no result."""

    status: str
    """absent: not to be had here; NONE: to be had nowhere; oom; failed."""
    note: str


def attempt(run: Callable[[], Result]) -> Result | Failure:
    """Return what `run` returns, or the Failure that it ended in."""
    try:
        return run()
    except BackendError as error:
        return Failure(NONE if NOT_IMPLEMENTED in str(error) else "absent", str(error))
    # Peers and kernels being tried out may raise anything; all of it becomes a row.
    except Exception as error:  # noqa: BLE001
        text = " ".join(str(error).split())
        exhausted = isinstance(error, MemoryError) or any(word in text.lower() for word in OUT_OF_MEMORY)
        return Failure("oom" if exhausted else "failed", f"{type(error).__name__}: {text[:300]}")
