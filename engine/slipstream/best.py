"""Floor 4. The best version of a run so far, by held-out success, and how another compares with it."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from slipstream import checkpoint
from slipstream.errors import CheckpointError
from slipstream.messages import Evaluated
from slipstream.selection import paired

FOLDER: Final = "best"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best version so far."""

    serial: int = -1
    step: int = -1
    success: float = -1.0
    count: int = 0
    solved: tuple[tuple[int, bool], ...] = ()
    """Each task of its evaluation, and whether it was solved."""

    @classmethod
    def of(cls, event: Evaluated) -> Best:
        """Return the version that was evaluated."""
        return cls(
            serial=event.serial,
            step=event.step,
            success=event.success,
            count=event.count,
            solved=event.solved,
        )

    def compared(self, event: Evaluated) -> dict[str, float]:
        """Return the metrics `paired/*` of an evaluated version, on the tasks that this one was tried on."""
        if not self.solved:
            return {}
        found = paired(dict(event.solved), dict(self.solved))
        return {"paired/difference": found.difference, "paired/low": found.low, "paired/high": found.high}


def read_best(checkpoints: Path) -> Best:
    """Return what the folder `best` is, which outlives the branch that made it; none when it is damaged."""
    folder = checkpoints / FOLDER
    if not folder.exists():
        return Best()
    try:
        notes = checkpoint.verify(folder)
    except CheckpointError as error:
        log.warning("the best checkpoint is damaged and will be replaced: %s", error)
        return Best()
    known = {key: notes.get(key, value) for key, value in asdict(Best()).items()}
    solved = tuple((int(task), bool(right)) for task, right in known.pop("solved"))
    return Best(**known, solved=solved)
