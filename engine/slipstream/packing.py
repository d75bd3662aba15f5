"""Floor 2. Trajectories to packed micro-batches, and back: no padding, a common beginning packed once.

A policy's hidden state depends on the tokens before it and on nothing else. So segments that begin
alike, as those of a group do, share one packed token for each token of their common beginning: the
decoder runs on the nodes of a prefix tree.

    segments  [a b c d], [a b c e]    packed  a b c d e    path  0 1 2 3, 0 1 2 4    shared  0, 3

Dimensions: T packed tokens, B segments of a micro-batch, P tokens of its segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slipstream.types import Float32Array, Int32Array, Trajectory

Int64Array = NDArray[np.int64]
Float64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """A micro-batch. Token p of a segment is scored from the hidden state of the packed token path[p - 1]."""

    token_ids: Int32Array
    """[T] packed tokens."""
    positions: Int32Array
    """[T] position of each in its segments."""
    path: Int64Array
    """[P] the packed token that stands for each token of the segments, one segment after another."""
    shared: Int64Array
    """[B] leading tokens of each segment that an earlier segment holds."""
    cu_seqlens: Int64Array
    """[B + 1] where segments start; the last entry is P."""
    weight: Float32Array
    """[P] 1 where the token is trained; never at a segment's first token."""
    behavior_logprobs: Float32Array
    """[P] nats; 0 where weight is 0."""
    advantages: Float32Array
    """[P] advantage of the token's trajectory."""
    temperatures: Float64Array
    """[P] what the token's trajectory was sampled at."""
    source: Int64Array
    """[B] index of each segment's trajectory in the packed sequence of trajectories."""


def prefix_order(sequences: Sequence[Int32Array]) -> tuple[Int64Array, Int64Array]:
    """Return [B] the order of token sequences in which those that begin alike are neighbours, and [B] shared.

    shared[b] counts the leading tokens that sequence order[b] has in common with order[b - 1].
    """
    # Big-endian bytes compare as the non-negative numbers do.
    keys = [tokens.astype(">u4").tobytes() for tokens in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    shared = np.zeros(len(order), dtype=np.int64)
    for place in range(1, len(order)):
        shared[place] = _common(sequences[order[place - 1]], sequences[order[place]])
    return np.array(order, dtype=np.int64), shared


def _common(one: Int32Array, other: Int32Array) -> int:
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


def shared_paths(lengths: Int64Array, shared: Int64Array) -> Int64Array:
    """Return [P]: the packed token of each token, where segment b begins with shared[b] of segment b - 1."""
    ends = np.cumsum(lengths)
    first = np.cumsum(lengths - shared) - (lengths - shared)
    total = int(ends[-1]) if len(ends) else 0
    path: Int64Array = np.arange(total) - np.repeat(ends - lengths + shared - first, lengths)
    for segment in np.flatnonzero(shared):
        start, common = ends[segment] - lengths[segment], shared[segment]
        before = start - lengths[segment - 1]
        path[start : start + common] = path[before : before + common]
    return path


def pack(
    trajectories: Sequence[Trajectory],
    advantages: Float32Array,
    weights: Sequence[Float32Array],
    *,
    token_budget: int,
) -> list[PackedBatch]:
    """Split trajectories into micro-batches of at most `token_budget` packed tokens.

    `advantages` is [trajectories]; `weights` holds a [T] array each, at most the trajectory's loss
    mask. Segments that begin alike are neighbours. A single segment longer than the budget gets a
    micro-batch of its own; one without tokens is left out.
    """
    segments = [
        _Segment(
            source=index,
            token_ids=trajectory.token_ids[span],
            behavior_logprobs=trajectory.behavior_logprobs[span],
            weight=weight[span],
            temperature=trajectory.sampling.temperature,
        )
        for index, (trajectory, weight) in enumerate(zip(trajectories, weights, strict=True))
        for span in trajectory.spans
        if span.start < span.stop
    ]
    order, shared = prefix_order([segment.token_ids for segment in segments])
    batches: list[PackedBatch] = []
    chosen: list[_Segment] = []
    commons: list[int] = []
    used = 0
    for segment, common in zip([segments[i] for i in order], shared.tolist(), strict=True):
        length = len(segment.token_ids)
        if chosen and used + length - common > token_budget:
            batches.append(_packed(chosen, commons, advantages))
            chosen, commons, used = [], [], 0
        commons.append(common if chosen else 0)
        chosen.append(segment)
        used += length - commons[-1]
    if chosen:
        batches.append(_packed(chosen, commons, advantages))
    return batches


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Segment:
    """A part of a trajectory that is scored by itself."""

    source: int
    """Index of the trajectory."""
    token_ids: Int32Array
    behavior_logprobs: Float32Array
    weight: Float32Array
    temperature: float


def _packed(parts: Sequence[_Segment], commons: Sequence[int], advantages: Float32Array) -> PackedBatch:
    lengths = np.array([len(part.token_ids) for part in parts], dtype=np.int64)
    source = np.array([part.source for part in parts], dtype=np.int64)
    shared = np.array(commons, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    weight = np.concatenate([part.weight for part in parts]).astype(np.float32)
    # Nothing precedes a first token, so nothing can predict it.
    weight[starts] = 0.0
    within = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    own = within >= np.repeat(shared, lengths)
    return PackedBatch(
        token_ids=np.concatenate([part.token_ids for part in parts])[own],
        positions=within[own].astype(np.int32),
        path=shared_paths(lengths, shared),
        shared=shared,
        cu_seqlens=np.append(starts, lengths.sum()),
        weight=weight,
        behavior_logprobs=np.where(
            weight > 0, np.concatenate([part.behavior_logprobs for part in parts]), 0.0
        ).astype(np.float32),
        advantages=np.repeat(advantages[source], lengths).astype(np.float32),
        temperatures=np.repeat(np.array([part.temperature for part in parts], np.float64), lengths),
        source=source,
    )
