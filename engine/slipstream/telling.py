"""Floor 2. What the hub tells the learner of its state: pure functions."""

from __future__ import annotations

from slipstream import events
from slipstream.ledger_state import LedgerState
from slipstream.messages import Batch, Evaluated


def batch_of(state: LedgerState, step: int) -> Batch:
    """Return the message of a batch that was handed out, with all that the slip of its tokens hangs on."""
    serials = {serial for identity in state.batches[step] for serial in state.look(identity).serials}
    versions = tuple(state.versions[serial] for serial in sorted(serials))
    oldest = min((version.incarnation for version in versions), default=state.incarnation)
    return Batch(
        step=step,
        counters={name: float(count) for name, count in state.books().items()},
        versions=versions,
        forks=state.versions.forks_after(oldest),
        history=state.histories[step + 1],
    )


def evaluated(done: events.EvaluationDone, *, replayed: bool = False) -> Evaluated:
    """Return the message that tells the learner of an evaluation."""
    return Evaluated(serial=done.serial, step=done.step, success=done.success, count=done.count,
                     metrics=done.metrics, solved=done.solved, replayed=replayed)  # fmt: skip
