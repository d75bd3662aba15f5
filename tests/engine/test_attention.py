"""Packed attention against the model's own, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from slipstream.attention import PackedSegments, run_decoder

LENGTHS = (1, 7, 16, 1, 31)

ModelMaker = Callable[..., PreTrainedModel]


def packed_hidden(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    bounds = torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0)
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    return run_decoder(model, torch.cat(sequences), positions, PackedSegments(bounds))


def made_sequences() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    return [torch.randint(0, 37, (length,), generator=random) for length in LENGTHS]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_states_and_gradients_equal_those_of_lone_sequences(
    make_model: ModelMaker, kv_heads: int, implementation: str
) -> None:
    own = make_model(kv_heads=kv_heads, installed=False)
    own.set_attn_implementation(implementation)
    ours = make_model(kv_heads=kv_heads)
    sequences = made_sequences()
    expected = torch.cat([own.base_model(s[None]).last_hidden_state[0] for s in sequences])
    found = packed_hidden(ours, sequences)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * slope).sum().backward()
    (found * slope).sum().backward()
    for (name, ours_p), own_p in zip(ours.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours_p.grad, own_p.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_segments_do_not_see_each_other(make_model: ModelMaker) -> None:
    model, sequences = make_model(), made_sequences()
    before = packed_hidden(model, sequences)
    sequences[1] = (sequences[1] + 1) % 37
    changed = (packed_hidden(model, sequences) - before).abs().amax(dim=1) > 0
    assert changed.nonzero()[:, 0].tolist() == list(range(1, 8))
