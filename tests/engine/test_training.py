"""The optimizer step: schedule, guard, and a state that goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slipstream.config import OptimConfig
from slipstream.errors import CheckpointError, NumericsError
from slipstream.model import named_weights
from slipstream.training import Optimizer, schedule

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
    assert notes == {
        "grad_norm": pytest.approx(float(norm), rel=1e-5),
        "learning_rate": 0.005,
        "skipped": 0.0,
    }
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
        assert optimizer.step(losses, share=1.0)["skipped"] == 1.0
        assert (optimizer.skipped, optimizer.skipped_in_a_row) == (count, count)
    with pytest.raises(NumericsError, match="not finite 3 steps in a row"):
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
    assert notes["skipped"] == 1.0
    assert_equal(weights_of(model), weights)
    assert optimizer.step([loss_of(model, 1)], share=1.0)["skipped"] == 0.0
    assert (optimizer.skipped, optimizer.skipped_in_a_row) == (1, 0)
