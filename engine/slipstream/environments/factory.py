"""Floor 4. What makes the environments of a run, and who can play them without a policy."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field

from slipstream.interfaces import Environment, TaskSource
from slipstream.types import Task

Play = Generator[str, str, None]
"""One episode: yields messages with calls as `format_call` writes them, is sent each observation."""

ORACLE = "oracle"
"""Name of the script that solves every task, as far as tools let it."""
GIVES_UP = "do_nothing"
"""Name of the script that ends an episode without trying, where there is one."""


def _nothing_to_close() -> None:
    pass


def _no_text() -> Iterator[str]:
    return iter(())


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A scripted player."""

    play: Callable[[Task], Play]
    about: str
    """What it does, as it is told beside its success."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentFactory:
    """Makes one environment object per episode, and the tasks they pose."""

    tasks: TaskSource
    make: Callable[[], Environment]
    corpus: Callable[[], Iterator[str]] = _no_text
    """Yields text as its episodes hold it, to train a tokenizer on."""
    scripts: Mapping[str, Script] = field(default_factory=dict)
    """Baselines by name; the one called `ORACLE` also gives the demonstrations of the warm start."""
    careless: Script | None = None
    """Gives the rest of the demonstrations, with mistakes for reinforcement learning to mend."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages and data that tasks, tools and scores depend on, by name: a run records and compares them."""
    unfit: str = ""
    """Why nobody should train on it, in one sentence that also says how to do so all the same; empty: fit."""
    rehearse: Callable[[], Environment] | None = None
    """Makes environments for the author's own scripts, which need no sandbox; None: like `make`."""
    close: Callable[[], None] = _nothing_to_close
    """Ends what its environments share, such as a sandbox."""
