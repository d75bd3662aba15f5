"""Floor 1. Code that is not ours: users' functions, packages of sinks. What it may raise stays here.

Everywhere else only what can be mended is caught.
"""

from __future__ import annotations

import inspect
from types import TracebackType
from typing import Any, Self


class Contained:
    """A context in which such code runs: what it raises is kept and goes no further.

    Cancellation, exits and interrupts do, and so do errors of the kinds `passing`.

    Example: ``with Contained(OSError) as ran: value = function(episode)``, then look at ``ran.error``.
    """

    def __init__(self, *passing: type[Exception]) -> None:
        """Let `passing` through."""
        self._passing = passing
        self.error: Exception | None = None
        """What was raised."""

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Keep an error, and say that it is dealt with."""
        if not isinstance(error, Exception) or isinstance(error, self._passing):
            return False
        self.error = error
        return True


async def settled(value: Any) -> Any:
    """Return what a function gave, awaited where that can be: users write both kinds."""
    return await value if inspect.isawaitable(value) else value
