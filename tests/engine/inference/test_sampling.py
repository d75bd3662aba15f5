"""Sampling: golden numbers, the distribution drawn from, and the log-probability that is reported."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.inference.sampling import draw, rollout_key, uniforms

PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02])


def drawn(
    logits_V: Tensor, *, temperature: float = 1.0, top_p: float | None = None, count: int = 20_000
) -> tuple[Tensor, Tensor]:
    """Draw `count` times from one distribution, by evenly spread uniform numbers."""
    rows = logits_V.expand(count, -1)
    return draw(
        rows,
        temperature_R=torch.full((count,), temperature),
        top_p_R=None if top_p is None else torch.full((count,), top_p),
        uniform_R=(torch.arange(count, dtype=torch.float64) + 0.5) / count,
    )


def shares(tokens: Tensor) -> list[float]:
    return (torch.bincount(tokens, minlength=5) / len(tokens)).tolist()


def test_uniforms_are_splitmix64() -> None:
    """The first outputs of SplitMix64 seeded with 0 and 1234567, as in its authors' test vectors."""
    found = uniforms(np.array([0, 0, 0], np.uint64), np.array([0, 1, 2], np.uint64))
    outputs = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    assert found.tolist() == [(output >> 11) * 2.0**-53 for output in outputs]
    found = uniforms(np.array([1234567], np.uint64), np.array([0], np.uint64))
    assert found.tolist() == [(6457827717110365317 >> 11) * 2.0**-53]


def test_uniforms_are_uniform_over_keys_and_positions() -> None:
    keys = np.array([rollout_key("train", -1, task, 1, task, 0) for task in range(200)], np.uint64)
    values = np.concatenate([uniforms(keys, np.full(200, position, np.uint64)) for position in range(100)])
    assert values.min() >= 0 and values.max() < 1
    counts, _ = np.histogram(values, bins=100, range=(0, 1))
    # 99 degrees of freedom: 1 in 1,000 exceeds 149.
    assert ((counts - 200) ** 2 / 200).sum() < 149
    pairs = np.histogram2d(values[:-200], values[200:], bins=10, range=[[0, 1]] * 2)[0]
    assert ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum() < 149


def test_keys_differ_and_repeat() -> None:
    assert rollout_key("train", -1, 5, 1, 5, 0) == 6757338055237400307
    made = {rollout_key("train", -1, t, 1, t, a) for t in range(50) for a in range(8)}
    assert len(made) == 400
    assert rollout_key(1, 23) != rollout_key(12, 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_tempered_softmax(temperature: float) -> None:
    logits = PROBABILITIES.log() + 3.0
    tokens, logprobs = drawn(logits, temperature=temperature)
    expected = torch.softmax(logits / temperature, -1)
    assert shares(tokens) == pytest.approx(expected.tolist(), abs=1e-4)
    torch.testing.assert_close(logprobs, torch.log_softmax(logits / temperature, -1)[tokens])


def test_seeded_draws_follow_the_softmax() -> None:
    """Chi-square of what rollouts truly draw: 4 degrees of freedom, 1 in 1,000 exceeds 18.5."""
    keys = np.array([rollout_key(index) for index in range(4000)], np.uint64)
    tokens, _ = draw(
        PROBABILITIES.log().expand(4000, -1),
        temperature_R=torch.ones(4000),
        top_p_R=None,
        uniform_R=torch.from_numpy(uniforms(keys, np.full(4000, 17, np.uint64))),
    )
    expected = PROBABILITIES * 4000
    assert float(((torch.bincount(tokens, minlength=5) - expected) ** 2 / expected).sum()) < 18.5


def test_temperature_zero_takes_the_likeliest() -> None:
    tokens, logprobs = drawn(PROBABILITIES.flip(0).log(), temperature=0.0, count=50)
    assert set(tokens.tolist()) == {4}
    assert logprobs.tolist() == pytest.approx([math.log(0.5)] * 50)


def test_nucleus_keeps_the_likeliest_and_renormalises() -> None:
    """0.5 + 0.25 < 0.8 <= 0.5 + 0.25 + 0.15: three tokens stay."""
    tokens, logprobs = drawn(PROBABILITIES.log(), top_p=0.8)
    kept = (PROBABILITIES[:3] / 0.9).tolist()
    assert shares(tokens) == pytest.approx([*kept, 0, 0], abs=1e-4)
    torch.testing.assert_close(logprobs, torch.tensor(kept).log()[tokens])


def test_rows_keep_their_own_temperature_and_nucleus() -> None:
    tokens, logprobs = draw(
        PROBABILITIES.log().expand(3, -1),
        temperature_R=torch.tensor([0.0, 1.0, 1.0]),
        top_p_R=torch.tensor([1.0, 0.3, 1.0]),
        uniform_R=torch.tensor([0.99, 0.99, 0.99], dtype=torch.float64),
    )
    assert tokens.tolist() == [0, 0, 4]
    assert logprobs.tolist() == pytest.approx([math.log(0.5), 0.0, math.log(0.02)], abs=1e-6)


def test_no_draw_has_probability_zero() -> None:
    """Even at the ends of the unit interval."""
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]] * 2)
    tokens, _ = draw(
        logits,
        temperature_R=torch.ones(2),
        top_p_R=None,
        uniform_R=torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64),
    )
    assert tokens.tolist() == [1, 2]
