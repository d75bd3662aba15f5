"""The divergence of two linear heads against log_softmax in float64, forward and backward.

Dimensions: N rows, H and K hidden sizes of p and q, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream_kernels import BackendError, ShapeError, linear_kl, reference
from slipstream_kernels.reference import Direction
from slipstream_kernels.testing import assert_matches_reference


def naive(
    heads: list[Tensor],
    labels: Tensor,
    direction: str,
    *,
    beta: float = 0.5,
    inverse_temperature: Any = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
        x = hidden @ weight.T
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        per_row = isinstance(inverse_temperature, Tensor)
        return (x * (inverse_temperature[:, None] if per_row else inverse_temperature)).log_softmax(1)

    log_p, log_q = log_softmax(*heads[:2]), log_softmax(*heads[2:])
    p, q = log_p.exp(), log_q.exp()
    log_m = (beta * p + (1 - beta) * q).log()
    match direction:
        case "forward":
            kl = (q * (log_q - log_p)).sum(1)
        case "reverse":
            kl = (p * (log_p - log_q)).sum(1)
        case _:
            kl = beta * (p * (log_p - log_m)).sum(1) + (1 - beta) * (q * (log_q - log_m)).sum(1)
    return kl, log_p.gather(1, labels[:, None])[:, 0], -(p * log_p).sum(1)


def case(rows: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    sizes = ((rows, 5), (vocabulary, 5), (rows, 3), (vocabulary, 3))
    heads = [torch.randn(size, dtype=dtype) for size in sizes]
    return [head.requires_grad_(index < 2) for index, head in enumerate(heads)], torch.randint(
        0, vocabulary, (rows,)
    )


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (7, 3), (23, 65), (0, 9)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_values_and_gradients(
    direction: Direction,
    rows: int,
    vocabulary: int,
    softcap: float | None,
    per_row: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Several chunks, the last one ragged.
    monkeypatch.setattr(reference.kl, "KL_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(reference.kl, "KL_MIN_CHUNK_ROWS", 10)
    heads, labels = case(rows, vocabulary)
    settings: dict[str, Any] = {
        "beta": 0.3,
        "inverse_temperature": torch.rand(rows, dtype=torch.float64) + 0.5 if per_row else 0.7,
        "softcap": softcap,
    }
    got = linear_kl(*heads, labels, direction=direction, **settings)
    expected = naive(heads, labels, direction, **settings)
    upstream = [torch.randn(rows, dtype=torch.float64) for _ in range(3)]
    gradients = torch.autograd.grad(got, heads[:2], upstream)
    truths = torch.autograd.grad(expected, heads[:2], upstream)
    for actual, truth in zip([*got, *gradients], [*expected, *truths], strict=True):
        assert_matches_reference(actual, truth, dtype=torch.float64)


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_gradcheck(
    direction: Direction, softcap: float | None, per_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference.kl, "KL_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(reference.kl, "KL_MIN_CHUNK_ROWS", 2)
    heads, labels = case(3, 6)
    settings: dict[str, Any] = {
        "direction": direction,
        "beta": 0.2,
        "inverse_temperature": torch.rand(3, dtype=torch.float64) + 0.5 if per_row else 0.7,
        "softcap": softcap,
    }

    def op(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return linear_kl(hidden, weight, *heads[2:], labels, **settings)

    assert torch.autograd.gradcheck(op, (heads[0], heads[1]))


@pytest.mark.parametrize("direction", Direction)
def test_of_itself_is_zero_and_far_heads_stay_finite(direction: Direction) -> None:
    heads, labels = case(4, 50, torch.float32)
    own = linear_kl(*heads[:2], *(head.detach() for head in heads[:2]), labels, direction=direction)
    torch.testing.assert_close(own[0], torch.zeros(4), rtol=0.0, atol=1e-6)
    (gradient,) = torch.autograd.grad(own[0].sum(), heads[0])
    torch.testing.assert_close(gradient, torch.zeros(4, 5), rtol=0.0, atol=1e-5)
    weight_p, weight_q = torch.full((6, 1), -1e4), torch.full((6, 1), -1e4)
    weight_p[0], weight_q[1] = 1e4, 1e4
    ones = torch.ones(1, 1)
    kl, _, entropy = linear_kl(ones, weight_p, ones, weight_q, torch.tensor([0]), direction=direction)
    expected = torch.tensor(2.0).log() if direction is Direction.JSD else torch.tensor(2e4)
    assert_matches_reference(kl, expected[None])
    assert entropy.tolist() == [0.0]


def test_jsd_exchanges_its_heads() -> None:
    heads, labels = case(6, 20)
    fixed = [head.detach() for head in heads]
    there = linear_kl(*fixed, labels, direction="jsd", beta=0.2)[0]
    back = linear_kl(*fixed[2:], *fixed[:2], labels, direction="jsd", beta=0.8)[0]
    assert_matches_reference(there, back, dtype=torch.float64)


def test_bfloat16_is_compared_in_float32() -> None:
    heads, labels = case(8, 100, torch.bfloat16)
    kl, _, _ = linear_kl(*heads, labels, direction="reverse")
    assert kl.dtype is torch.float32
    assert_matches_reference(kl, naive([head.double() for head in heads], labels, "reverse")[0])
    (gradient,) = torch.autograd.grad(kl.sum(), heads[1])
    assert gradient.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "sideways"}, "direction must be one of forward, reverse, jsd, got 'sideways'"),
        ({"beta": 1.0}, r"beta must be in \(0, 1\), got 1.0"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"inverse_temperature": -1.0}, "inverse_temperature must be positive"),
        ({"inverse_temperature": torch.ones(3)}, r"inverse_temperature must have shape \[2\]"),
        ({"inverse_temperature": torch.ones(2, requires_grad=True)}, "must not require a gradient"),
        ({"labels_N": torch.tensor([0, 5])}, r"labels_N must be in \[0, 5\)"),
        ({"weight_p_VH": torch.zeros(5, 4)}, r"hidden_p and weight_p must be .* got \[2, 3\] and \[5, 4\]"),
        ({"weight_q_VK": torch.zeros(4, 2)}, "got p: 2 rows, vocabulary 5; q: 2 rows, vocabulary 4"),
        ({"weight_q_VK": torch.zeros(5, 2, requires_grad=True)}, "weight_q_VK must not require a gradient"),
    ],
)
def test_refuses_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden_p_NH": torch.zeros(2, 3),
        "weight_p_VH": torch.zeros(5, 3),
        "hidden_q_NK": torch.zeros(2, 2),
        "weight_q_VK": torch.zeros(5, 2),
        "labels_N": torch.tensor([0, 1]),
        "direction": "reverse",
    }
    with pytest.raises(ShapeError, match=message):
        linear_kl(**(arguments | changes))


def test_triton_does_not_take_float64() -> None:
    heads, labels = case(2, 3)
    with pytest.raises(BackendError, match="backend 'triton' does not exist for this op"):
        linear_kl(*heads, labels, direction="reverse", backend="triton")
