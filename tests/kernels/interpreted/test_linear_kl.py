"""The Triton kernels of linear_kl, interpreted, against the reference in float64; and the same bits again.

Dimensions: N rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream_kernels import linear_kl, reference
from slipstream_kernels.reference import Direction
from slipstream_kernels.testing import assert_matches_reference
from slipstream_kernels.triton import linear_kl as kernels
from slipstream_kernels.tuning import Tile


def case(rows: int, vocabulary: int) -> tuple[list[Tensor], Tensor]:
    sizes = ((rows, 20), (vocabulary, 20), (rows, 12), (vocabulary, 12))
    heads = [torch.randn(size).requires_grad_(index < 2) for index, size in enumerate(sizes)]
    return heads, torch.randint(0, vocabulary, (rows,))


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(("rows", "vocabulary", "full"), [(1, 1, False), (17, 1025, True)])
def test_values_and_gradients(
    direction: Direction, rows: int, vocabulary: int, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(kernels, "MIN_CHUNK_ROWS", 12)
    heads, labels = case(rows, vocabulary)
    settings: dict[str, Any] = {"direction": direction, "beta": 0.3, "inverse_temperature": 0.7}
    if full:
        settings |= {"inverse_temperature": torch.rand(rows) + 0.5, "softcap": 4.0}
    got = linear_kl(*heads, labels, backend="triton", **settings)
    double = [head.detach().double().requires_grad_(head.requires_grad) for head in heads]
    expected = linear_kl(*double, labels, backend="reference", **settings)
    upstream = [torch.randn(rows) for _ in range(3)]
    for gradient in upstream:
        gradient[-1:] = 0.0
    gradients = torch.autograd.grad(got, heads[:2], upstream)
    truths = torch.autograd.grad(expected, double[:2], [gradient.double() for gradient in upstream])
    for actual, truth in zip([*got, *gradients], [*expected, *truths], strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=2e-5, atol=1e-5)
    assert not gradients[0][-1].any()


def test_no_rows() -> None:
    heads, labels = case(0, 9)
    results = linear_kl(*heads, labels, direction="reverse", backend="triton")
    assert [result.shape for result in results] == [(0,)] * 3
    (gradient,) = torch.autograd.grad([result.sum() for result in results], heads[1])
    assert not gradient.any()


@pytest.mark.parametrize("direction", Direction)
def test_far_heads(direction: Direction) -> None:
    """Logits of both heads far from 0, and of p far from those of q: probabilities that are 0 in float32."""
    vocabulary = 1030
    weight_p, weight_q = torch.full((vocabulary, 1), -1e4), torch.full((vocabulary, 1), -1e4)
    weight_p[1029], weight_q[3] = 1e4, 1e4
    ones, labels = torch.ones(2, 1), torch.tensor([1029, 3])
    kl, logprob, entropy = linear_kl(
        ones, weight_p, ones, weight_q, labels, direction=direction, backend="triton"
    )
    expected = torch.tensor(2.0).log() if direction is Direction.JSD else torch.tensor(2e4)
    assert_matches_reference(kl, expected.expand(2))
    assert_matches_reference(logprob, torch.tensor([0.0, -2e4]))
    assert entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "direction",
    [
        pytest.param(Direction.FORWARD, marks=pytest.mark.slow),
        Direction.REVERSE,
        pytest.param(Direction.JSD, marks=pytest.mark.slow),
    ],
)
def test_bits_depend_on_the_row_alone(direction: Direction) -> None:
    """Run again, permuted, or by descriptors instead of pointers: the same bits."""
    heads, labels = case(21, 1100)
    # These products sum exactly: elsewise NumPy's sums depend on where in its block a row stands.
    heads = [torch.randint(-8, 9, head.shape) / 8.0 for head in heads]
    settings = reference.KlSettings(
        direction=direction, beta=0.4, inverse_temperature=torch.tensor([1.3]), softcap=None
    )

    def run(rows: Tensor, descriptors: bool) -> list[Tensor]:
        tile = Tile(rows=16, columns=256, hidden=16, warps=4, stages=1, descriptors=descriptors)
        hidden_p, weight_p, hidden_q, weight_q = heads
        return list(
            kernels.linear_kl(
                hidden_p[rows], weight_p, hidden_q[rows], weight_q, labels[rows], settings=settings, tile=tile
            )
        )

    everything, permutation = torch.arange(21), torch.randperm(21)
    whole = run(everything, True)
    for again, index in ((run(everything, False), everything), (run(permutation, True), permutation)):
        assert all(torch.equal(one, other[index]) for one, other in zip(again, whole, strict=True))
