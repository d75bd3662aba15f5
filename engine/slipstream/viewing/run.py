"""Floor 5. The answers that the page asks for, as plain data, from the run folder alone.

about()                 the run: its state, its curves, what to filter by, what is missing
groups(given)           a page of groups, their attempts side by side
episode(place, start)   one episode with its tokens from `start` on
lanes(step, serial)     where the seconds of a batch, or of an evaluation, went
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream.errors import FrameError, RunFolderError
from slipstream.metrics import FILE as METRICS
from slipstream.metrics import Row, read_rows, rows_of
from slipstream.run_folder import CONFIG, read_json
from slipstream.types import Float32Array, Trajectory
from slipstream.viewing.episode import WINDOW, describe_episode
from slipstream.viewing.filters import Filters, describe
from slipstream.viewing.index import FATES, OUTCOMES, STATUSES, RunIndex
from slipstream.viewing.log import LogReader, Place
from slipstream.viewing.search import Searches
from slipstream.viewing.tokens import tokenizer_in
from slipstream.wire import decode_trajectory

PAGE_GROUPS: Final = 24
MOST_LANES: Final = 512
_CURVE_POINTS: Final = 240
_CURVES: Final = ("success", "reward", "slip/mean", "ratio/ess", "entropy", "turns", "kl/reference")
_EVENTS_AT_ONCE: Final = 64
_SILENT_S: Final = 60.0

Scorer = Callable[[Trajectory], Float32Array | None]


class RunView:
    """One run, read while it may still be written.

    Example: ``view = RunView(Path("runs/a")); view.read_all(); view.groups({"outcome": "success"})``.
    """

    def __init__(self, folder: Path, *, scorer: Scorer | None = None, scored_with: str = "") -> None:
        """Read nothing of the log yet. `scorer` gives the log-probability gap of `scored_with`.

        Raises RunFolderError for what is no folder.
        """
        if not folder.is_dir():
            raise RunFolderError(f"{folder} is no run folder: it does not exist")
        self.folder = folder
        self.index = RunIndex()
        self._log = LogReader(folder / "trajectories")
        self._fresh = self._log.fresh()
        self._scorer, self._scored_with = scorer, scored_with
        path = _at(self._config(), "model", "path")
        self._texts, self._textless = tokenizer_in(folder, str(path or ""))
        self._searches = Searches(self._record, self._texts)

    def advance(self, budget_s: float) -> bool:
        """Read on in the log for about so long; return whether there is more at once."""
        end = time.monotonic() + budget_s
        while time.monotonic() < end:
            for _ in range(_EVENTS_AT_ONCE):
                found = next(self._fresh, None)
                if found is None:
                    self._fresh = self._log.fresh()
                    return not self._log.at_end and time.monotonic() < end
                self.index.take(found)
        return True

    def read_all(self) -> None:
        """Read the log to its present end."""
        for found in self._log.fresh():
            self.index.take(found)

    def about(self) -> dict[str, Any]:
        """Return what the page's frame shows."""
        config, rows = self._config(), read_rows(self.folder)
        index = self.index
        return {
            "name": self.folder.resolve().name,
            "recipe": {"environment": _at(config, "environment", "name"), "seed": config.get("seed"),
                       "steps": config.get("steps"), "max_slip": config.get("max_slip")},
            "step": max((int(row["step"]) for row in rows_of(rows, "train")), default=0),
            "state": self._state(),
            "curves": _curves(rows),
            "episodes": index.count,
            "groups": len(index.groups),
            "log": {"read": self._log.bytes_read, "bytes": self._log.bytes_there},
            "facets": self._facets(),
            "missing": self._missing(config, rows),
            "gap": self._scored_with,
            "window": WINDOW,
        }  # fmt: skip

    def groups(self, given: Mapping[str, str]) -> dict[str, Any]:
        """Return a page of groups; `given` holds filters and `page`. Raises ConfigurationError."""
        wanted = dict(given)
        page = int(wanted.pop("page", "") or 0) if str(wanted.get("page", "")).isdigit() else 0
        wanted.pop("page", None)
        filters = Filters.of(wanted)
        fits = filters.mask(self.index)
        search = None
        if filters.text:
            search = self._searches.of(wanted, filters.text)
            fits &= search.advance(fits, self.index, groups=(page + 1) * PAGE_GROUPS)
        keys = filters.ordered(self.index, fits)
        shown = keys[page * PAGE_GROUPS : (page + 1) * PAGE_GROUPS]
        return {
            "total": len(keys),
            "episodes": int(fits.sum()),
            "page": page,
            "size": PAGE_GROUPS,
            "search": None if search is None else search.state(),
            "groups": [
                [{**describe(self.index, n), "fits": bool(fits[n])} for n in self.index.members[key]]
                for key in shown
            ],
        }

    def episode(self, place: str, start: int = 0, window: int = WINDOW) -> dict[str, Any]:
        """Return one episode; raises RunFolderError when it is not, or no longer, in the log."""
        try:
            at = Place.of(place)
        except ValueError as error:
            raise RunFolderError(f"episode: {error}") from None
        try:
            trajectory = decode_trajectory(self._log.record(at))
        except FrameError as error:
            raise RunFolderError(f"the episode at {place} is damaged: {error}") from None
        gap = self._scorer(trajectory) if self._scorer else None
        shown = describe_episode(
            trajectory, self._texts, self.index.versions, start=start, window=window, gap_T=gap
        )
        key = (trajectory.evaluation, trajectory.attempt.group)
        members = self.index.members[self.index.groups[key]] if key in self.index.groups else []
        group = [describe(self.index, number) for number in members]
        own = next((row for row in group if row["id"] == str(at)), None)
        return {**shown, "id": str(at), "row": own, "siblings": group}

    def found(self, given: Mapping[str, str], text: str, fits: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return [n]: which of the fitting episodes hold a text, all of them looked at."""
        search = self._searches.of(given, text)
        while True:
            hits = search.advance(fits, self.index, groups=len(fits))
            if search.state()["over"]:
                return hits

    def place(self, number: int) -> str:
        """Return how an episode of a row is asked for."""
        return str(describe(self.index, number)["id"])

    def lanes(self, step: int = -1, serial: int = -1) -> dict[str, Any]:
        """Return the episodes of a batch or of an evaluation with their marks, and when it was trained."""
        given = {"step": str(step)} if step >= 0 else {"serial": str(serial), "kind": "evaluation"}
        numbers = np.flatnonzero(Filters.of(given).mask(self.index))[:MOST_LANES]
        rows = [self.lane(int(number)) for number in numbers]
        return {"lanes": rows, "trained": self.trained(step), "step": step, "serial": serial}

    def lane(self, number: int) -> dict[str, Any]:
        """Return one episode's row with when each of its messages was made."""
        row = describe(self.index, number)
        try:
            marks = decode_trajectory(self._record(number)).timings.marks_ms
        except (RunFolderError, FrameError):
            marks = ()
        return {**row, "marks": list(marks)}

    def trained(self, step: int) -> dict[str, float] | None:
        """Return when the batch of a step was taken and when its row was written, seconds since the epoch.

        A row is written when the step is over; its `seconds/step` went by since the row before, and the share
        `wait/learner_starved` of them in waiting for this batch.
        """
        rows = [row for row in rows_of(read_rows(self.folder), "train") if int(row["step"]) == step]
        if not rows or not isinstance(rows[-1].get("time"), int | float):
            return None
        done = float(rows[-1]["time"])
        seconds = float(rows[-1].get("seconds/step") or 0.0)
        return {
            "taken": done - seconds * (1.0 - float(rows[-1].get("wait/learner_starved") or 0.0)),
            "done": done,
        }

    def _record(self, number: int) -> bytes:
        row = self.index.rows[number]
        return self._log.record(Place(segment=int(row["segment"]), offset=int(row["offset"])))

    def _config(self) -> dict[str, Any]:
        """Return config.toml as it stands, or {}: another version of Slipstream may have written it."""
        try:
            return tomllib.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _state(self) -> str:
        """Return how the run is, in a word; a hub and a warm start write something every few seconds."""
        if read_json(self.folder / "summary.json"):
            return "over"
        written = [
            path.stat().st_mtime for name in ("status.json", METRICS) if (path := self.folder / name).exists()
        ]
        if not written:
            return "not begun"
        return "running" if time.time() - max(written) < _SILENT_S else "stopped"

    def _facets(self) -> dict[str, Any]:
        """Return what there is to filter by, with how often it occurs."""
        rows = self.index.rows
        steps = rows["step"][rows["step"] > 0]
        return {
            "outcomes": _counts(rows["outcome"], [str(outcome) for outcome in OUTCOMES]),
            "fates": _counts(rows["fate"], FATES),
            "tools": list(self.index.tools),
            "statuses": [str(status) for status in STATUSES],
            "steps": [int(steps.min()), int(steps.max())] if len(steps) else [],
            "evaluations": [
                {
                    "serial": done.serial,
                    "step": done.step,
                    "success": round(done.success, 4),
                    "tasks": done.count,
                }
                for done in self.index.evaluations
            ],
            "reward": [float(rows["reward"].min()), float(rows["reward"].max())] if len(rows) else [],
        }

    def _missing(self, config: Mapping[str, Any], rows: list[Row]) -> list[str]:
        """Return a sentence for each thing that a whole run would have."""
        missing = []
        if not config:
            missing.append(f"{CONFIG} is missing or cannot be read: this may be no run folder.")
        if not (self.folder / "trajectories").is_dir():
            missing.append(
                "trajectories/ is missing: no hub has begun its log here, so there are no episodes."
            )
        elif not self.index.count and self._log.at_end:
            missing.append("The log holds no episode yet.")
        if not rows:
            missing.append(f"{METRICS} holds no row: there are no curves, and lanes end with the episode.")
        if self._textless:
            missing.append(self._textless)
        if self.index.unread:
            missing.append(f"{self.index.unread} events of the log could not be understood and are left out.")
        return missing + self._log.notes


def to_json(value: Any) -> bytes:
    """Return plain data as JSON in UTF-8; numbers that are not finite become null."""
    return msgspec.json.encode(value)


def _curves(rows: list[Row]) -> dict[str, list[list[float]]]:
    """Return [step, value] pairs by metric; `held-out` is the success of evaluations."""
    train = rows_of(rows, "train")
    train = train[:: max(1, len(train) // _CURVE_POINTS)]
    curves = {name: _pairs(train, name) for name in _CURVES}
    curves["held-out"] = _pairs(rows_of(rows, "evaluation"), "success")
    return {name: pairs for name, pairs in curves.items() if pairs}


def _pairs(rows: list[Row], name: str) -> list[list[float]]:
    values = [(row["step"], row.get(name)) for row in rows]
    return [[int(step), round(float(value), 5)] for step, value in values if isinstance(value, int | float)]


def _counts(column: Any, names: Any) -> dict[str, int]:
    counts = np.bincount(column, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def _at(tree: Mapping[str, Any], *keys: str) -> Any:
    value: Any = tree
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
