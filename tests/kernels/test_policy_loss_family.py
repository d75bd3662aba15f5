"""The family of policy losses: numbers by hand, gradients in float64, chunks, and what must not leak."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream_kernels import (
    Correction,
    Level,
    Objective,
    Penalty,
    PolicyLoss,
    Surrogate,
    finish_metrics,
    merge_metrics,
    native,
    native_policy,
    policy_loss,
    reference,
)
from slipstream_kernels.testing import assert_matches_reference

# Two segments: ratios to the proximal policy 1.5, 0.5, 4 with advantage +1; 1.5, 0.5 and 4 with -2.
RATIOS = (1.5, 0.5, 4.0)
LOG_RATIO = torch.tensor(RATIOS * 2).log()
ADVANTAGE = torch.tensor([1.0] * 3 + [-2.0] * 3)
BOUNDS = torch.tensor([0, 3, 6])
LOGPROB = torch.tensor([-1.0, -2.0, -3.0, -0.5, -0.25, -4.0])


def loss_of(objective: Objective, **changes: Any) -> PolicyLoss:
    """The loss with proximal = behavior, at a divisor of 1: sums over tokens, to be read by eye."""
    proximal = LOGPROB - LOG_RATIO
    arguments: dict[str, Any] = {
        "logprob_N": LOGPROB,
        "behavior_N": proximal,
        "proximal_N": proximal,
        "advantage_N": ADVANTAGE,
        "weight_N": torch.ones(6),
        "cu_seqlens": BOUNDS,
        "normalizer": 1.0,
    }
    arguments |= changes
    return policy_loss(arguments.pop("logprob_N"), objective=objective, backend="reference", **arguments)


def gate(temperature: float, ratio: float) -> float:
    return 1.0 / (1.0 + math.exp(-temperature * (ratio - 1.0)))


def sapo(temperature: float, ratio: float, advantage: float) -> tuple[float, float]:
    p = gate(temperature, ratio)
    return -advantage * 4.0 / temperature * p, -advantage * 4.0 * p * (1.0 - p) * ratio


GEOMETRIC = 3.0 ** (1.0 / 3.0)  # 1.5 * 0.5 * 4 = 3
TOTAL = Objective.topr().aggregation
CASES: list[tuple[Objective, list[float], list[float]]] = [
    # Positive: 1.5 and 4 are clipped to 1.2. Negative: 0.5 is clipped to 0.8.
    (Objective.ppo(), [-1.2, -0.5, -1.2, 3.0, 1.6, 8.0], [0, -0.5, 0, 3.0, 0, 8.0]),
    (Objective.dapo(), [-1.28, -0.5, -1.28, 3.0, 1.6, 8.0], [0, -0.5, 0, 3.0, 0, 8.0]),
    # 4 with a negative advantage is held at 3.
    (Objective.dual_clip_ppo(), [-1.2, -0.5, -1.2, 3.0, 1.6, 6.0], [0, -0.5, 0, 3.0, 0, 0]),
    # Both segments have the ratio 3 ^ (1/3) = 1.442, clipped to 1.1 where the advantage is positive.
    (
        Objective(ratio_level=Level.GEOMETRIC, clip_low=0.1, clip_high=0.1),
        [-1.1] * 3 + [2.0 * GEOMETRIC] * 3,
        [0, 0, 0] + [2.0 * GEOMETRIC] * 3,
    ),
    # The ratio, at most 2, times the log-probability: every token keeps its gradient.
    (
        Objective.cispo(clip_high=1.0),
        [1.5, 1.0, 6.0, -1.5, -0.25, -16.0],
        [-1.5, -0.5, -2.0, 3.0, 1.0, 4.0],
    ),
    # Positive: weight 1. Negative: the ratio, at most 1.
    (
        Objective.topr(ratio_level=Level.TOKEN),
        [1.0, 2.0, 3.0, -1.0, -0.25, -8.0],
        [-1.0, -1.0, -1.0, 2.0, 1.0, 2.0],
    ),
    # Of a sequence the ratio is 3, so at most 1.
    (Objective.topr(), [1.0, 2.0, 3.0, -1.0, -0.5, -8.0], [-1.0, -1.0, -1.0, 2.0, 2.0, 2.0]),
    (
        Objective(surrogate=Surrogate.SAPO),
        [sapo(1.0, r, 1.0)[0] for r in RATIOS] + [sapo(1.05, r, -2.0)[0] for r in RATIOS],
        [sapo(1.0, r, 1.0)[1] for r in RATIOS] + [sapo(1.05, r, -2.0)[1] for r in RATIOS],
    ),
]


@pytest.mark.parametrize(("objective", "losses", "slopes"), CASES)
def test_surrogates_by_hand(objective: Objective, losses: list[float], slopes: list[float]) -> None:
    for token, (loss, slope) in enumerate(zip(losses, slopes, strict=True)):
        share = torch.nn.functional.one_hot(torch.tensor(token), 6).float()
        inputs = reference.PolicyInputs(
            logprob_N=LOGPROB,
            behavior_N=LOGPROB - LOG_RATIO,
            proximal_N=LOGPROB - LOG_RATIO,
            reference_N=None,
            entropy_N=None,
            advantage_N=ADVANTAGE,
            weight_N=torch.ones(6),
            cu_seqlens=BOUNDS,
        )
        result = reference.policy_terms(inputs, share, objective)
        assert result.loss.item() == pytest.approx(loss, rel=1e-5)
        assert_matches_reference(result.grad_logprob_N, share * slope)


def test_published_values() -> None:
    # From float64 tables of other implementations: SAPO's gate, and the ratios of GSPO.
    assert sapo(1.05, math.exp(1.6), -0.8)[1] == pytest.approx(0.242005, abs=1e-6)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0, 0]).float()
    logprob = torch.tensor([0.1, -0.3, 9.0, 0.5, 0.02, -0.4, 0.25, 1.6, 9.0, 9.0])
    zero = torch.zeros(10)
    result = policy_loss(
        logprob,
        behavior_N=zero,
        proximal_N=zero,
        advantage_N=torch.tensor([1.0] * 5 + [-1.0] * 5),
        weight_N=mask,
        cu_seqlens=torch.tensor([0, 5, 10]),
        objective=Objective(ratio_level=Level.GEOMETRIC, clip_low=1.0, clip_high=9.0),
        normalizer=1.0,
    )
    assert_matches_reference(
        result.grad_logprob_N, mask * torch.tensor([-1.083287] * 5 + [1.621470] * 5), dtype=torch.float32
    )


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"correction": Correction.NONE}, [1.0] * 4),
        ({}, [0.5, 4.0, 3.0, 1.0]),
        ({"importance_cap": 2.0}, [0.5, 2.0, 2.0, 1.0]),
        ({"correction_level": "sequence"}, [2.0, 2.0, 3.0, 3.0]),
        ({"correction_level": "sequence", "importance_cap": 2.5}, [2.0, 2.0, 2.5, 2.5]),
        ({"correction_level": "geometric"}, [2.0**0.5] * 2 + [3.0**0.5] * 2),
        ({"correction_level": "geometric", "importance_cap": 1.5}, [2.0**0.5] * 2 + [1.5] * 2),
        ({"correction": "mask", "importance_floor": 0.6, "importance_cap": 3.5}, [0, 0, 3.0, 1.0]),
        ({"correction": "mask", "correction_level": "sequence", "importance_cap": 2.5}, [2.0, 2.0, 0, 0]),
        (
            {
                "correction": "mask",
                "correction_level": "geometric",
                "importance_floor": 0.5,
                "importance_cap": 1.5,
            },
            [2.0**0.5] * 2 + [0, 0],
        ),
    ],
)
def test_corrections_by_hand(members: dict[str, Any], expected: list[float]) -> None:
    """Proximal / behavior ratios 0.5, 4 | 3, 1 at a current / proximal ratio of 1 and an advantage of 1."""
    objective = Objective(**members)
    result = policy_loss(
        torch.zeros(4),
        behavior_N=-torch.tensor([0.5, 4.0, 3.0, 1.0]).log(),
        advantage_N=torch.ones(4),
        weight_N=torch.ones(4),
        cu_seqlens=torch.tensor([0, 2, 4]),
        objective=objective,
    )
    # The denominator stays 4, whatever was masked.
    assert_matches_reference(result.grad_logprob_N, -torch.tensor(expected) / 4)
    metrics = finish_metrics(result.metrics)
    assert metrics["importance/mean"].item() == pytest.approx(sum(expected) / 4)
    assert metrics["importance/rejected"].item() == sum(value == 0 for value in expected) / 4


def test_icepop_counts_masked_tokens_in_the_denominator() -> None:
    # Published: -0.494114 with the mask before rejection, -0.691760 with the mask after it.
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0, 0]).float()
    proximal = torch.tensor([0.05, -0.2, 0, 0.3, 0.01, -0.3, 0.1, 1.2, 0, 0])
    current = torch.tensor([0.1, -0.3, 0, 0.5, 0.02, -0.4, 0.25, 1.6, 0, 0])
    kept = mask * ((proximal.exp() >= 0.8) & (proximal.exp() <= 2.0))
    inputs: dict[str, Any] = {
        "behavior_N": torch.zeros(10),
        "proximal_N": proximal,
        "advantage_N": torch.tensor([1.0] * 5 + [-0.8] * 5),
        "cu_seqlens": torch.tensor([0, 5, 10]),
    }
    whole = policy_loss(current, weight_N=mask, objective=Objective.icepop(floor=0.8, cap=2.0), **inputs)
    alone = policy_loss(current, weight_N=kept, objective=Objective(), **inputs)
    assert whole.loss.item() == pytest.approx(-0.494114, abs=1e-6)
    assert alone.loss.item() == pytest.approx(-0.691760, abs=1e-6)
    assert finish_metrics(whole.metrics)["importance/rejected"].item() == pytest.approx(2 / 7)


@pytest.mark.parametrize(
    ("penalty", "values", "slopes"),
    [
        (Penalty.K2, [0.02, 0.125, 0.0], [0.2, -0.5, 0.0]),
        (Penalty.K3, [0.018731, 0.148721, 0.0], [0.181269, -0.648721, 0.0]),
        (Penalty.K3_WITH_K2_GRADIENT, [0.018731, 0.148721, 0.0], [0.2, -0.5, 0.0]),
        # Without an advantage of its own: the slope is the coefficient times d, in no part of the loss.
        (Penalty.K1_IN_REWARD, [0.0, 0.0, 0.0], [0.2, -0.5, 0.0]),
    ],
)
def test_penalties_by_hand(penalty: Penalty, values: list[float], slopes: list[float]) -> None:
    logprob = torch.tensor([0.2, -0.5, 0.0]).requires_grad_()
    zero = torch.zeros(3)
    result = policy_loss(
        logprob,
        behavior_N=logprob.detach(),
        reference_N=zero,
        advantage_N=zero,
        weight_N=torch.ones(3),
        cu_seqlens=torch.tensor([0, 3]),
        objective=Objective(kl_coefficient=0.5, penalty=penalty),
    )
    (gradient,) = torch.autograd.grad(result.loss, logprob)
    assert_matches_reference(gradient, 0.5 * torch.tensor(slopes) / 3, dtype=torch.float32)
    assert_matches_reference(result.grad_logprob_N, gradient)
    metrics = finish_metrics(result.metrics)
    assert metrics["loss/kl"].item() == pytest.approx(0.5 * sum(values) / 3, abs=1e-6)
    assert metrics["reference/k1"].item() == pytest.approx(-0.1)
    assert metrics["reference/k2"].item() == pytest.approx(0.145 / 3)
    assert metrics["reference/k3"].item() == pytest.approx((0.018731 + 0.148721) / 3, abs=1e-6)


def test_gspo_gradient_equals_that_of_the_sequence_form() -> None:
    """Where advantages and shares are constant per sequence; written here without stop-gradients."""
    logprob = LOGPROB.double().requires_grad_()
    result = loss_of(Objective.gspo(clip_low=1.0, clip_high=9.0), logprob_N=logprob, normalizer=2.0)
    moved = logprob - (LOGPROB - LOG_RATIO)
    sequence = (
        -(torch.stack([moved[:3].mean(), moved[3:].mean()]).exp() * torch.tensor([1.0, -2.0])).sum() / 2
    )
    (token_form,) = torch.autograd.grad(result.loss, logprob)
    (sequence_form,) = torch.autograd.grad(sequence, logprob)
    assert result.loss.item() == pytest.approx(sequence.item())
    assert_matches_reference(token_form, sequence_form)


def test_metrics_by_hand() -> None:
    metrics = finish_metrics(loss_of(Objective.dual_clip_ppo()).metrics)
    logs = [math.log(ratio) for ratio in RATIOS]
    expected = {
        "ratio/min": 0.5,
        "ratio/max": 4.0,
        "ratio/mean": 2.0,
        "ratio/ess": 36.0 / (6 * 2 * (2.25 + 0.25 + 16.0)) * 4.0,
        "clip/positive": 2 / 3,
        "clip/negative": 1 / 3,
        "clip/dual": 1 / 3,
        "advantage/positive": 1.0,
        "advantage/negative": -2.0,
        "mismatch/k1": -sum(logs) / 3,
        "mismatch/k2": sum(d * d / 2 for d in logs) / 3,
        "mismatch/k3": sum(math.exp(d) - 1 - d for d in logs) / 3,
        "proximal/k1": -sum(logs) / 3,
        "proximal/k2": sum(d * d / 2 for d in logs) / 3,
        "proximal/k3": sum(math.exp(d) - 1 - d for d in logs) / 3,
        "importance/rejected": 0.0,
    }
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-5), name


FAMILY = [
    Objective(
        **member,
        ratio_level=ratio_level,
        correction=correction,
        correction_level=Level.TOKEN if correction is Correction.NONE else ratio_level,
        importance_cap=math.inf if correction is Correction.NONE else 1.3,
        trust_low=0.5,
        trust_high=2.0,
        penalty=penalty,
        kl_coefficient=0.3,
        entropy_coefficient=0.2,
        aggregation="sequence_mean_token_mean",
    )
    for (member, penalty), ratio_level, correction in itertools.product(
        (
            ({"surrogate": Surrogate.CLIP, "dual_clip": 1.5}, Penalty.K2),
            ({"surrogate": Surrogate.CISPO}, Penalty.K3),
            ({"surrogate": Surrogate.TOPR}, Penalty.K1_IN_REWARD),
            ({"surrogate": Surrogate.SAPO}, Penalty.K3),
        ),
        Level,
        Correction,
    )
]


def random_inputs(dtype: torch.dtype = torch.float32, scale: float = 0.5) -> reference.PolicyInputs:
    count = 24
    one, two, three, four, five = (torch.randn(count, dtype=dtype) * scale for _ in range(5))
    return reference.PolicyInputs(
        logprob_N=one.requires_grad_(),
        behavior_N=two,
        proximal_N=three,
        reference_N=four,
        entropy_N=torch.rand(count, dtype=dtype).requires_grad_(),
        advantage_N=five,
        weight_N=torch.randint(0, 3, (count,)) * 0.5,
        cu_seqlens=torch.tensor([0, 1, 1, 10, 24]),
    )


@pytest.mark.parametrize("objective", FAMILY)
def test_returned_gradients_equal_autograd_in_float64(objective: Objective) -> None:
    inputs = random_inputs(torch.float64)
    result = reference.policy_loss(inputs, objective, torch.tensor(3.0))
    assert inputs.entropy_N is not None
    gradients = torch.autograd.grad(2.0 * result.loss, [inputs.logprob_N, inputs.entropy_N])
    assert result.grad_entropy_N is not None
    assert_matches_reference(gradients[0], 2.0 * result.grad_logprob_N, dtype=torch.float64)
    assert_matches_reference(gradients[1], 2.0 * result.grad_entropy_N, dtype=torch.float64)


# Away from every kink, yet on each side of it: the clip's bounds 0.8 and 1.2, the dual clip's 1.5 and 1 for
# current / proximal of tokens and of segments, the correction's 0.6 and 1.3 for proximal / behavior, and the
# trust region: it holds the seventh back below and the eighth above, while the first, second and fourth,
# which are outside too, are led back. The last has weight 0; the fifth is 25 off the reference, past the
# clamp at 20.
MOVED = torch.tensor([0.3, -0.4, 0.1, 0.6, 0.35, -0.5, -0.35, 0.1, 9.0], dtype=torch.float64)
MISMATCH = torch.tensor([0.4, -0.7, 0.2, 0.1, -0.15, 0.15, -0.2, 0.5, 9.0], dtype=torch.float64)
DRIFT = torch.tensor([-0.6, 0.4, 0.9, -0.3, 25.0, 0.2, -0.8, 0.5, 9.0], dtype=torch.float64)
CURRENT = torch.tensor([-1.0, -0.5, -2.0, -0.3, -1.5, -0.7, -1.2, -0.1, -9.0], dtype=torch.float64)


def smooth_inputs() -> reference.PolicyInputs:
    proximal = CURRENT - MOVED
    return reference.PolicyInputs(
        logprob_N=CURRENT.clone().requires_grad_(),
        behavior_N=proximal - MISMATCH,
        proximal_N=proximal,
        reference_N=CURRENT - DRIFT,
        entropy_N=torch.linspace(0.1, 2.0, 9, dtype=torch.float64).requires_grad_(),
        advantage_N=torch.tensor([-1.0, 0.8, -1.2, -0.5, 0.9, 0.7, -0.9, 1.1, 9.0], dtype=torch.float64),
        weight_N=torch.tensor([1.0, 0.5, 1.0, 1.0, 0.5, 1.0, 1.0, 0.5, 0.0]),
        cu_seqlens=torch.tensor([0, 1, 1, 5, 9]),
    )


def smooth_objective(surrogate: Surrogate, correction: Correction, **members: Any) -> Objective:
    return Objective(
        surrogate=surrogate,
        correction=correction,
        dual_clip=1.5 if surrogate is Surrogate.CLIP else math.inf,
        importance_floor=0.6 if correction is Correction.MASK else 0.0,
        importance_cap=math.inf if correction is Correction.NONE else 1.3,
        trust_low=0.6,
        trust_high=1.6,
        kl_coefficient=0.02,
        entropy_coefficient=0.2,
        aggregation="sequence_mean_token_mean",
        **members,
    )


def stated_loss(
    inputs: reference.PolicyInputs, objective: Objective, logprob_N: Tensor, entropy_N: Tensor
) -> Tensor:
    """The formulas as the enums state them; what carries a stop-gradient stays at the inputs' logprob_N."""
    assert inputs.reference_N is not None
    old, live = inputs.logprob_N.detach(), inputs.weight_N > 0
    proximal = old if inputs.proximal_N is None else inputs.proximal_N

    def ratio_at(level: Level, log_ratio: Tensor) -> Tensor:
        values = log_ratio.clone()
        for start, stop in itertools.pairwise(inputs.cu_seqlens.tolist()):
            part = torch.arange(start, stop)[live[start:stop]]
            if level is not Level.TOKEN and len(part):
                values[part] = values[part].sum() / (1 if level is Level.SEQUENCE else len(part))
        return values.exp()

    drift, held_drift = ((to - inputs.reference_N).clamp(-20, 20) for to in (logprob_N, old))
    rho = ratio_at(objective.correction_level, proximal - inputs.behavior_N)
    match objective.correction:
        case Correction.NONE:
            rho = torch.ones_like(rho)
        case Correction.TRUNCATE:
            rho = rho.clamp(max=objective.importance_cap)
        case Correction.MASK:
            rho = rho * ((rho >= objective.importance_floor) & (rho <= objective.importance_cap))
    match objective.penalty:
        case Penalty.K1_IN_REWARD:
            penalty = torch.zeros_like(old)
        case Penalty.K2:
            penalty = drift**2 / 2
        case Penalty.K3:
            penalty = (-drift).exp() - 1 + drift
        case Penalty.K3_WITH_K2_GRADIENT:
            penalty = (-held_drift).exp() - 1 + held_drift + (drift**2 - held_drift**2) / 2
    reward = objective.kl_coefficient * held_drift if objective.penalty is Penalty.K1_IN_REWARD else 0.0
    advantage = inputs.advantage_N - reward
    held = ratio_at(objective.ratio_level, old - proximal)
    ratio = held * (logprob_N - old).exp()
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    match objective.surrogate:
        case Surrogate.CLIP:
            loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
            loss = torch.where(advantage < 0, loss.minimum(-objective.dual_clip * advantage), loss)
        case Surrogate.CISPO:
            loss = -held.clamp(low, high) * advantage * logprob_N
        case Surrogate.TOPR:
            loss = -torch.where(advantage >= 0, 1.0, held.clamp(max=1.0)) * advantage * logprob_N
        case Surrogate.SAPO:
            heat = torch.full_like(old, objective.gate_negative)
            heat[advantage > 0] = objective.gate_positive
            loss = -advantage * 4 / heat * (heat * (ratio - 1)).sigmoid()
    away = (old - inputs.behavior_N).exp()
    held = ((advantage > 0) & (away > objective.trust_high)) | (
        (advantage < 0) & (away < objective.trust_low)
    )
    token = torch.where(held, 0.0, rho * loss) + objective.kl_coefficient * penalty
    token = token - objective.entropy_coefficient * entropy_N
    share = reference.token_shares(inputs.weight_N, inputs.cu_seqlens, objective, torch.tensor(3.0))
    return (share * token)[live].sum()


LEVELS_OF_CORRECTION = [
    (correction, level)
    for correction, level in itertools.product(Correction, Level)
    if correction is not Correction.NONE or level is Level.TOKEN
]


@pytest.mark.parametrize(("correction", "correction_level"), LEVELS_OF_CORRECTION)
@pytest.mark.parametrize("penalty", [Penalty.K2, Penalty.K3])
@pytest.mark.parametrize("surrogate", [Surrogate.CLIP, Surrogate.SAPO])
def test_gradcheck(
    surrogate: Surrogate, penalty: Penalty, correction: Correction, correction_level: Level
) -> None:
    """Of objectives that hold no function of logprob_N still: their gradient is that of the value."""
    objective = smooth_objective(surrogate, correction, correction_level=correction_level, penalty=penalty)
    inputs = smooth_inputs()

    def loss(logprob_N: Tensor, entropy_N: Tensor) -> Tensor:
        moved = replace(inputs, logprob_N=logprob_N, entropy_N=entropy_N)
        return reference.policy_loss(moved, objective, torch.tensor(3.0)).loss

    assert torch.autograd.gradcheck(loss, (inputs.logprob_N, inputs.entropy_N))


@pytest.mark.parametrize(("correction", "correction_level"), LEVELS_OF_CORRECTION)
@pytest.mark.parametrize("penalty", Penalty)
@pytest.mark.parametrize("ratio_level", Level)
@pytest.mark.parametrize("surrogate", Surrogate)
def test_gradcheck_of_the_stated_form(
    surrogate: Surrogate,
    ratio_level: Level,
    penalty: Penalty,
    correction: Correction,
    correction_level: Level,
) -> None:
    """Of every objective: its gradient is that of the formula with the stop-gradients held still."""
    objective = smooth_objective(
        surrogate, correction, ratio_level=ratio_level, correction_level=correction_level, penalty=penalty
    )
    check_against_the_stated_form(smooth_inputs(), objective)


@pytest.mark.parametrize("penalty", Penalty)
@pytest.mark.parametrize("surrogate", Surrogate)
def test_gradcheck_of_one_update_per_batch(surrogate: Surrogate, penalty: Penalty) -> None:
    """Without proximal_N its place is taken by logprob_N, held still."""
    objective = smooth_objective(surrogate, Correction.TRUNCATE, penalty=penalty)
    check_against_the_stated_form(replace(smooth_inputs(), proximal_N=None), objective)


def check_against_the_stated_form(inputs: reference.PolicyInputs, objective: Objective) -> None:
    """Compare values with stated_loss, and its numerical gradient with both of the reference's."""
    result = reference.policy_loss(inputs, objective, torch.tensor(3.0))
    assert inputs.entropy_N is not None
    gradients = torch.autograd.grad(result.loss, [inputs.logprob_N, inputs.entropy_N])
    # Copies: gradcheck moves them in place.
    variables = [one.detach().clone().requires_grad_() for one in (inputs.logprob_N, inputs.entropy_N)]

    def loss(logprob_N: Tensor, entropy_N: Tensor) -> Tensor:
        value = stated_loss(inputs, objective, logprob_N.detach(), entropy_N.detach())
        for variable, gradient in zip((logprob_N, entropy_N), gradients, strict=True):
            value = value + (gradient * (variable - variable.detach())).sum()
        return value

    assert_matches_reference(result.loss, loss(*variables), dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, variables, fast_mode=True)
    assert result.grad_entropy_N is not None
    for returned, gradient in zip((result.grad_logprob_N, result.grad_entropy_N), gradients, strict=True):
        assert_matches_reference(returned, gradient, dtype=torch.float64)


def rows_of(inputs: reference.PolicyInputs, rows: Tensor) -> reference.PolicyInputs:
    members = {name: getattr(inputs, name) for name in inputs.__slots__}
    taken = {name: None if t is None else t[rows] for name, t in members.items() if name != "cu_seqlens"}
    return reference.PolicyInputs(**taken, cu_seqlens=torch.tensor([0]))


@pytest.mark.parametrize("objective", [one for one in FAMILY if not one.sequence_level])
def test_terms_of_subsets_add_up(objective: Objective) -> None:
    inputs = random_inputs()
    share = reference.token_shares(inputs.weight_N, inputs.cu_seqlens, objective, torch.tensor(3.0))
    whole = reference.policy_terms(inputs, share, objective)
    order = torch.randperm(24)
    chunks = [order[:1], order[1:9], order[9:]]
    parts = [reference.policy_terms(rows_of(inputs, rows), share[rows], objective) for rows in chunks]
    assert_matches_reference(torch.stack([part.loss for part in parts]).sum(), whole.loss)
    for rows, part in zip(chunks, parts, strict=True):
        assert torch.equal(part.grad_logprob_N, whole.grad_logprob_N[rows])
    merged = merge_metrics(part.metrics for part in parts)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(merged[name], value.detach(), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("level", [Level.SEQUENCE, Level.GEOMETRIC])
def test_a_segment_never_hears_of_another(level: Level) -> None:
    objective = Objective(ratio_level=level, correction_level=level, importance_cap=2.0, clip_high=0.4)
    changed = LOGPROB + torch.tensor([0.0, 0.0, 0.0, 0.3, 0.3, 0.3])
    behavior = LOGPROB - 2 * LOG_RATIO
    one = loss_of(objective, behavior_N=behavior)
    other = loss_of(objective, behavior_N=behavior, logprob_N=changed)
    assert torch.equal(one.grad_logprob_N[:3], other.grad_logprob_N[:3])
    assert not torch.equal(one.grad_logprob_N[3:], other.grad_logprob_N[3:])


@pytest.mark.parametrize("objective", FAMILY)
def test_non_finite_tokens_of_weight_zero_never_leak(objective: Objective) -> None:
    clean = random_inputs()
    dead = clean.weight_N == 0
    members = {name: getattr(clean, name) for name in clean.__slots__}
    poisons = itertools.cycle((math.nan, math.inf, -math.inf))
    dirty = {
        name: torch.where(dead, next(poisons), value.detach()).requires_grad_(value.requires_grad)
        for name, value in members.items()
        if name not in ("weight_N", "cu_seqlens")
    }
    inputs = reference.PolicyInputs(**(members | dirty))
    result = reference.policy_loss(inputs, objective, torch.tensor(3.0))
    expected = reference.policy_loss(clean, objective, torch.tensor(3.0))
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.grad_logprob_N, expected.grad_logprob_N)
    (gradient,) = torch.autograd.grad(result.loss, inputs.logprob_N)
    assert_matches_reference(gradient, expected.grad_logprob_N)
    assert all(torch.equal(value, expected.metrics[name]) for name, value in result.metrics.items())


@pytest.mark.parametrize("objective", FAMILY[::4])
@pytest.mark.parametrize("lengths", [[], [0, 0], [1]])
def test_hardly_a_token(objective: Objective, lengths: list[int]) -> None:
    count = sum(lengths)
    logprob, ones = torch.zeros(count).requires_grad_(), torch.ones(count)
    result = policy_loss(
        logprob,
        behavior_N=ones * 0,
        reference_N=ones * 0,
        entropy_N=ones * 0.5,
        advantage_N=ones,
        weight_N=ones,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        objective=objective,
    )
    result.loss.backward()
    assert all(bool(torch.isfinite(value)) for value in finish_metrics(result.metrics).values())
    assert result.grad_logprob_N.shape == (count,)
    assert torch.isfinite(result.loss)


@pytest.mark.parametrize("objective", FAMILY)
def test_extreme_log_probabilities_stay_finite(objective: Objective) -> None:
    inputs = random_inputs(scale=1e4)
    result = reference.policy_loss(inputs, objective, torch.tensor(3.0))
    (gradient,) = torch.autograd.grad(result.loss, inputs.logprob_N)
    assert torch.isfinite(result.loss)
    assert torch.isfinite(result.grad_logprob_N).all()
    assert_matches_reference(gradient, result.grad_logprob_N)


@pytest.mark.skipif(not native.available(), reason=native.description())
@pytest.mark.parametrize("scale", [0.5, 30.0])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("objective", FAMILY)
def test_native_pass_equals_the_reference_in_float64(
    objective: Objective, optional: bool, scale: float
) -> None:
    """At scale 30 log-ratios leave +-20, where neither ratio nor penalty has a slope."""
    inputs = random_inputs(scale=scale)
    if not optional and objective.kl_coefficient == 0 and objective.entropy_coefficient == 0:
        inputs = replace(inputs, proximal_N=None, reference_N=None, entropy_N=None)
    tensors = {f.name: getattr(inputs, f.name) for f in fields(inputs) if getattr(inputs, f.name) is not None}
    exact = {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    got = policy_loss(**tensors, objective=objective, normalizer=7.0, backend="native")
    truth = policy_loss(**exact, objective=objective, normalizer=7.0, backend="reference")
    torch.testing.assert_close(got.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.grad_logprob_N.double(), truth.grad_logprob_N, rtol=1e-5, atol=1e-6)
    assert got.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        torch.testing.assert_close(got.metrics[name].double(), value, rtol=1e-5, atol=1e-5)
    asked = [name for name in ("logprob_N", "entropy_N") if name in tensors]
    gradients = torch.autograd.grad(3.0 * got.loss, [tensors[name] for name in asked])
    for actual, expected in zip(
        gradients, torch.autograd.grad(3.0 * truth.loss, [exact[name] for name in asked]), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def many_inputs(count: int) -> reference.PolicyInputs:
    """Of two segments; a third of the tokens has no weight, and holds NaN."""
    bounds = torch.tensor([0, count // 3, count])
    weight_N = torch.where(torch.arange(count) % 3 == 2, 0.0, 1.0)
    one, two, three, four, five = (
        torch.where(weight_N > 0, torch.randn(count) * 0.5, math.nan) for _ in range(5)
    )
    return reference.PolicyInputs(
        logprob_N=one,
        behavior_N=two,
        proximal_N=three,
        reference_N=four,
        entropy_N=torch.rand(count),
        advantage_N=five,
        weight_N=weight_N,
        cu_seqlens=bounds,
    )


@pytest.mark.skipif(not native.available(), reason=native.description())
@pytest.mark.parametrize("objective", FAMILY[::5])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 65, 1023, 1025, 2049])
def test_native_pass_of_ragged_sizes(objective: Objective, count: int) -> None:
    """Sizes beside those of a vector, of a group of vectors and of a block of groups."""
    inputs = many_inputs(count)
    exact = reference.PolicyInputs(
        **{
            f.name: t.double() if (t := getattr(inputs, f.name)).is_floating_point() else t
            for f in fields(inputs)
        }
    )
    share_N = torch.where(inputs.weight_N > 0, torch.rand(count) / count, math.inf)
    got, active_N = native_policy.policy_terms(inputs, share_N, objective)
    truth = reference.policy_terms(exact, share_N.double().nan_to_num(posinf=0.0), objective)
    torch.testing.assert_close(got.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
    assert got.grad_entropy_N is not None
    assert truth.grad_entropy_N is not None
    torch.testing.assert_close(got.grad_logprob_N.double(), truth.grad_logprob_N, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.grad_entropy_N.double(), truth.grad_entropy_N, rtol=1e-5, atol=1e-6)
    for name, value in truth.metrics.items():
        torch.testing.assert_close(got.metrics[name].double(), value, rtol=1e-5, atol=1e-5, msg=name)
    moving = (got.grad_logprob_N != 0) | (got.grad_entropy_N != 0)
    assert torch.equal(active_N, moving.nonzero()[:, 0])


@pytest.mark.skipif(not native.available(), reason=native.description())
@pytest.mark.parametrize("count", [5_000, 140_001])
def test_native_pass_has_the_same_bits_on_two_threads(count: int) -> None:
    """The second size is above the one that threads share, and has more blocks than are kept at a time."""
    inputs, objective = many_inputs(count), Objective.dapo()
    share_N = inputs.weight_N / count
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(native_policy.policy_terms(inputs, share_N, objective))
    finally:
        torch.set_num_threads(before)
    (one, one_active_N), (two, two_active_N) = results
    assert one.grad_entropy_N is not None
    assert two.grad_entropy_N is not None
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.grad_logprob_N, two.grad_logprob_N)
    assert torch.equal(one.grad_entropy_N, two.grad_entropy_N)
    assert torch.equal(one_active_N, two_active_N)
    assert all(torch.equal(one.metrics[name], value) for name, value in two.metrics.items())


@pytest.mark.skipif(not native.available(), reason=native.description())
@pytest.mark.parametrize("name", ["logprob_N", "proximal_N"])
@pytest.mark.parametrize("token", [3, 16])
def test_nan_of_a_live_token_reaches_loss_and_gradient(name: str, token: int) -> None:
    """In a whole vector of lanes and in what is left of one."""
    inputs = many_inputs(20)
    poisoned = getattr(inputs, name).clone()
    poisoned[token] = math.nan
    share_N = inputs.weight_N / 20
    terms, active_N = native_policy.policy_terms(replace(inputs, **{name: poisoned}), share_N, Objective())
    assert terms.loss.isnan()
    assert terms.grad_logprob_N.isnan().nonzero()[:, 0].tolist() == [token]
    assert token in active_N
