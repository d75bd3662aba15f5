"""The whole head against its two parts, over all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream_kernels import (
    KernelError,
    Objective,
    finish_metrics,
    linear_logprob,
    linear_policy_loss,
    native,
    policy_loss,
)
from slipstream_kernels.testing import assert_matches_reference


def case(count: int = 40) -> tuple[list[torch.Tensor], dict[str, Any]]:
    hidden, weight = torch.randn(count, 8), torch.randn(13, 8)
    inputs = {
        "behavior_N": -torch.rand(count) - 1,
        "reference_N": -torch.rand(count) - 1,
        "advantage_N": torch.randn(count),
        "weight_N": torch.randint(0, 2, (count,)).float(),
        "cu_seqlens": torch.tensor([0, 10, 10, 25, 40]),
        "objective": Objective(
            kl_coefficient=0.1, entropy_coefficient=0.05, importance_cap=2.0, trust_low=0.2
        ),
    }
    return [hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, 13, (count,))], inputs


def test_equals_its_parts_over_all_rows() -> None:
    (hidden, weight, labels), inputs = case()
    temperature = torch.rand(40) + 0.5
    logprob, entropy, _ = linear_logprob(hidden, weight, labels, inverse_temperature=temperature)
    expected = policy_loss(logprob, entropy_N=entropy, **inputs)
    labels = torch.where(inputs["weight_N"] > 0, labels, -100)
    actual = linear_policy_loss(hidden, weight, labels, inverse_temperature=temperature, **inputs)
    assert_matches_reference(actual.loss, expected.loss)
    assert_matches_reference(actual.grad_logprob_N, expected.grad_logprob_N)
    gradients = torch.autograd.grad(actual.loss, [hidden, weight])
    for one, other in zip(gradients, torch.autograd.grad(expected.loss, [hidden, weight]), strict=True):
        assert_matches_reference(one, other)
    truth = finish_metrics(expected.metrics)
    for name, value in finish_metrics(actual.metrics).items():
        assert_matches_reference(value, truth[name])


def test_rows_of_weight_zero_never_reach_the_head() -> None:
    (hidden, weight, labels), inputs = case()
    poisoned = torch.where(inputs["weight_N"][:, None] > 0, hidden, torch.nan).detach().requires_grad_()
    clean = linear_policy_loss(hidden, weight, labels, **inputs)
    actual = linear_policy_loss(poisoned, weight, labels, **inputs)
    assert_matches_reference(actual.loss, clean.loss)
    (gradient,) = torch.autograd.grad(actual.loss, poisoned)
    assert not gradient[inputs["weight_N"] == 0].any()


def test_no_trained_row_gives_a_zero_loss_that_backpropagates() -> None:
    (hidden, weight, labels), inputs = case()
    result = linear_policy_loss(hidden, weight, labels, **(inputs | {"weight_N": torch.zeros(40)}))
    gradients = torch.autograd.grad(result.loss, [hidden, weight])
    assert result.loss.item() == 0.0
    assert not any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.skipif(not native.available(), reason=native.description())
def test_gradients_serve_one_backward_pass() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    result = linear_policy_loss(
        hidden,
        weight,
        torch.tensor([0, 1, 2]),
        behavior_N=torch.full((3,), -1.0),
        advantage_N=torch.ones(3),
        weight_N=torch.ones(3),
        cu_seqlens=torch.tensor([0, 3]),
        objective=Objective(),
    )
    (3.0 * result.loss).backward(retain_graph=True)
    first = weight.grad
    assert first is not None and first.abs().sum() > 0
    kept = first.clone()
    with pytest.raises(KernelError, match="linear_policy_loss: its gradients serve one backward pass"):
        result.loss.backward()
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "members",
    [
        {"dual_clip": 1.5, "importance_cap": 1.3, "entropy_coefficient": 0.2},
        {"surrogate": "sapo", "penalty": "k3", "correction": "mask", "importance_cap": 1.3},
        {"penalty": "k3", "correction": "none", "aggregation": "sequence_mean_token_mean"},
    ],
)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_of_the_reference(members: dict[str, Any], softcap: float | None) -> None:
    """Of objectives that hold no function of logprob still; ratios are away from the kinks."""
    hidden, weight, bias = (torch.randn(size, dtype=torch.float64) for size in ((6, 3), (5, 3), (5,)))
    labels = torch.tensor([0, 4, -100, 2, 1, 3])
    trained = torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0, 1.0])
    head: dict[str, Any] = {
        "inverse_temperature": torch.rand(6, dtype=torch.float64) + 0.5,
        "softcap": softcap,
    }
    logprob, _, _ = linear_logprob(hidden, weight, labels.clamp(min=0), bias_V=bias, **head)
    # Current / proximal is 1.35, 0.67, 1.82 and 1.11, the fourth past the dual clip.
    moved = torch.tensor([0.3, -0.4, 9.0, 0.6, 0.1, -0.1], dtype=torch.float64)
    proximal = logprob - moved
    inputs: dict[str, Any] = {
        "behavior_N": proximal - torch.tensor([0.4, -0.2, 9.0, 0.1, 0.2, 0.5], dtype=torch.float64),
        "proximal_N": proximal,
        "reference_N": logprob + torch.tensor([0.5, -0.3, 9.0, 0.2, -0.8, 0.1], dtype=torch.float64),
        "advantage_N": torch.tensor([-1.0, 0.8, 9.0, -0.5, 1.2, -0.7], dtype=torch.float64),
        "weight_N": trained,
        "cu_seqlens": torch.tensor([0, 2, 2, 6]),
        "objective": Objective(kl_coefficient=0.3, **members),
    }

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result = linear_policy_loss(
            hidden, weight, labels, bias_V=bias, backend="reference", **head, **inputs
        )
        return result.loss

    assert torch.autograd.gradcheck(loss, tuple(one.requires_grad_() for one in (hidden, weight, bias)))
