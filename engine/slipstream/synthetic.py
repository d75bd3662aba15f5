"""Floor 1. Made-up trajectories and weights, valid in every field, for tests and benchmarks."""

from __future__ import annotations

import dataclasses

import numpy as np

from slipstream.types import (
    Lease,
    Outcome,
    Sampling,
    Score,
    ScoreKind,
    Split,
    TaskAttempt,
    ToolCall,
    ToolStatus,
    Trajectory,
    TrajectoryId,
    Version,
    WeightProof,
    WeightUpdate,
)

BYTES_PER_TOKEN = 15


def trajectory(tokens: int = 32, *, turns: int = 2, serial: int = 0, seed: int = 0) -> Trajectory:
    """Return a trajectory of T tokens, the second half of them sampled under one serial."""
    random = np.random.default_rng(seed)
    mask = np.zeros(tokens, np.uint8)
    mask[tokens // 2 :] = 1
    sampled = mask == 1
    return Trajectory(
        identity=TrajectoryId(run="run", actor="actor", epoch=0, seq=seed),
        attempt=TaskAttempt(task=0, seed=1, group=0, attempt=0),
        split=Split.TRAIN,
        evaluation=-1,
        issue=0,
        token_ids=random.integers(0, 32_000, tokens, dtype=np.int32),
        loss_mask=mask,
        behavior_logprobs=np.where(sampled, -random.random(tokens), 0.0).astype(np.float32),
        versions=np.where(sampled, serial, -1).astype(np.int32),
        turns=np.where(sampled, np.arange(tokens) % turns, -1).astype(np.int16),
        turn_rewards=random.random(turns, dtype=np.float32),
        scores=(Score(name="answer", kind=ScoreKind.OUTCOME, weight=1.0, value=1.0),),
        outcome=Outcome.COMPLETED,
        tool_calls=(
            ToolCall(turn=0, name="search", arguments={"query": "x"}, status=ToolStatus.OK, latency_s=0.1),
        ),
        sampling=Sampling(),
    )


def answer_to(lease: Lease, *, serial: int, tokens: int = 32, seed: int = 0) -> Trajectory:
    """Return a trajectory for a lease, sampled under `serial`, or under the lease's pinned one."""
    made = trajectory(tokens, serial=lease.evaluation if lease.evaluation >= 0 else serial, seed=seed)
    sampling = made.sampling
    if lease.temperature is not None:
        sampling = dataclasses.replace(sampling, temperature=lease.temperature)
    return dataclasses.replace(
        made, attempt=lease.attempt, split=lease.split, evaluation=lease.evaluation, issue=lease.issue,
        stage=lease.stage, sampling=sampling,
    )  # fmt: skip


def update(serial: int, *, step: int, incarnation: int = 0, fork_step: int = 0) -> WeightUpdate:
    """Return the announcement of made-up weights."""
    version = Version(
        serial=serial, incarnation=incarnation, step=step, fork_step=fork_step, checksum64=1000 + step
    )
    return WeightUpdate(version=version, folder="none", canary_tokens=(1, 2, 3), canary_logprobs=(-0.5, -1.5))


def proof(announced: WeightUpdate) -> WeightProof:
    """Return the right proof of an announcement."""
    return WeightProof(
        serial=announced.version.serial,
        checksum64=announced.version.checksum64,
        canary_logprobs=announced.canary_logprobs,
    )
