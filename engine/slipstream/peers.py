"""Floor 3. The peers of the hub, and how it shows them: nothing here outlives it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slipstream.ledger_state import LedgerState


@dataclass(slots=True, kw_only=True)
class Peer:
    """A connection that was let in."""

    role: str
    name: str
    session: str
    heard_s: float
    pinged_s: float = 0.0
    wants: list[int] = field(default_factory=lambda: [0, 0])
    """Free places for training and evaluation, leases on the way taken off."""
    granted: list[int] = field(default_factory=lambda: [0, 0])
    """Leases of each sort sent over this connection."""
    counters: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulling:
    """The learner waits for a batch."""

    peer: bytes
    step: int
    since_s: float


def metrics_rows(
    reports: Iterable[Mapping[str, Any]],
    books: Mapping[str, int],
    peers: Collection[Peer],
    course: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Return the learner's rows with the books as `hub/*`, the actors' summed counters as `actors/*`, and
    what `course` holds of the curriculum.
    """
    extra: dict[str, Any] = {f"hub/{name}": float(count) for name, count in books.items()} | dict(course)
    for who in peers:
        for name, value in who.counters.items():
            extra[f"actors/{name}"] = extra.get(f"actors/{name}", 0.0) + value
    return [{**extra, **report} for report in reports]


def snapshot(
    state: LedgerState, peers: Collection[Peer], pulling: Pulling | None, refused_proofs: int, now: float
) -> dict[str, Any]:
    """Return who waits for whom, as plain data for the live screen and status.json."""
    actors = {
        who.name: {
            "silent_s": round(now - who.heard_s, 3),
            "wants_train": who.wants[0],
            "wants_evaluate": who.wants[1],
            "leased": len(state.training.slots_of(who.name)),
            "counters": who.counters,
        }
        for who in peers
        if who.role == "actor"
    }
    waits = None if pulling is None else {"batch": pulling.step, "seconds": round(now - pulling.since_s, 3)}
    running = state.evaluation
    return {
        "version": state.version,
        "serial": state.newest.version.serial if state.newest else -1,
        "incarnation": state.incarnation,
        "steps_handed_out": state.steps,
        "learner_present": any(who.role == "learner" for who in peers),
        "learner_waits": waits,
        "actors_blocked_by_gate": sorted(name for name, actor in actors.items() if actor["wants_train"]),
        "gate_room": state.room,
        "groups_buffered": len(state.complete),
        "groups_open": len(state.groups) - len(state.complete),
        "actors": actors,
        "books": state.books(),
        "refused_proofs": refused_proofs,
        "checkpoint_step": state.checkpoint_step,
        "evaluation": None if running is None else {"serial": running.serial, "step": running.step,
                                                    "returned": len(running.results)},
        "success": [{"step": done.step, "serial": done.serial, "success": done.success, "count": done.count}
                    for done in state.evaluations],
    }  # fmt: skip
