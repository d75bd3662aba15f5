"""Floor 2. Whether the books balance: what was made, what became of it, and what is still owed."""

from __future__ import annotations

from collections.abc import Iterable

from slipstream.config import RunConfig
from slipstream.errors import StorageError
from slipstream.ledger_state import FATES, LedgerState
from slipstream.types import TrajectoryId


def check_books(state: LedgerState, config: RunConfig) -> None:
    """Raise StorageError when the books of a state do not balance or contradict groups and batches."""
    books = state.books()
    trained = [identity for batch in state.batches.values() for identity in batch]
    filtered = [identity for held in state.course.filtered.values() for identity in held]
    slots = {state.items[identity].received.slot for identity in trained}
    buffered = state.members(state.groups)
    remembered = [*trained, *filtered, *buffered]
    whole = [_whole(state, batch, config.batch.groups) for batch in state.batches.values()]
    checks = {
        "made = sum of fates": (books["made"], sum(books[fate] for fate in FATES)),
        "remembered = in batches, groups and filtered": (len(state.items), len(remembered)),
        "remembered once": (state.items.keys(), set(remembered)),
        "trained = batches": (books["trained"], state.forgotten + len(trained)),
        "trained = whole batches": ([len(batch) for batch in state.batches.values()], whole),
        "attempts trained once": (len(trained), len(slots)),
        "batches are consecutive": (sorted(state.batches), list(range(state.first_batch, state.steps))),
        "buffered = groups": (books["buffered"], len(buffered)),
        "owed = open attempts": (len(state.training), sum(map(len, state.groups.values())) - len(buffered)),
    }
    wrong = [f"{name}: {left} != {right}" for name, (left, right) in checks.items() if left != right]
    if wrong:
        raise StorageError(
            f"the books do not balance ({'; '.join(wrong)}); keep the run folder and report this"
        )


def _whole(state: LedgerState, batch: Iterable[TrajectoryId], most: int) -> int:
    """Return how many trajectories the groups of a batch have, or -1 where it has not `most` groups."""
    groups = {state.look(identity).attempt.group for identity in batch}
    return sum(map(state.size_of, groups)) if len(groups) == most else -1
