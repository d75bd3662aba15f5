"""What the hub makes of trajectories: what an evaluation tells beside its success."""

from __future__ import annotations

import dataclasses

from slipstream import events, synthetic
from slipstream.receiving import describe, summarize
from slipstream.types import Outcome, Score, ScoreKind, Trajectory
from slipstream.wire import encode_trajectory, inspect_trajectory


def received(task: int, *scores: Score, evaluation: int = 3, success: bool = True) -> events.Received:
    """Return what the hub keeps of an episode with these scores beside its outcome."""
    outcome = Score(name="outcome", kind=ScoreKind.OUTCOME, weight=1.0, value=1.0 if success else -1.0)
    made: Trajectory = synthetic.trajectory(seed=task)
    made = dataclasses.replace(made, evaluation=evaluation, scores=(outcome, *scores))
    return describe(inspect_trajectory(encode_trajectory(made)), "evaluated")


def monitor(name: str, fired: float) -> Score:
    return Score(name=f"fired/{name}", kind=ScoreKind.MONITOR, weight=0.0, value=fired)


def metric(name: str, value: float | None) -> Score:
    return Score(
        name=name, kind=ScoreKind.METRIC, weight=0.0, value=value, invalid="" if value is not None else "none"
    )


def test_an_evaluation_tells_monitors_metrics_and_what_was_screened() -> None:
    results = [
        received(0, monitor("loops", 1.0), metric("letters", 4.0)),
        received(1, monitor("loops", 0.0), metric("letters", None), success=False),
        received(2, monitor("loops", 0.0), metric("letters", 2.0)),
        received(3, monitor("loops", 0.0)),
    ]
    done = summarize(results, serial=3, step=2)
    assert (done.success, done.count) == (0.75, 4)
    assert done.metrics["fired/loops"] == 0.25
    assert done.metrics["metric/letters"] == 3.0, "the mean over those in which it could be taken"
    assert done.metrics["invalid/letters"] == 0.25, "a share of all"
    assert done.metrics[f"outcome/{Outcome.COMPLETED}"] == 1.0
    assert "screened" not in done.metrics


def test_training_episodes_keep_nothing_beside() -> None:
    """The learner counts them from the trajectories themselves."""
    assert received(0, monitor("loops", 1.0), evaluation=-1).beside == {}
