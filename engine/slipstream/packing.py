"""Floor 2. Trajectories to packed micro-batches, and back: no padding, segments of similar length together.

Dimensions: T packed tokens, B segments of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slipstream.types import Float32Array, Int32Array, Trajectory

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """A micro-batch. Position t holds what is needed to score token t from the hidden state of t - 1."""

    token_ids: Int32Array
    """[T] tokens of all segments, one after another."""
    positions: Int32Array
    """[T] position of each token in its segment."""
    cu_seqlens: Int64Array
    """[B + 1] where segments start; the last entry is T."""
    weight: Float32Array
    """[T] 1 where the token is trained; never at a segment's first token."""
    behavior_logprobs: Float32Array
    """[T] nats; 0 where weight is 0."""
    advantages: Float32Array
    """[T] advantage of the token's trajectory."""
    source: Int64Array
    """[B] index of each segment's trajectory in the packed sequence of trajectories."""


def pack(
    trajectories: Sequence[Trajectory],
    advantages: Float32Array,
    weights: Sequence[Float32Array],
    *,
    token_budget: int,
) -> list[PackedBatch]:
    """Split trajectories into micro-batches of at most `token_budget` tokens.

    `advantages` is [trajectories]; `weights` holds a [T] array each, at most the trajectory's loss
    mask. Trajectories are ordered by length, so that attention, which alone pads, wastes little. A
    single trajectory longer than the budget gets a micro-batch of its own; one without tokens is left out.
    """
    lengths = np.array([len(t.token_ids) for t in trajectories], dtype=np.int64)
    batches: list[PackedBatch] = []
    chosen: list[int] = []
    used = 0
    for index in np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]:
        if chosen and used + lengths[index] > token_budget:
            batches.append(_packed(trajectories, advantages, weights, chosen))
            chosen, used = [], 0
        chosen.append(int(index))
        used += int(lengths[index])
    if chosen:
        batches.append(_packed(trajectories, advantages, weights, chosen))
    return batches


def _packed(
    trajectories: Sequence[Trajectory],
    advantages: Float32Array,
    weights: Sequence[Float32Array],
    chosen: Sequence[int],
) -> PackedBatch:
    parts = [trajectories[i] for i in chosen]
    lengths = np.array([len(t.token_ids) for t in parts], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    weight = np.concatenate([weights[i] for i in chosen]).astype(np.float32)
    # Nothing precedes a first token, so nothing can predict it.
    weight[starts] = 0.0
    return PackedBatch(
        token_ids=np.concatenate([t.token_ids for t in parts]),
        positions=(np.arange(lengths.sum()) - np.repeat(starts, lengths)).astype(np.int32),
        cu_seqlens=np.append(starts, lengths.sum()),
        weight=weight,
        behavior_logprobs=np.where(
            weight > 0, np.concatenate([t.behavior_logprobs for t in parts]), 0.0
        ).astype(np.float32),
        advantages=np.repeat(advantages[np.array(chosen)], lengths).astype(np.float32),
        source=np.array(chosen, dtype=np.int64),
    )
