"""Floor 4. How often and how soon a process that died is started again, and how often that was in a run.

RUN/restarts.json counts them by role: it outlives the launcher, so that a resumed run counts on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from slipstream.errors import disk_failure
from slipstream.run_folder import read_json, write_json

FILE: Final = "restarts.json"
LONGEST_PAUSE_S: Final = 60.0


@dataclass(slots=True, kw_only=True)
class RestartBudget:
    """The unexpected ends of one process that are mended.

    Example: ``pause = RestartBudget(restarts=5, backoff_s=0.5).spend(now=12.0, progress=7)``.
    """

    restarts: int
    """Most deaths within `window_s`; one more is too many."""
    window_s: float = 3600.0
    """A death longer ago is forgotten, if the run has got on since: slow failures in a row are one, too."""
    backoff_s: float = 0.5
    """Pause before the first restart; doubles with each, up to LONGEST_PAUSE_S."""
    random: random.Random = field(default_factory=random.Random)
    _deaths: list[tuple[float, object]] = field(default_factory=list)

    @property
    def deaths(self) -> int:
        """Deaths that count now."""
        return len(self._deaths)

    def spend(self, *, now: float, progress: object) -> float | None:
        """Note a death; return the seconds to wait before a restart, or None when there were too many.

        `progress` is anything that differs once the run has got on. A pause is drawn between one and
        one and a half times its back-off, so that many processes do not return at the same moment.
        """
        kept = [(at, then) for at, then in self._deaths if now - at < self.window_s or then == progress]
        self._deaths = [*kept, (now, progress)]
        if self.deaths > self.restarts:
            return None
        return min(self.backoff_s * 2.0 ** (self.deaths - 1), LONGEST_PAUSE_S) * self.random.uniform(1.0, 1.5)


def count_restart(folder: Path, role: str) -> None:
    """Add one restart of a role to a run's count; a full disk loses it."""
    counts = restarts_of(folder)
    try:
        write_json(folder / FILE, counts | {role: counts.get(role, 0) + 1})
    except OSError as error:
        disk_failure(error)


def restarts_of(folder: Path) -> dict[str, int]:
    """Return the restarts of a run so far, by role."""
    return {role: int(count) for role, count in sorted(read_json(folder / FILE).items())}
