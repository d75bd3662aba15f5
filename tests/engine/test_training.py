"""The optimizer step: schedule, guard, and a state that goes on as if nothing had happened."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slipstream import guard
from slipstream.config import OptimConfig
from slipstream.errors import CheckpointError, NumericsError
from slipstream.model import named_weights
from slipstream.training import Optimizer, Update, schedule

ModelMaker = Callable[..., PreTrainedModel]


def test_schedule_rises_and_falls() -> None:
    config = OptimConfig(warmup_steps=3, final_share=0.2)
    assert schedule(0, steps=10, config=config) == pytest.approx(0.25)
    assert schedule(1, steps=10, config=config) == pytest.approx(0.5 * 0.92)
    assert schedule(3, steps=10, config=config) == pytest.approx(1 - 0.8 * 0.3)
    assert schedule(5, steps=10, config=config) == pytest.approx(0.6)
    assert schedule(10, steps=10, config=config) == pytest.approx(0.2)
    assert schedule(99, steps=10, config=config) == pytest.approx(0.2)


def test_a_constant_schedule() -> None:
    config = OptimConfig(warmup_steps=0, final_share=1.0)
    assert {schedule(step, steps=4, config=config) for step in range(9)} == {1.0}


def loss_of(model: PreTrainedModel, seed: int, scale: float = 1.0) -> Callable[[], Tensor]:
    """A loss whose gradient is the same for equal weights and seed."""

    def loss() -> Tensor:
        random = torch.Generator().manual_seed(seed)
        return sum(
            ((p * torch.randn(p.shape, generator=random)).sum() * scale + p.square().sum() * 0.1)
            for p in model.parameters()
        )

    return loss


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in named_weights(model).items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


CONFIG = OptimConfig(learning_rate=0.01, weight_decay=0.1, max_skips=3)


def test_a_step_is_that_of_adamw(make_model: ModelMaker) -> None:
    """With the gradient clipped to norm 1, from two losses added up."""
    model, plain = make_model(), make_model()
    notes = Optimizer(model, CONFIG).step([loss_of(model, 1), loss_of(model, 2)], share=0.5)
    adam = torch.optim.AdamW(plain.parameters(), lr=0.005, betas=CONFIG.betas, weight_decay=0.1)
    (loss_of(plain, 1)() + loss_of(plain, 2)()).backward()
    norm = torch.sqrt(sum((p.grad.double().square().sum() for p in plain.parameters()), torch.tensor(0.0)))
    for parameter in plain.parameters():
        parameter.grad /= norm.float()
    adam.step()
    assert notes == Update(grad_norm=pytest.approx(float(norm), rel=1e-5), learning_rate=0.005)
    for name, tensor in named_weights(model).items():
        torch.testing.assert_close(tensor, named_weights(plain)[name], atol=1e-6, rtol=1e-5)


def test_a_restored_state_gives_the_same_next_step(make_model: ModelMaker) -> None:
    model = make_model()
    optimizer = Optimizer(model, CONFIG)
    for seed in range(3):
        optimizer.step([loss_of(model, seed)], share=1.0)
    copy = make_model(seed=9)
    copy.load_state_dict(model.state_dict())
    resumed = Optimizer(copy, CONFIG)
    resumed.load_state_tensors(optimizer.state_tensors())
    for seed in (3, 4):
        optimizer.step([loss_of(model, seed)], share=0.7)
        resumed.step([loss_of(copy, seed)], share=0.7)
    assert_equal(weights_of(model), weights_of(copy))
    assert_equal(optimizer.state_tensors(), resumed.state_tensors())


def test_updates_too_small_for_bfloat16_add_up(make_model: ModelMaker) -> None:
    """Each moves a weight by 1e-5, the neighbours of 0.5 are 0.002 away: alone it would be rounded away."""
    model = make_model().bfloat16()
    optimizer = Optimizer(model, OptimConfig(learning_rate=1e-5))
    before = weights_of(model)
    for _ in range(100):
        optimizer.step([lambda: sum(p.sum() for p in model.parameters())] * 2, share=1.0)
    state = optimizer.state_tensors()
    for name, weight in named_weights(model).items():
        master = state[f"master.{name}"]
        torch.testing.assert_close(master, before[name].float() - 100 * 1e-5, atol=1e-5, rtol=0.0)
        assert torch.equal(weight, master.bfloat16())
    embedding = "model.embed_tokens.weight"
    assert float((named_weights(model)[embedding] != before[embedding]).float().mean()) > 0.5


def test_a_restored_state_in_bfloat16_gives_the_same_next_step(make_model: ModelMaker) -> None:
    model = make_model().bfloat16()
    config = CONFIG.model_copy(update={"learning_rate": 1e-4})
    optimizer = Optimizer(model, config)
    for seed in range(3):
        optimizer.step([loss_of(model, seed)], share=1.0)
    copy = make_model(seed=9).bfloat16()
    copy.load_state_dict(model.state_dict())
    resumed = Optimizer(copy, config)
    resumed.load_state_tensors(optimizer.state_tensors())
    for seed in (3, 4):
        optimizer.step([loss_of(model, seed)], share=0.7)
        resumed.step([loss_of(copy, seed)], share=0.7)
    assert_equal(weights_of(model), weights_of(copy))
    assert_equal(optimizer.state_tensors(), resumed.state_tensors())


def test_the_state_before_the_first_step_is_empty(make_model: ModelMaker) -> None:
    model = make_model()
    assert Optimizer(model, CONFIG).state_tensors() == {}
    Optimizer(model, CONFIG).load_state_tensors({})


class Suffixes(torch.nn.Module):
    """One parameter's name is the end of another's."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((2,), fill))
        self.block = torch.nn.Module()
        self.block.weight = torch.nn.Parameter(torch.full((2,), -fill))


def test_names_that_end_alike_keep_their_own_state() -> None:
    model = Suffixes(1.0)
    optimizer = Optimizer(model, CONFIG)  # type: ignore[arg-type]
    optimizer.step([lambda: (model.weight * 3 + model.block.weight).sum()], share=1.0)
    state = optimizer.state_tensors()
    assert not torch.equal(state["exp_avg.weight"], state["exp_avg.block.weight"])
    again = Optimizer(Suffixes(1.0), CONFIG)  # type: ignore[arg-type]
    again.load_state_tensors(state)
    assert_equal(again.state_tensors(), state)


def test_the_state_of_another_model_is_refused(make_model: ModelMaker) -> None:
    model = make_model()
    optimizer = Optimizer(model, CONFIG)
    optimizer.step([loss_of(model, 0)], share=1.0)
    with pytest.raises(CheckpointError, match=r"does not fit the model: block\.weight is on one side only"):
        Optimizer(Suffixes(1.0), CONFIG).load_state_tensors(optimizer.state_tensors())  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_non_finite_losses_leave_everything_as_it_was(
    make_model: ModelMaker, scale: float, place: int
) -> None:
    model = make_model()
    optimizer = Optimizer(model, CONFIG)
    optimizer.step([loss_of(model, 0)], share=1.0)
    weights, state = weights_of(model), optimizer.state_tensors()
    losses = [loss_of(model, 1), loss_of(model, 2)]
    losses[place] = loss_of(model, 3, scale)
    for count in (1, 2):
        assert optimizer.step(losses, share=1.0).fault
        assert (optimizer.skipped, optimizer.skipped_in_a_row) == (count, count)
    with pytest.raises(NumericsError, match="3 updates in a row were skipped"):
        optimizer.step(losses, share=1.0)
    assert_equal(weights_of(model), weights)
    assert_equal(optimizer.state_tensors(), state)


def test_non_finite_gradients_of_a_finite_loss_are_skipped_too(make_model: ModelMaker) -> None:
    model = make_model()
    weights = weights_of(model)
    optimizer = Optimizer(model, CONFIG)
    # The root's slope at 0 is infinite.
    parameter = next(model.parameters())
    notes = optimizer.step([lambda: (parameter.flatten()[0] * 0).abs().sqrt()], share=1.0)
    assert notes.fault
    assert_equal(weights_of(model), weights)
    assert optimizer.step([loss_of(model, 1)], share=1.0).fault == ""
    assert (optimizer.skipped, optimizer.skipped_in_a_row) == (1, 0)


def spiking(model: PreTrainedModel, seed: int, gradient: float) -> Callable[[], Tensor]:
    """A usual loss whose gradient a hook multiplies."""
    usual = loss_of(model, seed)

    def loss() -> Tensor:
        value = usual()
        value.register_hook(lambda incoming: incoming * gradient)
        return value

    return loss


def warmed_up(make_model: ModelMaker, **options: float) -> tuple[PreTrainedModel, Optimizer]:
    model = make_model()
    optimizer = Optimizer(model, CONFIG.model_copy(update=options))
    for seed in range(guard.WARMUP):
        assert not optimizer.step([loss_of(model, seed)], share=0.1).fault
    return model, optimizer


@pytest.mark.parametrize("size", [100.0, -100.0, 1e8, 1e30, -1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_spikes_leave_everything_as_it_was(make_model: ModelMaker, where: str, size: float) -> None:
    model, optimizer = warmed_up(make_model)
    weights, state = weights_of(model), optimizer.state_tensors()
    accepted = optimizer.guard_state()["accepted"]
    bad = loss_of(model, 9, size) if where == "loss" else spiking(model, 9, size)
    update = optimizer.step([loss_of(model, 8), bad], share=1.0)
    assert re.match(r"(loss|gradient norm) is \S+(, a spike: expected at most \d.*)?$", update.fault)
    assert update.learning_rate == 0.0
    assert_equal(weights_of(model), weights)
    assert_equal(optimizer.state_tensors(), state)
    assert optimizer.guard_state() == {"skipped": 1, "skipped_in_a_row": 1, "accepted": accepted}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("size", [1e8, 1e30])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_absurd_values_are_caught_in_the_very_first_update(
    make_model: ModelMaker, where: str, size: float
) -> None:
    model = make_model()
    optimizer, weights = Optimizer(model, CONFIG), weights_of(model)
    bad = loss_of(model, 9, size) if where == "loss" else spiking(model, 9, size)
    fault = optimizer.step([bad], share=1.0).fault
    # The norm of the largest gradients overflows.
    assert "a spike: expected at most 1e+06" in fault or fault == "gradient norm is inf"
    assert_equal(weights_of(model), weights)


def test_a_factor_of_zero_lets_spikes_through_but_nothing_that_is_not_finite(make_model: ModelMaker) -> None:
    model, optimizer = warmed_up(make_model, spike_factor=0.0)
    assert not optimizer.step([spiking(model, 9, 1e8)], share=1.0).fault
    assert optimizer.step([spiking(model, 9, float("nan"))], share=1.0).fault


def test_spikes_in_a_row_end_the_run(make_model: ModelMaker) -> None:
    model, optimizer = warmed_up(make_model)
    for _ in range(2):
        optimizer.step([spiking(model, 9, 1e4)], share=1.0)
    with pytest.raises(
        NumericsError, match=r"gradient norm is .*, a spike: .* 3 updates in a row were skipped"
    ):
        optimizer.step([spiking(model, 9, 1e4)], share=1.0)


def test_a_resumed_guard_judges_as_the_first_would_have(make_model: ModelMaker) -> None:
    model, optimizer = warmed_up(make_model)
    optimizer.step([spiking(model, 9, 1e4)], share=1.0)
    resumed = Optimizer(make_model(), CONFIG)
    resumed.load_guard_state(json.loads(json.dumps(optimizer.guard_state())))
    assert resumed.guard_state() == optimizer.guard_state()
    assert (resumed.skipped, resumed.skipped_in_a_row) == (1, 1)
    assert "a spike" in resumed.step([spiking(resumed._model, 9, 100.0)], share=1.0).fault


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_spoilt_weight_ends_the_run_before_anybody_publishes_it(
    make_model: ModelMaker, value: float
) -> None:
    model = make_model()
    optimizer = Optimizer(model, CONFIG)
    with torch.no_grad():
        list(model.parameters())[3].flatten()[5] = value
    with pytest.raises(
        NumericsError, match=r"the largest weight is (nan|inf|1e\+30): memory or AdamW's state"
    ):
        optimizer.step([loss_of(model, 1)], share=1.0)


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_spoilt_state_of_adamw_ends_the_run_or_moves_nothing_far(
    make_model: ModelMaker, kind: str, value: float
) -> None:
    """A huge second moment only stops its weight from moving."""
    model = make_model()
    optimizer = Optimizer(model, CONFIG)
    optimizer.step([loss_of(model, 1)], share=1.0)
    state = optimizer.state_tensors()
    name = next(name for name in state if name.startswith(f"{kind}."))
    state[name].flatten()[0] = value
    optimizer.load_state_tensors(state)
    try:
        optimizer.step([loss_of(model, 2)], share=1.0)
    except NumericsError as error:
        assert "the largest weight is" in str(error)
    else:
        assert kind == "exp_avg_sq" and value > 0
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
