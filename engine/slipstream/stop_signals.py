"""Floor 1. SIGTERM, SIGINT and SIGHUP: how a process that is asked to stop hears of it, and what it answers.

launcher   stops its roles in order and ends with 130
role       keeps what it has and ends with STOPPED (75); with 0 when its work was done anyway
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final

STOPPED: Final = 75
"""Exit code of a role that a signal stopped before its work was done: whoever started it starts it again.

EX_TEMPFAIL of sysexits.h.
"""
_ASKS: Final = (signal.SIGTERM, signal.SIGINT)


class StoppedBySignal(KeyboardInterrupt):
    """The user or the system asked this process to end; nothing on the way takes it for a failure."""

    def __init__(self, number: int) -> None:
        """Keep which signal it was."""
        super().__init__(signal.Signals(number).name)
        self.number = number


def end_when_asked() -> None:
    """Let SIGTERM and SIGINT end this role at once with STOPPED: all it has is on disk already."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(STOPPED)

    for number in _ASKS:
        signal.signal(number, end)


def note_when_asked() -> Callable[[], bool]:
    """Let SIGTERM and SIGINT be noted only; return a function that tells whether one came."""
    seen: list[int] = []
    for number in _ASKS:
        signal.signal(number, lambda received, _frame: seen.append(received))
    return lambda: bool(seen)


@contextmanager
def raising_signals() -> Iterator[None]:
    """Raise StoppedBySignal for SIGTERM and SIGHUP, as Python does KeyboardInterrupt for SIGINT."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal(number)

    with _handled((signal.SIGTERM, signal.SIGHUP), stop):
        yield


@contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of dying of them; those ignored stay ignored."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    with _handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), note):
        yield received


@contextmanager
def _handled(
    numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Handle signals that are not ignored with `handler`, and as before afterwards."""
    wanted = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
