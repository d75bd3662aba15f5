"""One step of reinforcement learning against the documented formula, written densely in float64."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slipstream.config import RunConfig, load_config
from slipstream.errors import NumericsError
from slipstream.metrics import undefined_names
from slipstream.model import named_weights
from slipstream.objective import Advantages, advantages
from slipstream.policy_step import PolicyStep, StepResult, describe
from slipstream.types import (
    Int32Array,
    Outcome,
    Sampling,
    Score,
    ScoreKind,
    Split,
    TaskAttempt,
    ToolCall,
    ToolStatus,
    Trajectory,
    TrajectoryId,
)

ModelMaker = Callable[..., PreTrainedModel]
LENGTHS = (12, 7, 31, 20, 3, 16, 2, 25)


def config_of(*overrides: str) -> RunConfig:
    settings = ["objective.kl_coefficient=0.1", "sampling.temperature=0.8", "optim.minibatches=1"]
    return load_config("research", [*settings, *overrides])


@torch.no_grad()
def scored(model: PreTrainedModel, tokens: Int32Array, temperature: float) -> np.ndarray:
    model.set_attn_implementation("eager")
    logits = model(input_ids=torch.from_numpy(tokens).long()[None]).logits[0, :-1]
    logprobs = torch.log_softmax(logits / temperature, -1)
    values = logprobs.gather(1, torch.from_numpy(tokens[1:]).long()[:, None])[:, 0]
    return np.append(0.0, values.double().numpy())


def made_batch(behavior: PreTrainedModel, temperature: float = 0.8) -> list[Trajectory]:
    """Two groups of four: prompt, message, observation, message; log-probabilities of another model."""
    random = np.random.default_rng(11)
    batch = []
    for number, length in enumerate(LENGTHS):
        tokens = random.integers(0, 37, length).astype(np.int32)
        mask = (np.arange(length) % 7 >= 2).astype(np.uint8)
        mask[0] = 0
        noise = random.normal(0, 0.4, length)
        logprobs = np.where(mask, scored(behavior, tokens, temperature) + noise, 0).astype(np.float32)
        value = 1.0 if random.random() < 0.5 or number % 4 == 0 else -1.0
        batch.append(
            Trajectory(
                identity=TrajectoryId(run="r", actor="a", epoch=0, seq=number),
                attempt=TaskAttempt(task=number // 4, seed=1, group=number // 4, attempt=number % 4),
                split=Split.TRAIN,
                evaluation=-1,
                issue=0,
                token_ids=tokens,
                loss_mask=mask,
                behavior_logprobs=logprobs,
                versions=np.where(mask, 5, -1).astype(np.int32),
                turns=np.where(mask, 0, -1).astype(np.int16),
                turn_rewards=np.array([value], np.float32),
                scores=(Score(name="outcome", kind=ScoreKind.OUTCOME, weight=1.0, value=value),),
                outcome=Outcome.COMPLETED,
                tool_calls=(),
                sampling=Sampling(temperature=temperature),
            )
        )
    return batch


def slips_of(batch: Sequence[Trajectory], value: int = 1) -> list[Int32Array]:
    return [np.where(t.loss_mask > 0, value, 0).astype(np.int32) for t in batch]


class Stepper:
    """A policy and a step whose gradient is read off AdamW's first moment."""

    def __init__(self, make_model: ModelMaker, *overrides: str, quarantine: Path | None = None) -> None:
        self.config = config_of(*NARROW, *overrides)
        self.model = make_model(seed=0)
        self.step = PolicyStep(self.model, make_model(seed=2), self.config, quarantine=quarantine)

    def __call__(self, batch: list[Trajectory], slips: list[Int32Array] | None = None) -> StepResult:
        return self.step(batch, slips_of(batch) if slips is None else slips, step=0)

    def gradient(self) -> dict[str, Tensor]:
        """The gradient before clipping: the parameters hold it clipped."""
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        assert all(g is not None for g in gradients.values())
        return {name: g.double() for name, g in gradients.items() if g is not None}

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in named_weights(self.model).items()}


UNCLIPPED = "optim.max_grad_norm=1e9"
NARROW = ("objective.trust_low=0.8", "objective.trust_high=1.25")
"""A trust region that several tokens of the batch are outside of, on either side."""


def dense_gradient(
    make_model: ModelMaker,
    batch: Sequence[Trajectory],
    masks: Sequence[np.ndarray],
    config: RunConfig,
    moved: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Gradient and loss of the documented formula on right-padded rows, in float64.

    L = min(exp(proximal - behavior), cap) max(-A r, -A clip(r)) + kl (logprob - reference)^2 / 2
    with r = exp(logprob - proximal); the first term is left out where it would carry exp(logprob - behavior)
    further out of the trust region; the sum is divided by the number of all tokens. `moved`: weights other
    than the proximal policy's.
    """
    o = config.objective
    model, start, reference = (make_model(seed=s, installed=False).double() for s in (0, 0, 2))
    with torch.no_grad():
        for name, tensor in (moved or {}).items():
            model.get_parameter(name).copy_(tensor)
    worth = advantages(batch, o, config.rewards).advantages
    longest = max(len(t.token_ids) for t in batch)

    def padded(values: Sequence[np.ndarray], kind: torch.dtype) -> Tensor:
        rows = torch.zeros(len(batch), longest, dtype=kind)
        for row, value in zip(rows, values, strict=True):
            row[: len(value)] = torch.from_numpy(np.asarray(value)).to(kind)
        return rows

    heat = torch.tensor([t.sampling.temperature for t in batch], dtype=torch.float64)
    tokens = padded([t.token_ids for t in batch], torch.int64)
    attention = padded([np.ones(len(t.token_ids)) for t in batch], torch.int64)
    mask = padded(masks, torch.float64)[:, 1:]
    behavior = padded([t.behavior_logprobs for t in batch], torch.float64)[:, 1:]

    def logprobs(which: PreTrainedModel) -> Tensor:
        logits = which(input_ids=tokens, attention_mask=attention).logits[:, :-1]
        tempered = torch.log_softmax(logits / heat[:, None, None], -1)
        return tempered.gather(2, tokens[:, 1:, None])[..., 0]

    current = logprobs(model)
    with torch.no_grad():
        against, proximal = logprobs(reference), logprobs(start)
    raw_ratio = (current.detach() - behavior).exp()
    importance = (proximal - behavior).exp().clamp(max=o.importance_cap)
    ratio = (current - proximal).exp()
    advantage = torch.from_numpy(worth).double()[:, None]
    clipped = ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
    held = ((advantage > 0) & (raw_ratio > o.trust_high)) | ((advantage < 0) & (raw_ratio < o.trust_low))
    surrogate = torch.where(held, 0.0, importance * torch.maximum(-advantage * ratio, -advantage * clipped))
    token_loss = surrogate + o.kl_coefficient * 0.5 * (current - against).square()
    loss = (token_loss * mask).sum() / mask.sum()
    loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert 0.02 < float((mask * held).sum() / mask.sum()) < 0.95
    return gradient, float(loss.detach())


def assert_same_gradient(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5
) -> None:
    assert found.keys() == expected.keys()
    size = max(float(g.abs().max()) for g in expected.values())
    assert size > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=tolerance * size, rtol=1e-4, msg=name)


@pytest.fixture
def batch(make_model: ModelMaker) -> list[Trajectory]:
    return made_batch(make_model(seed=0, installed=False))


def masks_of(batch: Sequence[Trajectory]) -> list[np.ndarray]:
    return [t.loss_mask for t in batch]


def test_the_gradient_is_that_of_the_formula(make_model: ModelMaker, batch: list[Trajectory]) -> None:
    stepper = Stepper(make_model, UNCLIPPED)
    result = stepper(batch)
    expected, loss = dense_gradient(make_model, batch, masks_of(batch), stepper.config)
    assert_same_gradient(stepper.gradient(), expected)
    parts = result.metrics["loss/surrogate"] + result.metrics["loss/kl"]
    assert parts == pytest.approx(loss, rel=1e-4) == result.metrics["loss"]
    assert result.metrics["masked"] == pytest.approx(result.metrics["masked/trust"])
    assert undefined_names(result.metrics) == []
    assert result.tokens_trained == sum(int(t.loss_mask.sum()) for t in batch)
    assert not result.skipped


@pytest.mark.parametrize("budget", [256, 10_000])
def test_the_token_budget_does_not_change_the_gradient(
    make_model: ModelMaker, batch: list[Trajectory], budget: int
) -> None:
    """Forty trajectories of 580 tokens in all, in three micro-batches or one."""
    many = [
        dataclasses.replace(t, attempt=dataclasses.replace(t.attempt, group=t.attempt.group + 2 * n))
        for n in range(5)
        for t in batch
    ]
    whole, cut = (
        Stepper(make_model, UNCLIPPED),
        Stepper(make_model, UNCLIPPED, f"batch.token_budget={budget}"),
    )
    whole(many)
    cut(many)
    assert_same_gradient(cut.gradient(), whole.gradient(), 1e-5)


def test_over_age_tokens_are_not_trained(make_model: ModelMaker, batch: list[Trajectory]) -> None:
    stepper = Stepper(make_model, UNCLIPPED, "max_slip=4")
    slips = [np.where(np.arange(len(t.token_ids)) < 8, 5, 4).astype(np.int32) for t in batch]
    result = stepper(batch, slips)
    masks = [t.loss_mask * (slip <= 4) for t, slip in zip(batch, slips, strict=True)]
    expected, _ = dense_gradient(make_model, batch, masks, stepper.config)
    assert_same_gradient(stepper.gradient(), expected)
    sampled = sum(int(t.loss_mask.sum()) for t in batch)
    assert result.tokens_trained == sum(int(mask.sum()) for mask in masks) < sampled
    assert result.metrics["masked/over_age"] == pytest.approx(1 - result.tokens_trained / sampled)


def test_a_batch_of_over_age_tokens_changes_nothing_and_is_no_fault(
    make_model: ModelMaker, batch: list[Trajectory]
) -> None:
    stepper = Stepper(make_model)
    before = stepper.weights()
    result = stepper(batch, slips_of(batch, 99))
    assert (result.tokens_trained, result.skipped, result.metrics["masked/over_age"]) == (0, False, 1.0)
    assert result.metrics["masked"] == 1.0
    assert all(torch.equal(before[name], tensor) for name, tensor in stepper.weights().items())


@pytest.mark.parametrize("minibatches", [1, 2])
def test_each_trajectory_is_scored_at_the_temperature_it_was_sampled_at(
    make_model: ModelMaker, minibatches: int
) -> None:
    """Behavior, proximal, current and reference policy alike; also where both share a micro-batch."""
    behavior = make_model(seed=0, installed=False)
    batch = [*made_batch(behavior, 0.8)[:4], *made_batch(behavior, 1.3)[4:]]
    options = (UNCLIPPED, "batch.groups=2", "optim.learning_rate=1e-12")
    stepper = Stepper(make_model, *options, f"optim.minibatches={minibatches}")
    stepper(batch)
    chosen = batch[-8 // minibatches :]
    expected, _ = dense_gradient(make_model, chosen, masks_of(chosen), stepper.config)
    assert_same_gradient(stepper.gradient(), expected)


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("warm", [1.3, 0.8])
def test_how_far_warmer_sampling_has_gone_from_the_warm_start(
    make_model: ModelMaker, minibatches: int, warm: float
) -> None:
    """The warm start stays at the configured temperature, 0.8, whatever the tokens were sampled at."""
    behavior, reference = make_model(seed=0, installed=False), make_model(seed=2, installed=False)
    batch = [*made_batch(behavior, 0.8)[:4], *made_batch(behavior, warm)[4:]]
    stepper = Stepper(make_model, "batch.groups=2", f"optim.minibatches={minibatches}")
    metrics = stepper(batch).metrics
    apart = np.concatenate(
        [(t.behavior_logprobs - scored(reference, t.token_ids, 0.8))[t.loss_mask > 0] for t in batch]
    )
    expected = None if warm == 0.8 else pytest.approx(apart.mean(), rel=1e-4)
    assert metrics.get("kl/exploration") == expected
    assert undefined_names(metrics) == []


def test_groups_that_tell_nothing_weigh_less_in_the_loss(
    make_model: ModelMaker, batch: list[Trajectory]
) -> None:
    won = Score(name="outcome", kind=ScoreKind.OUTCOME, weight=1.0, value=1.0)
    batch = [*(dataclasses.replace(t, scores=(won,)) for t in batch[:4]), *batch[4:]]
    stepper = Stepper(make_model, UNCLIPPED, "curriculum.enabled=true", "curriculum.dynamic.weight=0.25")
    result = stepper(batch)
    masks = [t.loss_mask * (0.25 if t.attempt.group == 0 else 1.0) for t in batch]
    expected, _ = dense_gradient(make_model, batch, masks, stepper.config)
    assert_same_gradient(stepper.gradient(), expected)
    assert result.tokens_trained == sum(int(t.loss_mask.sum()) for t in batch)


def test_tool_tokens_get_no_gradient(make_model: ModelMaker, batch: list[Trajectory]) -> None:
    """Neither what stands in their log-probability nor tokens after the last message matter."""
    one, other = Stepper(make_model, UNCLIPPED), Stepper(make_model, UNCLIPPED)
    one(batch)
    poisoned = [
        dataclasses.replace(
            t, behavior_logprobs=np.where(t.loss_mask, t.behavior_logprobs, np.float32("nan"))
        )
        for t in batch
    ]
    tail = [
        dataclasses.replace(
            t,
            token_ids=np.append(t.token_ids, np.int32(9)),
            loss_mask=np.append(t.loss_mask, np.uint8(0)),
            behavior_logprobs=np.append(t.behavior_logprobs, np.float32(0)),
            versions=np.append(t.versions, np.int32(-1)),
            turns=np.append(t.turns, np.int16(-1)),
        )
        for t in poisoned
    ]
    other(tail)
    assert_same_gradient(other.gradient(), one.gradient(), 1e-6)


def test_minibatches_take_whole_groups_against_the_policy_before_the_step(
    make_model: ModelMaker, batch: list[Trajectory]
) -> None:
    """The second update's gradient is that of its own group, its proximal policy that before the first."""
    options = (UNCLIPPED, "batch.groups=2", "optim.learning_rate=0.03", "optim.warmup_steps=0")
    stepper = Stepper(make_model, "optim.minibatches=2", *options)
    assert stepper.step._minibatches(batch) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    result = stepper(batch)
    moments = stepper.step.optimizer.state_tensors()
    assert {float(v) for name, v in moments.items() if name.startswith("step.")} == {2.0}
    first, second = Stepper(make_model, *options), batch[4:]
    first(batch[:4])
    expected, _ = dense_gradient(make_model, second, masks_of(second), first.config, first.weights())
    assert_same_gradient(stepper.gradient(), expected, 1e-4)
    assert result.metrics["clip/positive"] + result.metrics["clip/negative"] > 0


def damaged(batch: list[Trajectory]) -> list[Trajectory]:
    logprobs = batch[3].behavior_logprobs.copy()
    logprobs[np.flatnonzero(batch[3].loss_mask)[2]] = np.nan
    return [*batch[:3], dataclasses.replace(batch[3], behavior_logprobs=logprobs), *batch[4:]]


def test_a_nan_never_reaches_the_weights(make_model: ModelMaker, batch: list[Trajectory]) -> None:
    stepper = Stepper(make_model, "optim.max_skips=3")
    stepper(batch)
    before, state = stepper.weights(), stepper.step.optimizer.state_tensors()
    for _ in range(2):
        assert stepper(damaged(batch)).skipped
    with pytest.raises(NumericsError, match="3 updates in a row were skipped"):
        stepper(damaged(batch))
    assert all(torch.equal(before[name], tensor) for name, tensor in stepper.weights().items())
    after = stepper.step.optimizer.state_tensors()
    assert all(torch.equal(state[name], tensor) for name, tensor in after.items())


HUGE = 1e30


def with_logprob(t: Trajectory, value: float) -> Trajectory:
    logprobs = t.behavior_logprobs.copy()
    logprobs[np.flatnonzero(t.loss_mask)[-1]] = value
    return dataclasses.replace(t, behavior_logprobs=logprobs)


def with_score(t: Trajectory, value: float) -> Trajectory:
    return dataclasses.replace(t, scores=(dataclasses.replace(t.scores[0], value=value),))


def with_weight(t: Trajectory, value: float) -> Trajectory:
    return dataclasses.replace(t, scores=(dataclasses.replace(t.scores[0], weight=value),))


BAD = [math.nan, math.inf, -math.inf, HUGE, -HUGE, 1e39]
FIELDS = {
    "behavior log-probability": with_logprob,
    "score outcome": with_score,
    "score outcome ": with_weight,
}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("field", FIELDS)
def test_a_bad_value_in_a_batch_is_caught_before_any_update(
    make_model: ModelMaker, batch: list[Trajectory], tmp_path: Path, field: str, value: float
) -> None:
    stepper = Stepper(make_model, "optim.minibatches=2", "batch.groups=2", quarantine=tmp_path / "q")
    stepper(batch)
    before, state = stepper.weights(), stepper.step.optimizer.state_tensors()
    with np.errstate(over="ignore"):
        poisoned = [*batch[:5], FIELDS[field](batch[5], value), *batch[6:]]
    result = stepper(poisoned)
    (fault,) = result.faults
    assert fault.reason.startswith(f"{field.strip()} of trajectory a/5 is ")
    assert (fault.of_batch, fault.trajectories) == (True, tuple(range(8)))
    assert (result.tokens_trained, result.metrics["skipped/batch"], result.metrics["masked"]) == (0, 1.0, 1.0)
    assert undefined_names(result.metrics) == []
    assert all(torch.equal(before[name], tensor) for name, tensor in stepper.weights().items())
    after = stepper.step.optimizer.state_tensors()
    assert all(torch.equal(state[name], tensor) for name, tensor in after.items())
    noted = json.loads((tmp_path / "q/step-00000000.json").read_text())
    assert noted == {
        "step": 0,
        "reason": fault.reason,
        "identities": [{"run": "r", "actor": "a", "epoch": 0, "seq": n} for n in range(8)],
    }


@pytest.mark.parametrize("value", BAD[:5])
def test_a_bad_advantage_is_caught_before_any_update(
    make_model: ModelMaker, batch: list[Trajectory], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*arguments: Any) -> Advantages:
        worth = advantages(*arguments)
        worth.advantages[3] = value
        return worth

    stepper = Stepper(make_model)
    before = stepper.weights()
    monkeypatch.setattr("slipstream.policy_step.advantages", spoilt)
    assert stepper(batch).faults[0].reason == f"advantage of trajectory a/3 is {float(np.float32(value))}"
    assert all(torch.equal(before[name], tensor) for name, tensor in stepper.weights().items())


def test_a_skipped_minibatch_is_as_if_its_groups_had_not_been_there(
    make_model: ModelMaker, batch: list[Trajectory], tmp_path: Path
) -> None:
    """The gradient of the first minibatch is spoilt; the second moves the weights from where they were."""
    options = ("optim.minibatches=2", "batch.groups=2")
    stepper, without = Stepper(make_model, *options, quarantine=tmp_path), Stepper(make_model, *options)
    calls: list[None] = []

    def spoil(gradient: Tensor) -> Tensor:
        calls.append(None)
        return gradient * math.nan if len(calls) == 1 else gradient

    next(stepper.model.parameters()).register_hook(spoil)
    result = stepper(batch)
    (fault,) = result.faults
    assert (fault.trajectories, fault.of_batch) == ((0, 1, 2, 3), False)
    assert fault.reason == "gradient norm is nan"
    assert result.tokens_trained == sum(int(t.loss_mask.sum()) for t in batch[4:])
    without.step._minibatches = lambda _: [[4, 5, 6, 7]]
    without(batch)
    expected = without.weights()
    assert all(torch.equal(expected[name], tensor) for name, tensor in stepper.weights().items())
    noted = json.loads((tmp_path / "step-00000000.json").read_text())
    assert [identity["seq"] for identity in noted["identities"]] == [0, 1, 2, 3]


def test_the_last_skip_names_step_reason_and_all_quarantine_files(
    make_model: ModelMaker, batch: list[Trajectory], tmp_path: Path
) -> None:
    stepper = Stepper(make_model, "optim.max_skips=2", quarantine=tmp_path)
    slips = slips_of(batch)
    stepper.step(damaged(batch), slips, step=6)
    stepper.step(batch, slips, step=7)
    stepper.step(damaged(batch), slips, step=8)
    with pytest.raises(NumericsError) as raised:
        stepper.step(damaged(batch), slips, step=9)
    files = [f"{tmp_path}/step-{step:08d}.json" for step in (8, 9)]
    assert str(raised.value) == (
        "step 9: behavior log-probability of trajectory a/3 is nan, and 2 updates in a row were skipped; "
        f"lower optim.learning_rate or look at the quarantined batches (quarantined: {', '.join(files)})"
    )
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_spoilt_weight_of_the_frozen_policy_is_caught(
    make_model: ModelMaker, batch: list[Trajectory], value: float
) -> None:
    stepper = Stepper(make_model)
    assert stepper.step._reference is not None
    with torch.no_grad():
        next(stepper.step._reference.parameters())[3, 3] = value
    before = stepper.weights()
    assert stepper(batch).skipped
    assert all(torch.equal(before[name], tensor) for name, tensor in stepper.weights().items())


def test_a_trajectory_nobody_could_judge_is_left_out(make_model: ModelMaker, batch: list[Trajectory]) -> None:
    lost = Score(name="outcome", kind=ScoreKind.OUTCOME, weight=1.0, value=None, invalid="grader died")
    judged = [dataclasses.replace(t, scores=(lost,)) if n == 2 else t for n, t in enumerate(batch)]
    stepper, without = Stepper(make_model, UNCLIPPED), Stepper(make_model, UNCLIPPED)
    result = stepper(judged)
    without([t for n, t in enumerate(batch) if n != 2])
    assert_same_gradient(stepper.gradient(), without.gradient(), 1e-5)
    assert result.tokens_trained == sum(int(t.loss_mask.sum()) for n, t in enumerate(batch) if n != 2)
    assert np.isfinite(result.metrics["reward"]) and result.metrics["masked/over_age"] == 0.0


def test_without_a_reference_there_is_no_kl(make_model: ModelMaker, batch: list[Trajectory]) -> None:
    config = config_of("objective.kl_coefficient=0.0")
    result = PolicyStep(make_model(), None, config)(batch, slips_of(batch), step=0)
    assert result.metrics["loss/kl"] == 0.0


def test_describe_counts() -> None:
    model_free = Trajectory(
        identity=TrajectoryId(run="r", actor="a", epoch=0, seq=0),
        attempt=TaskAttempt(task=0, seed=1, group=0, attempt=0),
        split=Split.TRAIN,
        evaluation=-1,
        issue=0,
        token_ids=np.zeros(10, np.int32),
        loss_mask=np.ones(10, np.uint8),
        behavior_logprobs=np.zeros(10, np.float32),
        versions=np.zeros(10, np.int32),
        turns=np.zeros(10, np.int16),
        turn_rewards=np.zeros(4, np.float32),
        scores=(
            Score(name="outcome", kind=ScoreKind.OUTCOME, weight=1.0, value=1.0),
            Score(name="step", kind=ScoreKind.PENALTY, weight=-0.05, value=4.0),
        ),
        outcome=Outcome.COMPLETED,
        tool_calls=[
            ToolCall(turn=0, name="search", arguments={}, status=ToolStatus.ERROR, latency_s=0.0),
            ToolCall(turn=1, name="search", arguments={}, status=ToolStatus.OK, latency_s=0.0),
        ],
        sampling=Sampling(),
    )
    other = dataclasses.replace(model_free, scores=(), outcome=Outcome.TIMED_OUT, tool_calls=[])
    assert describe([model_free, other]) == pytest.approx(
        {
            "success": 0.5,
            "turns": 4.0,
            "length": 10.0,
            "tools/success": 0.5,
            "tools/valid": 2 / 8,
            "tools/cached": 0.0,
            "reward/outcome": 0.5,
            "reward/step": -0.1,
            "outcome/completed": 0.5,
            "outcome/timed_out": 0.5,
        }
    )
