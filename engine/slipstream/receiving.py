"""Floor 2. What the hub makes of a trajectory, a proof and an evaluation: pure functions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Literal

import numpy as np

from slipstream import events
from slipstream.config import RunConfig
from slipstream.curriculum import REAL
from slipstream.errors import FrameError
from slipstream.ledger_state import LedgerState
from slipstream.messages import Hello
from slipstream.rewards import shown
from slipstream.types import (
    Outcome,
    Split,
    TrajectoryId,
    WeightProof,
    WeightUpdate,
    succeeded,
)
from slipstream.wire import Arrival, Header

CANARY_TOLERANCE: Final = {"float32": 1e-3, "bfloat16": 0.5, "auto": 0.5}
"""Most that two sound holders of the same weights may differ in a log-probability, in nats, by dtype."""

Verdict = Literal["buffered", "evaluated", "duplicate", "failed_infrastructure", "unproven"]


def describe(arrival: Arrival, verdict: Verdict) -> events.Received:
    """Return the event that tells what the hub needs to know of a trajectory."""
    header = arrival.header
    return events.Received(
        identity=header.identity,
        attempt=header.attempt,
        split=header.split,
        evaluation=header.evaluation,
        issue=header.issue,
        outcome=header.outcome,
        success=succeeded(header.scores),
        reward=arrival.reward,
        turns=arrival.turns,
        tokens=arrival.sampled,
        serials=arrival.serials,
        verdict=verdict,
        stage=header.stage,
        beside=shown([header.scores]) if header.evaluation >= 0 else {},
    )


def refuse_line(hello: Hello, state: LedgerState) -> str:
    """Return why a learner cannot go on from its checkpoint with this log, or ""."""
    if hello.session == state.learner_session:
        return ""  # it only reconnects
    if not state.first_batch <= hello.step <= state.steps:
        return (
            f"step: the hub's log knows batches {state.first_batch} to {state.steps}, the learner resumes "
            f"from step {hello.step}; restore the log from a copy, or remove the checkpoints of other steps"
        )
    if hello.history != state.histories[hello.step]:
        known = state.histories[hello.step]
        return (
            f"history of step {hello.step}: the hub's log has {known or 'none'}, the checkpoint was trained "
            f"on {hello.history or 'none'}; restore log and checkpoints from one copy"
        )
    return ""


def check_sender(identity: TrajectoryId, *, run: str, actor: str, epoch: int) -> None:
    """Raise FrameError when a trajectory's identity is not the sender's, of this epoch or an older one."""
    if (identity.run, identity.actor) != (run, actor) or not 0 <= identity.epoch <= epoch or identity.seq < 0:
        raise FrameError(f"identity: expected run {run}, actor {actor}, epoch <= {epoch}, got {identity}")


def verdict_on(arrival: Arrival, state: LedgerState, config: RunConfig) -> Verdict:
    """Return what becomes of a new trajectory; raises FrameError when it answers no lease of this run."""
    header, serials = arrival.header, arrival.serials
    attempt, evaluation = header.attempt, header.evaluation
    _check_attempt(header, state, config)
    desk = state.heldout if evaluation >= 0 else state.training
    if (evaluation, attempt.group, attempt.attempt) not in desk:
        return "duplicate"
    if header.outcome is Outcome.INFRASTRUCTURE_FAILURE:
        return "failed_infrastructure"
    pinned = evaluation < 0 or not set(serials) - {evaluation}
    if not pinned or not state.is_proven(header.identity, serials, header.samplers):
        return "unproven"
    return "evaluated" if evaluation >= 0 else "buffered"


def _check_attempt(header: Header, state: LedgerState, config: RunConfig) -> None:
    """Raise FrameError unless the attempt is one that was leased at some time."""
    attempt, evaluation = header.attempt, header.evaluation
    if evaluation >= 0:
        split, known = Split.HELDOUT, evaluation in state.versions
        groups, attempts = config.evaluation.tasks, 1
        posed = (attempt.group, REAL)
    else:
        split, known = Split.TRAIN, True
        groups, attempts = state.next_group, state.size_of(attempt.group)
        posed = _posed(header, state)
    leased = (
        known
        and 0 <= attempt.group < groups
        and 0 <= attempt.attempt < attempts
        and (attempt.task, header.stage) == posed
        and attempt.seed == config.seed
        and header.split is split
    )
    if not leased:
        raise FrameError(
            f"attempt: expected one that was leased, got {attempt} of {header.split} for evaluation "
            f"{evaluation}"
        )


def _posed(header: Header, state: LedgerState) -> tuple[int, int]:
    """Return task and stage of a header's group; what a curriculum chose is forgotten with the group."""
    attempt = header.attempt
    chosen = header.stage != REAL or attempt.task != attempt.group
    if chosen and attempt.group not in state.groups:
        return attempt.task, header.stage
    made = state.course.opening(attempt.group)
    return made.task, made.stage


def canary_tolerance(config: RunConfig) -> float:
    """Return the nats by which whatever samples in a run may differ from its learner.

    Embedded backends run the learner's own code; a server has kernels of its own, whose noise in bfloat16
    exceeds one update's change: its checksum tells what it holds, the canary only that it computes with it.
    """
    dtype = config.model.dtype if config.inference.backend == "vllm" else "float32"
    return CANARY_TOLERANCE[dtype]


def refuse_proof(proof: WeightProof, update: WeightUpdate, tolerance: float) -> str:
    """Return why a proof is wrong, or "": checksums must agree, canaries to `tolerance` nats."""
    serial = update.version.serial
    if proof.checksum64 != update.version.checksum64:
        expected64, got64 = f"{update.version.checksum64:016x}", f"{proof.checksum64:016x}"
        return f"proof of serial {serial}: expected checksum {expected64}, got {got64}"
    expected, found = np.asarray(update.canary_logprobs), np.asarray(proof.canary_logprobs)
    if expected.shape != found.shape:
        return (
            f"proof of serial {serial}: expected {expected.size} canary log-probabilities, got {found.size}"
        )
    error = float(np.abs(expected - found).max(initial=0.0))
    if not error <= tolerance:
        return (
            f"proof of serial {serial}: expected canary log-probabilities within {tolerance} nats, "
            f"got {error:.3g} off"
        )
    return ""


def summarize(results: Collection[events.Received], *, serial: int, step: int) -> events.EvaluationDone:
    """Return the result of an evaluation: the share of successes, and means over its tasks."""
    count = len(results)

    def mean(values: list[float]) -> float:
        return sum(values) / max(1, count)

    metrics = {
        "reward": mean([result.reward for result in results]),
        "turns": mean([result.turns for result in results]),
        "tokens": mean([result.tokens for result in results]),
    }
    metrics |= {
        f"outcome/{kind.value}": mean([result.outcome is kind for result in results]) for kind in Outcome
    }
    metrics |= _beside(results)
    success = mean([result.success for result in results])
    solved = tuple((result.attempt.task, result.success) for result in results)
    return events.EvaluationDone(
        serial=serial, step=step, success=success, count=count, metrics=metrics, solved=solved
    )


def _beside(results: Collection[events.Received]) -> dict[str, float]:
    """Return means of what scores tell beside the reward, over those tasks that `rewards.shown` says."""
    values: dict[str, list[float]] = {}
    for result in results:
        for name, value in result.beside.items():
            values.setdefault(name, []).append(value)
    of_all = {name for name in values if name == "screened" or name.startswith("invalid/")}
    return {
        name: sum(taken) / (len(results) if name in of_all else len(taken)) for name, taken in values.items()
    }
