"""Packing: every token once, in its place, within the budget."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream import synthetic
from slipstream.packing import PackedBatch, pack
from slipstream.training import DeviceBatch
from slipstream.types import Float32Array, Sampling, Trajectory

BUDGET = 32


def made(lengths: list[int]) -> tuple[list[Trajectory], Float32Array, list[Float32Array]]:
    trajectories = [synthetic.trajectory(n, seed=i) for i, n in enumerate(lengths)]
    return (
        trajectories,
        np.arange(1, len(lengths) + 1, dtype=np.float32),
        [t.loss_mask.astype(np.float32) for t in trajectories],
    )


def alike(trajectories: list[Trajectory], common: int) -> list[Trajectory]:
    """Give all trajectories the first tokens of the first."""
    first = trajectories[0].token_ids[:common]
    return [
        dataclasses.replace(
            t, token_ids=np.concatenate([first[: len(t.token_ids)], t.token_ids[len(first) :]])
        )
        for t in trajectories
    ]


def segments(batch: PackedBatch) -> list[tuple[int, slice]]:
    bounds = batch.cu_seqlens.tolist()
    return [(int(i), slice(*bounds[k : k + 2])) for k, i in enumerate(batch.source)]


@given(st.lists(st.integers(1, BUDGET + 1), min_size=1, max_size=40), st.integers(0, 20))
def test_every_token_once_with_what_belongs_to_it(lengths: list[int], common: int) -> None:
    trajectories, advantages, weights = made(lengths)
    trajectories = alike(trajectories, common)
    batches = pack(trajectories, advantages, weights, token_budget=BUDGET)
    seen = []
    for batch in batches:
        assert len(batch.token_ids) <= BUDGET or len(batch.source) == 1
        assert batch.cu_seqlens[-1] == len(batch.path)
        assert sorted(set(batch.path.tolist())) == list(range(len(batch.token_ids)))
        for index, span in segments(batch):
            seen.append(index)
            one = trajectories[index]
            weight = weights[index].copy()
            weight[0] = 0
            path = batch.path[span]
            np.testing.assert_array_equal(batch.token_ids[path], one.token_ids)
            np.testing.assert_array_equal(batch.positions[path], np.arange(lengths[index]))
            np.testing.assert_array_equal(batch.weight[span], weight)
            np.testing.assert_array_equal(batch.behavior_logprobs[span], one.behavior_logprobs * weight)
            np.testing.assert_array_equal(batch.advantages[span], np.full(lengths[index], index + 1))
    assert sorted(seen) == list(range(len(lengths)))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12))
def test_a_packed_token_stands_for_equal_beginnings_and_for_nothing_else(sequences: list[list[int]]) -> None:
    """As many packed tokens as there are different beginnings."""
    trajectories, advantages, weights = made([len(sequence) for sequence in sequences])
    trajectories = [
        dataclasses.replace(t, token_ids=np.array(sequence, np.int32))
        for t, sequence in zip(trajectories, sequences, strict=True)
    ]
    (batch,) = pack(trajectories, advantages, weights, token_budget=10_000)
    beginnings = {tuple(sequence[: n + 1]) for sequence in sequences for n in range(len(sequence))}
    assert len(batch.token_ids) == len(beginnings)
    own = np.diff(batch.cu_seqlens) - batch.shared
    assert own.sum() == len(batch.token_ids)
    for (index, span), first in zip(segments(batch), np.cumsum(own) - own, strict=True):
        count = len(sequences[index]) - int(batch.shared[batch.source.tolist().index(index)])
        assert batch.path[span][len(sequences[index]) - count :].tolist() == list(range(first, first + count))


def test_batches_hold_neighbours_in_the_order_of_their_tokens() -> None:
    """Trajectories 0, 2 and 4 share ten tokens, so that 20 + 10 + 2 fit; the long one is alone."""
    trajectories, advantages, weights = made([20, 20, 20, 33, 12])
    for first, trajectory in zip([7, 5, 7, 6, 7], trajectories, strict=True):
        trajectory.token_ids[:10] = first
    batches = pack(trajectories, advantages, weights, token_budget=BUDGET)
    assert [sorted(batch.source.tolist()) for batch in batches] == [[1], [3], [0, 2, 4]]
    assert batches[-1].shared.tolist() == [0, 10, 10]


def test_a_trajectory_without_tokens_is_left_out() -> None:
    trajectories, advantages, weights = made([3, 4])
    empty = {
        name: getattr(trajectories[0], name)[:0]
        for name in ("token_ids", "loss_mask", "behavior_logprobs", "versions", "turns")
    }
    trajectories[0] = dataclasses.replace(trajectories[0], **empty)
    weights[0] = weights[0][:0]
    (batch,) = pack(trajectories, advantages, weights, token_budget=BUDGET)
    assert batch.source.tolist() == [1]
    assert pack(trajectories[:1], advantages[:1], weights[:1], token_budget=BUDGET) == []


@pytest.mark.parametrize("lengths", [[1], [1, 1, 2], [5, 9, 1]])
def test_device_rows_predict_the_trained_tokens(lengths: list[int]) -> None:
    (batch,) = pack(*made(lengths), token_budget=BUDGET)
    rows = DeviceBatch.of(batch, torch.device("cpu"))
    trained = np.flatnonzero(batch.weight)
    assert rows.rows_N.tolist() == batch.path[trained - 1].tolist()
    assert rows.labels_N.tolist() == batch.token_ids[batch.path[trained]].tolist()
    assert rows.advantage_N.tolist() == batch.advantages[trained].tolist()
    assert rows.behavior_N.tolist() == batch.behavior_logprobs[trained].tolist()
    counts = [int((batch.weight[span] > 0).sum()) for _, span in segments(batch)]
    assert rows.cu_seqlens_B.tolist() == [0, *np.cumsum(counts).tolist()]


def test_the_segments_of_a_trajectory_are_packed_as_trajectories_of_their_own() -> None:
    """A history that was cut: the second segment begins like the first, and depends on none of its tokens."""
    trajectories, _, weights = made([12, 20])
    trajectories[1].token_ids[8:11] = trajectories[1].token_ids[:3]
    whole = dataclasses.replace(trajectories[1], segments=(8, 13))
    cut = [0, 8, 13, 20]
    names = ("token_ids", "loss_mask", "behavior_logprobs", "versions", "turns")
    parts = [
        dataclasses.replace(trajectories[1], **{name: getattr(whole, name)[a:b] for name in names})
        for a, b in itertools.pairwise(cut)
    ]
    worth = np.array([1, 2], np.float32)
    (batch,) = pack([trajectories[0], whole], worth, weights, token_budget=100)
    (apart,) = pack(
        [trajectories[0], *parts], np.array([1, 2, 2, 2], np.float32),
        [weights[0], *(weights[1][a:b] for a, b in itertools.pairwise(cut))], token_budget=100,
    )  # fmt: skip
    assert sorted(batch.source.tolist()) == [0, 1, 1, 1]
    for field in dataclasses.fields(batch):
        if field.name != "source":
            np.testing.assert_array_equal(getattr(batch, field.name), getattr(apart, field.name))
    assert len(batch.token_ids) <= 32 - 3


def test_device_rows_are_tempered_as_they_were_sampled() -> None:
    trajectories, advantages, weights = made([8, 6, 8])
    warm = [dataclasses.replace(t, sampling=Sampling(temperature=heat))
            for t, heat in zip(trajectories, (0.8, 1.25, 0.8), strict=True)]  # fmt: skip
    (batch,) = pack(warm, advantages, weights, token_budget=BUDGET)
    rows = DeviceBatch.of(batch, torch.device("cpu"))
    assert isinstance(rows.inverse_temperature, torch.Tensor)
    expected = [
        1 / warm[index].sampling.temperature
        for index, span in segments(batch)
        for trained in batch.weight[span]
        if trained
    ]
    assert rows.inverse_temperature.tolist() == pytest.approx(expected)
    # Where all are alike it is the number itself, to the last bit.
    (batch,) = pack(warm[::2], advantages[::2], weights[::2], token_budget=BUDGET)
    assert DeviceBatch.of(batch, torch.device("cpu")).inverse_temperature == 1.0 / 0.8
