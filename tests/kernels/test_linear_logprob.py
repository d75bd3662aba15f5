"""The linear log-probability against log_softmax in float64, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream_kernels import BackendError, ShapeError, linear_logprob, reference
from slipstream_kernels.testing import assert_matches_reference


def naive(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: Any = 1.0,
    bias: Any = 0.0,
    softcap: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = hidden @ weight.T + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits * (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    log_p = logits.log_softmax(1)
    return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(1), logits.logsumexp(1)


def case(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tensors = [
        torch.randn(rows, hidden, dtype=dtype),
        torch.randn(vocabulary, hidden, dtype=dtype),
        torch.randn(vocabulary, dtype=dtype),
    ]
    return [*(t.requires_grad_() for t in tensors), torch.randint(0, vocabulary, (rows,))]


@pytest.mark.parametrize(
    ("rows", "hidden", "vocabulary"), [(1, 1, 1), (7, 5, 3), (64, 16, 33), (129, 8, 257), (0, 4, 9)]
)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_values_and_gradients(
    rows: int,
    hidden: int,
    vocabulary: int,
    softcap: float | None,
    per_row: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Several chunks, the last one ragged.
    monkeypatch.setattr(reference.linear, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(reference.linear, "MIN_CHUNK_ROWS", 10)
    h, w, b, labels = case(rows, hidden, vocabulary)
    temperature = torch.rand(rows, dtype=torch.float64) + 0.5 if per_row else 0.7
    got = linear_logprob(h, w, labels, inverse_temperature=temperature, bias_V=b, softcap=softcap)
    expected = naive(h, w, labels, temperature, b, softcap)
    # Upstream gradients differ by row and output: a kernel that assumes ones would pass otherwise.
    upstream = [torch.randn(rows, dtype=torch.float64) for _ in range(3)]
    gradients = torch.autograd.grad(got, [h, w, b], upstream)
    truths = torch.autograd.grad(expected, [h, w, b], upstream)
    for actual, truth in zip([*got, *gradients], [*expected, *truths], strict=True):
        assert_matches_reference(actual, truth, dtype=torch.float64)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_gradcheck(
    softcap: float | None, per_row: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference.linear, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(reference.linear, "MIN_CHUNK_ROWS", 2)
    *differentiable, labels = case(3, 4, 6)
    temperature = torch.rand(3, dtype=torch.float64) + 0.5 if per_row else 0.7

    def op(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return linear_logprob(
            hidden, weight, labels, inverse_temperature=temperature, bias_V=bias, softcap=softcap
        )

    assert torch.autograd.gradcheck(op, differentiable if biased else differentiable[:2])


def test_gradient_of_one_output_alone() -> None:
    h, w, _, labels = case(9, 4, 11)
    for index in range(3):
        actual = torch.autograd.grad(linear_logprob(h, w, labels)[index].square().sum(), [h, w])
        truth = torch.autograd.grad(naive(h, w, labels)[index].square().sum(), [h, w])
        for one, other in zip(actual, truth, strict=True):
            assert_matches_reference(one, other, dtype=torch.float64)


def test_bfloat16_input_is_scored_in_float32() -> None:
    h, w, _, labels = case(32, 64, 500, torch.bfloat16)
    logprob, entropy, _ = linear_logprob(h, w, labels)
    expected = naive(h.double(), w.double(), labels)
    assert logprob.dtype is torch.float32
    # Logits rounded to bfloat16 would be off by about 1e-1 here.
    assert (logprob - expected[0]).abs().max().item() < 2e-5 * 30
    assert (entropy - expected[1]).abs().max().item() < 2e-5 * 30
    (grad_hidden,) = torch.autograd.grad(logprob.sum(), h)
    assert grad_hidden.dtype is torch.bfloat16


def test_confident_rows_keep_their_entropy() -> None:
    # All but one logit at -1e4: entropy is exactly 0, not the rounding of 1e4.
    weight = torch.full((8, 1), -1e4)
    weight[3] = 1e4
    logprob, entropy, logsumexp = linear_logprob(torch.ones(2, 1), weight, torch.tensor([3, 0]))
    assert logprob.tolist() == [0.0, -2e4]
    assert entropy.tolist() == [0.0, 0.0]
    assert logsumexp.tolist() == [1e4, 1e4]


def test_chunks_do_not_change_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    h, w, _, labels = case(50, 16, 40, torch.float32)
    whole = linear_logprob(h, w, labels)
    monkeypatch.setattr(reference.linear, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(reference.linear, "MIN_CHUNK_ROWS", 7)
    for actual, expected in zip(linear_logprob(h, w, labels), whole, strict=True):
        assert_matches_reference(actual, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels_N": torch.tensor([0, 5])}, r"labels_N must be in \[0, 5\), got values from 0 to 5"),
        ({"labels_N": torch.tensor([-1, 0])}, "from -1 to 0"),
        ({"labels_N": torch.zeros(2)}, "labels_N must hold integers"),
        ({"labels_N": torch.tensor([0])}, r"labels_N must have shape \[2\], got \[1\]"),
        ({"weight_VH": torch.zeros(5, 4)}, r"got \[2, 3\] and \[5, 4\]"),
        ({"inverse_temperature": 0.0}, "inverse_temperature must be positive"),
        ({"inverse_temperature": torch.ones(3)}, r"inverse_temperature must have shape \[2\]"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"bias_V": torch.zeros(4)}, r"bias_V must have shape \[5\]"),
    ],
)
def test_refuses_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden_NH": torch.zeros(2, 3),
        "weight_VH": torch.zeros(5, 3),
        "labels_N": torch.tensor([0, 1]),
    }
    with pytest.raises(ShapeError, match=message):
        linear_logprob(**(arguments | changes))


def test_explicit_backend_never_falls_back() -> None:
    with pytest.raises(BackendError, match="linear_logprob: backend 'cuda' does not exist for this op"):
        linear_logprob(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 1]), backend="cuda")
