"""The Triton kernels of the policy loss, in the interpreter, against the reference over the whole family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream_kernels import Correction, Level, Objective, Penalty, PolicyLoss, Surrogate, policy_loss
from slipstream_kernels.testing import assert_matches_reference
from slipstream_kernels.triton import policy_loss as kernels

SURROGATES: list[dict[str, Any]] = [
    {"surrogate": Surrogate.CLIP},
    {"surrogate": Surrogate.CLIP, "dual_clip": 1.5},
    {"surrogate": Surrogate.CISPO},
    {"surrogate": Surrogate.TOPR},
    {"surrogate": Surrogate.SAPO},
]
CORRECTIONS: list[dict[str, Any]] = [
    {"correction": Correction.NONE},
    *({"correction_level": level, "importance_cap": 1.2} for level in Level),
    *(
        {
            "correction": Correction.MASK,
            "correction_level": level,
            "importance_floor": 0.7,
            "importance_cap": 1.5,
        }
        for level in Level
    ),
]
AGGREGATIONS = ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "fixed"]


def case(lengths: list[int], **changes: Any) -> dict[str, Any]:
    count = sum(lengths)
    inputs = {
        "logprob_N": torch.randn(count),
        "behavior_N": torch.randn(count),
        "proximal_N": torch.randn(count),
        "reference_N": torch.randn(count),
        "entropy_N": torch.rand(count),
        "advantage_N": torch.randn(count),
        "weight_N": torch.randint(0, 3, (count,)) * 0.5,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
    }
    return inputs | changes


def both(objective: Objective, inputs: dict[str, Any], **more: Any) -> tuple[PolicyLoss, PolicyLoss]:
    """Compare everything the two backends return, with an upstream gradient of 3."""
    results, gradients = [], []
    for backend in ("triton", "reference"):
        leaves = {
            name: inputs[name].clone().requires_grad_()
            for name in ("logprob_N", "entropy_N")
            if inputs[name] is not None
        }
        arguments: dict[str, Any] = inputs | leaves | more
        result = policy_loss(**arguments, objective=objective, backend=backend)
        results.append(result)
        gradients.append(torch.autograd.grad(3.0 * result.loss, list(leaves.values()), allow_unused=True))
    actual, expected = results
    assert_matches_reference(actual.loss, expected.loss)
    assert_matches_reference(actual.grad_logprob_N, expected.grad_logprob_N)
    for mine, theirs in zip(*gradients, strict=True):
        assert_matches_reference(mine, torch.zeros_like(mine) if theirs is None else theirs)
    if expected.grad_entropy_N is not None:
        assert actual.grad_entropy_N is not None
        assert_matches_reference(actual.grad_entropy_N, expected.grad_entropy_N)
    assert actual.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        torch.testing.assert_close(actual.metrics[name], value, rtol=1e-5, atol=1e-5, msg=name)
    return actual, expected


@pytest.mark.parametrize("number", range(len(SURROGATES)))
@pytest.mark.parametrize("above", [False, True])
def test_surrogates_by_level(number: int, above: bool) -> None:
    level = (Level.SEQUENCE, Level.GEOMETRIC)[number % 2] if above else Level.TOKEN
    member = SURROGATES[number]
    objective = Objective(**member, ratio_level=level, kl_coefficient=0.1, entropy_coefficient=0.2)
    both(objective, case([1, 0, 19, 17, 23]))


@pytest.mark.parametrize("member", CORRECTIONS)
def test_corrections(member: dict[str, Any]) -> None:
    both(Objective(**member, trust_low=0.3, trust_high=4.0), case([1, 0, 19, 17, 23]))


@pytest.mark.parametrize("penalty", Penalty)
def test_penalties(penalty: Penalty) -> None:
    both(Objective(penalty=penalty, kl_coefficient=0.3, importance_cap=2.0), case([30, 30]))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations(aggregation: Any) -> None:
    objective = Objective(
        aggregation=aggregation, fixed_length=9 * (aggregation == "fixed"), entropy_coefficient=0.1
    )
    normalizer = 7.0 if aggregation in AGGREGATIONS[:2] else None
    both(objective, case([1, 0, 19, 17, 23]), normalizer=normalizer)


@pytest.mark.parametrize("absent", ["proximal_N", "reference_N", "entropy_N"])
def test_without_an_optional_input(absent: str) -> None:
    objective = Objective(importance_cap=2.0, ratio_level=Level.GEOMETRIC, correction_level=Level.GEOMETRIC)
    both(objective, case([20, 20], **{absent: None}))


@pytest.mark.parametrize("count", [1, kernels.TOKEN_BLOCK, kernels.TOKEN_BLOCK + 1])
def test_around_a_block(count: int) -> None:
    both(Objective(importance_cap=2.0), case([count], weight_N=torch.ones(count)))


def test_a_segment_longer_than_what_is_read_at_once() -> None:
    both(Objective.gspo(clip_low=0.2, clip_high=0.2), case([3, kernels.SEGMENT_BLOCK + 1, 2]))


@pytest.mark.parametrize("objective", [Objective(), Objective.gspo()])
def test_no_token_and_no_live_token(objective: Objective) -> None:
    both(objective, case([]))
    both(objective, case([0, 0]))
    both(objective, case([5, 4], weight_N=torch.zeros(9)))


@pytest.mark.parametrize("objective", [Objective.sapo(), Objective.gspo(), Objective.cispo()])
def test_extreme_log_probabilities(objective: Objective) -> None:
    low, zero = torch.full((6,), -1e4), torch.zeros(6)
    mixed = torch.tensor([-1e4, 0.0, -1e4, 0.0, 0.0, -1e4])
    for logprob, proximal in ((mixed, low), (mixed, zero)):
        both(
            objective,
            case([3, 3], logprob_N=logprob, proximal_N=proximal, weight_N=torch.ones(6)),
        )


@pytest.mark.parametrize("objective", [Objective(trust_low=0.5), Objective.topr()])
def test_non_finite_tokens_of_weight_zero_are_never_read(objective: Objective) -> None:
    clean = case([20, 0, 20])
    dead = clean["weight_N"] == 0
    poison: list[Tensor] = [torch.where(dead, bad, 0.0) for bad in (math.nan, math.inf, -math.inf)]
    names = [name for name in clean if name.endswith("_N") and name != "weight_N"]
    dirty = {name: clean[name] + poison[index % 3] for index, name in enumerate(names)}
    assert_matches_reference(both(objective, clean | dirty)[0].loss, both(objective, clean)[0].loss)


@pytest.mark.parametrize(
    ("surrogate", "name"),
    [
        *((surrogate, "logprob_N") for surrogate in Surrogate),
        (Surrogate.CLIP, "behavior_N"),
        (Surrogate.CLIP, "advantage_N"),
        (Surrogate.CLIP, "entropy_N"),
    ],
)
def test_nan_of_a_live_token_reaches_the_loss(surrogate: Surrogate, name: str) -> None:
    inputs = case([8], weight_N=torch.ones(8))
    inputs[name][3] = math.nan
    objective = Objective(surrogate=surrogate, entropy_coefficient=0.1)
    for backend in ("triton", "reference"):
        assert policy_loss(**inputs, objective=objective, backend=backend).loss.isnan()


def test_two_runs_give_the_same_bits() -> None:
    inputs, objective = case([300, 400]), Objective.gspo()
    one, other = (policy_loss(**inputs, objective=objective, backend="triton") for _ in range(2))
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.grad_logprob_N, other.grad_logprob_N)


def test_gradients_take_the_type_of_their_input() -> None:
    inputs = case([10])
    inputs["logprob_N"] = inputs["logprob_N"].half().requires_grad_()
    result = policy_loss(**inputs, objective=Objective(), backend="triton")
    (gradient,) = torch.autograd.grad(result.loss, inputs["logprob_N"])
    assert gradient.dtype is torch.float16
    assert result.grad_logprob_N.dtype is torch.float32
