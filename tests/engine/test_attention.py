"""Packed attention against the model's own, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from slipstream.attention import PackedSegments, run_decoder
from slipstream.packing import prefix_order, shared_paths

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


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_segments_that_share_a_beginning_equal_lone_ones(make_model: ModelMaker, kv_heads: int) -> None:
    """States and gradients, though each token of a common beginning is packed once."""
    model, plain = make_model(kv_heads=kv_heads), make_model(kv_heads=kv_heads)
    random = np.random.default_rng(2)
    trunk = random.integers(0, 37, 30)
    tails = [random.integers(0, 37, n) for n in (9, 1, 0, 20)]
    sequences = [np.append(trunk[:n], tail) for n, tail in zip((30, 30, 11, 5), tails, strict=True)]
    order, shared = prefix_order(sequences)
    ordered = [sequences[i] for i in order]
    lengths = np.array([len(s) for s in ordered])
    path = shared_paths(lengths, shared)
    packed, positions = np.zeros(path.max() + 1, np.int64), np.zeros(path.max() + 1, np.int64)
    packed[path] = np.concatenate(ordered)
    positions[path] = np.concatenate([np.arange(n) for n in lengths])
    assert len(packed) < lengths.sum() - 30
    segments = PackedSegments(np.append(0, np.cumsum(lengths)), path=path, shared=shared)
    found = run_decoder(model, torch.from_numpy(packed), torch.from_numpy(positions), segments)[path]
    expected = packed_hidden(plain, [torch.from_numpy(s) for s in ordered])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for states in (found, expected):
        (states * slope).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)
