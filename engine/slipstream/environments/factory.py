"""Floor 4. What makes the environments of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from slipstream.interfaces import Environment, TaskSource


def _nothing_to_close() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentFactory:
    """Makes one environment object per episode, and the tasks they pose."""

    tasks: TaskSource
    make: Callable[[], Environment]
    corpus: Callable[[], Iterator[str]]
    """Yields text as its episodes hold it, to train a tokenizer on."""
    rehearse: Callable[[], Environment] | None = None
    """Makes environments for the author's own scripts, which need no sandbox; None: like `make`."""
    close: Callable[[], None] = _nothing_to_close
    """Ends what its environments share, such as a sandbox."""
