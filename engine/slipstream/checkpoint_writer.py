"""Floor 4. Writes checkpoints beside the training: a step waits for a copy of its tensors, not for a disk.

wait     for                                       released by
settle   the checkpoint under way to be on disk    its thread, or DeadlineError
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from slipstream import checkpoint
from slipstream.deadlines import Deadline
from slipstream.flight_recorder import FLIGHT

WRITE_S: Final = 900.0
"""Longest time that a checkpoint may take to reach the disk."""
SPARE_SHARE: Final = 1.1
"""Room asked for, as a multiple of what is written: files beside the tensors, blocks half full."""
_WAKE_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A checkpoint that is on disk, whole."""

    step: int
    oldest: int
    """Step of the oldest checkpoint there is to go back to; 0 is the warm start."""


class CheckpointWriter:
    """One checkpoint at a time, in a thread of its own or, without `background`, in the caller's.

    Example: ``writer.settle(); writer.save(20, write, size); done = writer.published()``.
    """

    def __init__(self, folder: Path, *, keep: int, background: bool) -> None:
        """Write `step-NNNNNNNN` folders under `folder`, and keep the newest `keep`."""
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._writing: Future[Published] | None = None
        self._step = -1

    def save(self, step: int, write: Callable[[Path], None], size_bytes: int) -> bool:
        """Begin to publish what `write` puts into a folder; return False when the disk has no room for it.

        `write` may run later: it must hold copies. `settle` first.
        """
        assert self._writing is None, "the checkpoint before has not been asked for"
        if not self.has_room(size_bytes):
            return False
        self._step = step
        if self._thread is not None:
            self._writing = self._thread.submit(self._publish, step, write)
        else:
            done = self._publish(step, write)
            self._writing = Future()
            self._writing.set_result(done)
        return True

    def has_room(self, size_bytes: int) -> bool:
        """Return whether a checkpoint with tensors of this size fits on the disk."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self._folder).free >= SPARE_SHARE * size_bytes

    def published(self) -> Published | None:
        """Return the checkpoint published since the last call, if any; raises what writing it raised."""
        if self._writing is None or not self._writing.done():
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def settle(self) -> Published | None:
        """Wait until nothing is being written, then do as `published`; raises DeadlineError too."""
        if self._writing is None:
            return None
        what = f"the checkpoint of step {self._step} to reach {self._folder}"
        deadline = Deadline(WRITE_S, "learner", what)
        FLIGHT.waits(what, WRITE_S)
        while not self._writing.done():
            deadline.check()
            with contextlib.suppress(NotYet):
                self._writing.exception(min(_WAKE_S, deadline.remaining()))
            FLIGHT.beat()
        FLIGHT.goes_on()
        return self.published()

    def _publish(self, step: int, write: Callable[[Path], None]) -> Published:
        checkpoint.save_checkpoint(self._folder, step, write, keep=self._keep)
        FLIGHT.note(f"checkpoint of step {step} published")
        kept = checkpoint.steps_in(self._folder)
        # While there are few, the warm start is one to go back to.
        return Published(step=step, oldest=min(kept) if len(kept) >= self._keep else 0)
