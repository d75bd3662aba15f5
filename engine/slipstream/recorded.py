"""Floor 4. The episodes that a run folder holds: in the hub's log, in actors' spools, in what was put aside.

Reading changes nothing, and works while the run goes on. Order is that of arrival, then what no hub has
acknowledged. What checkpoints cover may have gone from the log (`hub.retain_bytes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from slipstream.errors import FrameError, RunFolderError
from slipstream.events import Received
from slipstream.ingest import read_events
from slipstream.records import payload, scan
from slipstream.types import Trajectory, TrajectoryId, succeeded
from slipstream.wire import decode_trajectory, inspect_trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One episode as its bytes."""

    identity: TrajectoryId
    success: bool
    record: bytes

    @property
    def name(self) -> str:
        """How a user names it: actor/epoch/number."""
        return f"{self.identity.actor}/{self.identity.epoch}/{self.identity.seq}"


def stored(folder: Path) -> Iterator[Stored]:
    """Yield every episode of a run once; raises StorageError where the log is damaged."""
    seen: set[TrajectoryId] = set()
    for one in chain(_logged(folder / "trajectories"), _spooled(folder / "spool")):
        if one.identity not in seen:
            seen.add(one.identity)
            yield one


def find(folder: Path, wanted: str) -> Trajectory:
    """Return the episode that `wanted` names: actor/epoch/number, or its place in the order, from 0.

    Raises RunFolderError when there is none, or none any more.
    """

    def is_wanted(place: int, one: Stored) -> bool:
        return str(place) == wanted if wanted.isdecimal() else one.name == wanted

    return _last(folder, is_wanted, f"there is no episode {wanted}")


def newest(folder: Path, *, failed: bool = False) -> Trajectory:
    """Return the newest episode, or the newest that did not succeed; raises RunFolderError without one."""
    what = "there is no episode without success" if failed else "there is no episode"
    return _last(folder, lambda _, one: not (failed and one.success), what)


def _last(folder: Path, is_wanted: Callable[[int, Stored], bool], missing: str) -> Trajectory:
    found: Stored | None = None
    first = last = ""
    count = 0
    for place, one in enumerate(stored(folder)):
        first, last, count = first or one.name, one.name, place + 1
        if is_wanted(place, one):
            found = one
    if found is None:
        held = f"it holds {count}, from {first} to {last}" if count else "it holds none"
        raise RunFolderError(f"{folder}: {missing}; {held}, what checkpoints cover may be gone")
    try:
        return decode_trajectory(found.record)
    except FrameError as error:
        raise RunFolderError(f"{folder}: episode {found.name} cannot be read: {error}") from None


def _logged(folder: Path) -> Iterator[Stored]:
    if not folder.is_dir():
        return
    for entry in read_events(folder):
        if isinstance(entry.event, Received) and entry.record:
            yield Stored(identity=entry.event.identity, success=entry.event.success, record=entry.record)


def _spooled(folder: Path) -> Iterator[Stored]:
    """Yield what lies in spools, damaged segments that were put aside included."""
    for path in sorted(folder.glob("*.[0-9]*")):
        if not path.suffix[1:].isdigit() and path.suffix != ".quarantined":
            continue
        data = path.read_bytes()
        for found in scan(data, ends_at_zeros=True).records:
            record = bytes(payload(data, found))
            try:
                header = inspect_trajectory(record).header
            except FrameError:
                continue
            yield Stored(identity=header.identity, success=succeeded(header.scores), record=record)
