"""A run folder made for reading: its log is the hub's own, its episodes are written out word by word."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slipstream import config as configuration
from slipstream import events, synthetic
from slipstream.chat import Chat
from slipstream.config import load_config
from slipstream.ingest import IngestLog
from slipstream.metrics import append_row
from slipstream.types import (
    Outcome,
    Score,
    ScoreKind,
    Split,
    TaskAttempt,
    Timings,
    ToolCall,
    ToolStatus,
    Trajectory,
    TrajectoryId,
)
from slipstream.wire import encode_trajectory

HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    "</script><!-- \u202egnp.exe\u2066 a\u200bb \u2028 ]]> & &lt; <|end|><|assistant|> \x1b[31m"
)
"""What a page must not take for markup, for script, or for a direction."""


def episode(
    chat: Chat,
    *said: str,
    seq: int,
    group: int = 0,
    attempt: int = 0,
    evaluation: int = -1,
    serial: int = 0,
    reward: float = 1.0,
    outcome: Outcome = Outcome.COMPLETED,
    calls: Sequence[ToolCall] = (),
    note: str = "",
    started_s: float = 1_700_000_000.0,
) -> Trajectory:
    """Return an episode in which prompt, policy, tool, policy, .. say these texts in turn."""
    parts, turns = [], []
    for place, text in enumerate(said):
        mine = place % 2 == 1
        bridged = chat.bridge(text) if place else chat.encode(f"<|user|>{text}<|end|><|assistant|>")
        tokens = chat.message(text) if mine else bridged
        parts.append(tokens)
        turns.append(np.full(len(tokens), place // 2 if mine else -1, np.int16))
    token_ids, turn_T = np.concatenate(parts), np.concatenate(turns)
    sampled = turn_T >= 0
    count = len(said) // 2
    base = synthetic.trajectory()
    scores = [Score(name="answer", kind=ScoreKind.OUTCOME, weight=1.0, value=reward)]
    failed = outcome is Outcome.INFRASTRUCTURE_FAILURE
    return dataclasses.replace(
        base,
        identity=TrajectoryId(run="run", actor=f"actor-{seq % 2}", epoch=1, seq=seq),
        attempt=TaskAttempt(task=group, seed=1, group=group, attempt=attempt),
        split=Split.TRAIN if evaluation < 0 else Split.HELDOUT,
        evaluation=evaluation,
        token_ids=token_ids.astype(np.int32),
        loss_mask=sampled.astype(np.uint8),
        behavior_logprobs=np.where(sampled, -0.25, 0.0).astype(np.float32),
        versions=np.where(sampled, serial, -1).astype(np.int32),
        turns=turn_T,
        turn_rewards=np.array([0.0] * (count - 1) + [0.0 if failed else reward], np.float32)[:count],
        scores=() if failed else tuple(scores),
        outcome=outcome,
        tool_calls=tuple(calls),
        note=note,
        timings=Timings(
            started_s=started_s + seq, finished_s=started_s + seq + 2.0, generate_s=1.25, tools_s=0.5,
            marks_ms=(0, 750, 1250, 1300, 1800, 1900)[: 3 * count],
        ),
    )  # fmt: skip


def call(name: str, turn: int = 0, status: ToolStatus = ToolStatus.OK, **arguments: Any) -> ToolCall:
    return ToolCall(turn=turn, name=name, arguments=arguments, status=status, latency_s=0.5, cached=turn > 0)


Verdict = Literal["buffered", "evaluated", "duplicate", "failed_infrastructure", "unproven"]


class RunMaker:
    """Writes a run folder as the roles do.

    Example: ``run = RunMaker(tmp_path, chat); run.receive(episode(..)); run.train(0, [..]); run.close()``.
    """

    def __init__(self, folder: Path, chat: Chat | None = None, *, segment_bytes: int = 64 << 20) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        configuration.save(load_config("research"), folder / "config.toml")
        if chat is not None:
            (folder / "checkpoints/warmup").mkdir(parents=True)
            chat.tokenizer.backend_tokenizer.save(str(folder / "checkpoints/warmup/tokenizer.json"))
        self.log = IngestLog(folder / "trajectories", segment_bytes=segment_bytes)

    def publish(self, serial: int, *, step: int, incarnation: int = 0, fork_step: int = 0) -> None:
        update = synthetic.update(serial, step=step, incarnation=incarnation, fork_step=fork_step)
        self.log.append(events.Published(update=update))

    def receive(self, made: Trajectory, verdict: Verdict = "buffered") -> None:
        serials = tuple(sorted({int(serial) for serial in made.versions if serial >= 0}))
        event = events.Received(
            identity=made.identity, attempt=made.attempt, split=made.split, evaluation=made.evaluation,
            issue=made.issue, outcome=made.outcome, success=made.success,
            reward=float(made.turn_rewards.sum()), turns=len(made.turn_rewards),
            tokens=int(made.loss_mask.sum()), serials=serials, verdict=verdict,
        )  # fmt: skip
        self.log.append(event, encode_trajectory(made))

    def train(self, batch: int, made: Sequence[Trajectory], *, done_s: float = 1_700_000_010.0) -> None:
        """Hand out the batch behind `batch` steps and write the row of the step that it made."""
        self.log.append(events.Trained(step=batch, identities=tuple(one.identity for one in made)))
        row = {"kind": "train", "step": batch + 1, "time": done_s, "seconds/step": 4.0,
               "wait/learner_starved": 0.25, "reward": 0.5, "success": 0.5}  # fmt: skip
        append_row(self.folder / "metrics.jsonl", row)

    def close(self) -> None:
        self.log.close()


def small_run(folder: Path, chat: Chat) -> dict[str, Trajectory]:
    """Write a run of two groups, one of them trained, and an evaluation; return its episodes by name."""
    made = {
        "good": episode(
            chat, "Where does Ada live?", "search Ada", "5", "Oslo", seq=0,
            calls=[call("search", query="Ada"), call("answer", 1, text="Oslo")],
        ),
        "bad": episode(
            chat, "Where does Ada live?", "no idea", "error: no call", "Rome", seq=1, attempt=1, reward=-1.0,
            calls=[call("answer", 1, ToolStatus.ERROR, text="Rome")],
        ),
        "hostile": episode(
            chat, HOSTILE, HOSTILE, HOSTILE, "done", seq=2, group=1, serial=1, reward=0.5, note=HOSTILE,
            outcome=Outcome.TIMED_OUT, calls=[call(HOSTILE, query=HOSTILE)],
        ),
        "failed": episode(
            chat, "Where?", "hm", seq=3, group=1, attempt=1, serial=1, reward=0.0,
            outcome=Outcome.INFRASTRUCTURE_FAILURE, note="the database is gone",
        ),
        "held": episode(chat, "Where does Bo live?", "Rome", seq=4, group=7, evaluation=1, serial=1),
    }  # fmt: skip
    beside = (
        Score(name="pages", kind=ScoreKind.METRIC, weight=0.0, value=7.0),
        Score(name="loops", kind=ScoreKind.MONITOR, weight=0.0, value=1.0, invalid="the same call thrice"),
    )
    made["held"] = dataclasses.replace(made["held"], scores=(*made["held"].scores, *beside))
    run = RunMaker(folder, chat)
    run.publish(0, step=0)
    run.receive(made["good"])
    run.receive(made["bad"])
    run.publish(1, step=1)
    run.publish(2, step=2)
    run.train(2, [made["good"], made["bad"]])
    run.receive(made["hostile"])
    run.receive(made["failed"], "failed_infrastructure")
    run.receive(made["held"], "evaluated")
    run.log.append(events.EvaluationDone(serial=1, step=1, success=1.0, count=1, metrics={}))
    run.close()
    return made
