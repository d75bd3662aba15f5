"""The Triton scan, in Triton's interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slipstream_kernels import gae, segment_scan
from slipstream_kernels.dispatch import interpreted
from slipstream_kernels.testing import assert_matches_reference, cu_seqlens_of

kernels = pytest.importorskip("slipstream_kernels.triton.segment_scan")

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
TILE = 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter scans element by element: small tiles, of which fewer are carried at once."""
    monkeypatch.setattr(kernels, "TILE", TILE)
    monkeypatch.setattr(kernels, "TILES_AT_ONCE", 8)


def both(decay: Tensor, value: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    ours, theirs = (segment_scan(decay, value, bounds, backend=name) for name in ("triton", "reference"))
    return ours, theirs


@pytest.mark.parametrize(
    "lengths",
    [
        [],
        [0],
        [1],
        [0, 1, 0],
        [7],
        [TILE - 1, 1],
        [TILE, 1],
        [TILE + 1],
        [1, TILE, 0, 0, TILE],
        [11] * 9,
        [5, 0, TILE * 19 + 5, 3],
    ],
)
def test_equals_the_reference(lengths: list[int]) -> None:
    decay, value = torch.rand(sum(lengths)), torch.randn(sum(lengths))
    ours, theirs = both(decay, value, cu_seqlens_of(lengths))
    assert_matches_reference(ours, theirs)


def test_a_long_segment_with_decay_near_one_carries_over_tiles() -> None:
    tokens = 33 * TILE + 3
    decay, value = 0.999 + 0.001 * torch.rand(tokens), torch.randn(tokens)
    ours, theirs = both(decay, value, torch.tensor([0, tokens]))
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_shipped_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert kernels.TILE > TILE
    lengths = [3, kernels.TILE - 1, 5]
    decay, value = 0.9 + 0.1 * torch.rand(sum(lengths)), torch.randn(sum(lengths))
    ours, theirs = both(decay, value, cu_seqlens_of(lengths))
    assert_matches_reference(ours, theirs)


def test_order_is_backwards() -> None:
    # With decay 1/2 each token weighs half of the one before it, exactly.
    value = torch.tensor([1.0, 2.0, 4.0, 8.0])
    ours, _ = both(torch.full((4,), 0.5), value, torch.tensor([0, 4]))
    assert ours.tolist() == [4.0, 6.0, 8.0, 8.0]


@pytest.mark.parametrize("place", [0, TILE - 1, TILE, 2 * TILE - 1])
def test_infinity_and_nan_stay_in_their_segment(place: int) -> None:
    value = torch.ones(2 * TILE + 5)
    value[place : place + 2] = torch.tensor([float("nan"), float("inf")])
    bounds = torch.tensor([0, place, place + 2, 2 * TILE + 5])
    ours, theirs = both(torch.full_like(value, 0.5), value, bounds)
    outside = torch.ones_like(value, dtype=torch.bool)
    outside[place : place + 2] = False
    assert_matches_reference(ours[outside], theirs[outside])
    assert not ours[~outside].isfinite().any()


def test_runs_give_the_same_bits() -> None:
    decay, value = torch.rand(150), torch.randn(150)
    bounds = torch.tensor([0, 70, 70, 140, 150])
    first, second = (segment_scan(decay, value, bounds, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_estimators_take_it() -> None:
    values, rewards, mask = torch.randn(150), torch.randn(150), torch.randint(0, 2, (150,))
    bounds = torch.tensor([0, 120, 150])
    ours, theirs = (
        gae(values, rewards, mask, bounds, discount=0.9, gae_lambda=0.9, backend=name)
        for name in ("triton", "reference")
    )
    assert_matches_reference(ours[0], theirs[0])
    assert_matches_reference(ours[1], theirs[1])
