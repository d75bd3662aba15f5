"""The policy loss against published golden values, its own gradient and a micro-batch split."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream_kernels import (
    BackendError,
    Objective,
    ObjectiveError,
    PolicyLoss,
    ShapeError,
    batch_normalizer,
    finish_metrics,
    merge_metrics,
    policy_loss,
)
from slipstream_kernels.testing import assert_matches_reference

# Three segments of five: an observation hole, padding, and a fully masked segment with absurd ratios.
MASK = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]).float()
ADVANTAGE = torch.tensor([1.0] * 5 + [-0.8] * 5 + [2.0] * 5)
CURRENT = torch.tensor([0.1, -0.3, 0, 0.5, 0.02, -0.4, 0.25, 1.6, 0, 0] + [800.0] * 5)
PROXIMAL = torch.tensor([0.05, -0.2, 0, 0.3, 0.01, -0.3, 0.1, 1.2, 0, 0] + [800.0] * 5)
BEHAVIOR = torch.zeros(15)
BOUNDS = torch.tensor([0, 5, 10, 15])


def loss_of(**changes: Any) -> PolicyLoss:
    arguments: dict[str, Any] = {
        "behavior_N": BEHAVIOR,
        "proximal_N": PROXIMAL,
        "advantage_N": ADVANTAGE,
        "weight_N": MASK,
        "cu_seqlens": BOUNDS,
        "objective": Objective(),
    }
    logprob = changes.pop("logprob_N", CURRENT)
    return policy_loss(logprob, **(arguments | changes))


@pytest.mark.parametrize(
    ("aggregation", "fixed_length", "expected"),
    [
        ("token_mean", 0, -0.188480),
        ("sequence_mean_token_mean", 0, -0.046304),
        ("sequence_mean_token_sum", 0, -0.659681),
        ("fixed", 5, -0.087957),
    ],
)
def test_ppo_golden_by_aggregation(aggregation: Any, fixed_length: int, expected: float) -> None:
    objective = Objective(aggregation=aggregation, fixed_length=fixed_length)
    result = loss_of(behavior_N=PROXIMAL, objective=objective)
    assert result.loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, 0.148554),
        ({"importance_cap": 2.0}, -0.076518),
        # The fifth live token, exp(-0.4) and to become rarer still, keeps its place in the denominator;
        # without that it would be 0.083938. The last, exp(1.6), is led back.
        ({"trust_low": 0.7, "trust_high": 2.0}, 0.071946),
    ],
)
def test_decoupled_golden(members: dict[str, Any], expected: float) -> None:
    assert loss_of(objective=Objective(**members)).loss.item() == pytest.approx(expected, abs=1e-6)


def test_health_metrics_golden() -> None:
    metrics = finish_metrics(loss_of(objective=Objective(trust_low=0.7, trust_high=2.0)).metrics)
    expected = {
        "ratio/ess": 0.579554,
        "mismatch/k1": -0.252857,
        "mismatch/k3": 0.378899,
        "ratio/max": math.exp(1.6),
        "importance/mean": (math.exp(0.05) + math.exp(-0.2) + math.exp(0.3) + math.exp(0.01)) / 7
        + (math.exp(-0.3) + math.exp(0.1) + math.exp(1.2)) / 7,
        "clip/positive": 1 / 4,
        "clip/negative": 0.0,
        "masked": 1 / 7,
        "token_count": 7.0,
    }
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, abs=1e-5), name


def test_trust_region_holds_back_only_what_leads_further_out() -> None:
    """Without clipping the slope is -A rho r = -A exp(logprob - behavior); the penalty's is 0.1 drift."""
    low, high = math.log(0.25), math.log(4.0)
    logprob = torch.tensor([high, low, high, low]).requires_grad_()
    zero, one = torch.zeros(4), torch.ones(4)
    inputs: dict[str, Any] = {"behavior_N": zero, "weight_N": one, "cu_seqlens": torch.tensor([0, 4])}
    result = loss_of(
        logprob_N=logprob,
        proximal_N=None,
        reference_N=zero,
        advantage_N=torch.tensor([1.0, 1.0, -1.0, -1.0]),
        objective=Objective(trust_low=0.5, trust_high=2.0, kl_coefficient=0.1),
        **inputs,
    )
    (gradient,) = torch.autograd.grad(result.loss, logprob)
    surrogate = torch.tensor([0.0, -0.25, 4.0, 0.0])
    drift = torch.tensor([high, low, high, low])
    assert_matches_reference(gradient, (surrogate + 0.1 * drift) / 4)
    metrics = finish_metrics(result.metrics)
    assert metrics["masked"].item() == 0.5
    assert metrics["loss/kl"].item() == pytest.approx(0.05 * math.log(4.0) ** 2)


def test_clip_silences_only_the_harmful_side() -> None:
    low, high = math.log(0.5), math.log(2.0)
    logprob = torch.tensor([high, low, high, low]).requires_grad_()
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    zero, one = torch.zeros(4), torch.ones(4)
    result = loss_of(
        logprob_N=logprob,
        behavior_N=zero,
        proximal_N=zero,
        advantage_N=advantage,
        weight_N=one,
        cu_seqlens=torch.tensor([0, 4]),
    )
    (gradient,) = torch.autograd.grad(result.loss, logprob)
    assert_matches_reference(gradient, torch.tensor([0.0, -0.5, 2.0, 0.0]) / 4)
    metrics = finish_metrics(result.metrics)
    assert metrics["clip/positive"].item() == 0.5
    assert metrics["clip/negative"].item() == 0.5


def test_k2_penalty_golden() -> None:
    # d = 0.2, -0.5, 0: k2 = 0.02, 0.125, 0 and its gradient is d itself.
    logprob = torch.tensor([0.2, -0.5, 0.0]).requires_grad_()
    zero = torch.zeros(3)
    result = loss_of(
        logprob_N=logprob,
        behavior_N=logprob.detach(),
        proximal_N=None,
        reference_N=zero,
        advantage_N=zero,
        weight_N=torch.ones(3),
        cu_seqlens=torch.tensor([0, 3]),
        objective=Objective(kl_coefficient=0.5),
    )
    assert result.loss.item() == pytest.approx(0.5 * 0.145 / 3, abs=1e-7)
    assert_matches_reference(result.grad_logprob_N, 0.5 * torch.tensor([0.2, -0.5, 0.0]) / 3)
    assert finish_metrics(result.metrics)["reference/k2"].item() == pytest.approx(0.145 / 3, abs=1e-7)


def test_on_policy_gradient_is_minus_the_advantage() -> None:
    logprob = torch.randn(15).requires_grad_()
    result = loss_of(logprob_N=logprob, behavior_N=logprob.detach(), proximal_N=None)
    assert_matches_reference(result.grad_logprob_N, -ADVANTAGE * MASK / 7)


def random_case() -> dict[str, Any]:
    count = 60
    return {
        "logprob_N": torch.randn(count).requires_grad_(),
        "behavior_N": torch.randn(count),
        "proximal_N": torch.randn(count),
        "reference_N": torch.randn(count),
        "entropy_N": torch.rand(count).requires_grad_(),
        "advantage_N": torch.randn(count),
        "weight_N": torch.randint(0, 3, (count,)).float() * 0.5,
        "cu_seqlens": torch.tensor([0, 1, 1, 20, 37, 60]),
    }


@pytest.mark.parametrize(
    "aggregation", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "fixed"]
)
def test_returned_gradient_equals_autograd(aggregation: Any) -> None:
    objective = Objective(
        importance_cap=2.0,
        trust_low=0.4,
        trust_high=3.0,
        kl_coefficient=0.1,
        entropy_coefficient=0.2,
        aggregation=aggregation,
        fixed_length=10 if aggregation == "fixed" else 0,
    )
    case = random_case()
    result = loss_of(**case, objective=objective)
    gradient, entropy_gradient = torch.autograd.grad(
        3.0 * result.loss, [case["logprob_N"], case["entropy_N"]]
    )
    assert_matches_reference(gradient, 3.0 * result.grad_logprob_N)
    silent = (case["weight_N"] == 0) | (entropy_gradient == 0)
    assert bool((entropy_gradient[~silent] < 0).all())
    assert bool((~silent).any())


@pytest.mark.parametrize(
    "aggregation", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "fixed"]
)
def test_micro_batches_sum_to_the_batch(aggregation: Any) -> None:
    objective = Objective(
        importance_cap=2.0, trust_low=0.4, aggregation=aggregation, fixed_length=10 * (aggregation == "fixed")
    )
    case = random_case()
    whole = loss_of(**case, objective=objective)
    divisor = batch_normalizer(case["weight_N"], case["cu_seqlens"], objective)
    parts = []
    for first, last in ((0, 3), (3, 5)):
        bounds = case["cu_seqlens"][first : last + 1]
        rows = slice(int(bounds[0]), int(bounds[-1]))
        part = {name: tensor[rows] for name, tensor in case.items() if name != "cu_seqlens"}
        parts.append(loss_of(**part, cu_seqlens=bounds - bounds[0], objective=objective, normalizer=divisor))
    assert_matches_reference(parts[0].loss + parts[1].loss, whole.loss)
    assert_matches_reference(torch.cat([p.grad_logprob_N for p in parts]), whole.grad_logprob_N)
    merged = finish_metrics(merge_metrics(p.metrics for p in parts))
    for name, value in finish_metrics(whole.metrics).items():
        assert merged[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name


def test_weight_zero_silences_non_finite_tokens() -> None:
    poison = torch.where(MASK > 0, 0.0, math.nan)
    logprob = (CURRENT + poison).requires_grad_()
    result = loss_of(
        logprob_N=logprob,
        behavior_N=BEHAVIOR + torch.where(MASK > 0, 0.0, math.inf),
        proximal_N=PROXIMAL + poison,
        advantage_N=ADVANTAGE + poison,
    )
    (gradient,) = torch.autograd.grad(result.loss, logprob)
    clean = loss_of()
    assert_matches_reference(result.loss, clean.loss)
    assert_matches_reference(gradient, clean.grad_logprob_N)
    assert all(bool(torch.isfinite(value)) for value in result.metrics.values())


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"])
def test_no_live_token_gives_zero(aggregation: Any) -> None:
    logprob = CURRENT.clone().requires_grad_()
    result = loss_of(
        logprob_N=logprob, weight_N=torch.zeros(15), objective=Objective(aggregation=aggregation)
    )
    (gradient,) = torch.autograd.grad(result.loss, logprob)
    assert result.loss.item() == 0.0
    assert not gradient.any()
    assert all(value.item() == 0.0 for value in finish_metrics(result.metrics).values())


def test_extreme_ratios_stay_finite() -> None:
    logprob = torch.tensor([0.0, -1e4, -1e4]).requires_grad_()
    behavior = torch.tensor([-1e4, 0.0, -1e4])
    result = loss_of(
        logprob_N=logprob,
        behavior_N=behavior,
        proximal_N=behavior,
        advantage_N=torch.tensor([-1.0, 1.0, 1.0]),
        weight_N=torch.ones(3),
        cu_seqlens=torch.tensor([0, 3]),
    )
    (gradient,) = torch.autograd.grad(result.loss, logprob)
    assert torch.isfinite(result.loss)
    # Outside the clamp of the log-ratio nothing moves.
    assert_matches_reference(gradient, torch.tensor([0.0, 0.0, -1.0]) / 3)
    assert_matches_reference(result.grad_logprob_N, gradient)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"behavior_N": torch.zeros(14)}, ShapeError, r"behavior_N must have shape \[15\], got \[14\]"),
        ({"cu_seqlens": torch.tensor([0, 14])}, ShapeError, "must begin with 0, never fall and end with 15"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 15])}, ShapeError, "never fall"),
        ({"normalizer": 0.0}, ShapeError, "normalizer must be positive"),
        ({"objective": Objective(kl_coefficient=1.0)}, ObjectiveError, "reference_N must be given"),
        ({"objective": Objective(entropy_coefficient=1.0)}, ObjectiveError, "entropy_N must be given"),
        ({"backend": "cuda"}, BackendError, "choose one of triton, native, reference"),
    ],
)
def test_refuses_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss_of(**changes)


def test_loss_carries_no_gradient_to_constants() -> None:
    behavior: Tensor = BEHAVIOR.clone().requires_grad_()
    result = loss_of(logprob_N=CURRENT.clone().requires_grad_(), behavior_N=behavior)
    result.loss.backward()
    assert behavior.grad is None
