"""Matrices in e4m3: literal values, and the same bits from every backend."""

from __future__ import annotations

import pytest
import torch

from slipstream_kernels import BackendError, ShapeError, checksum64, fp8_dequantize, fp8_quantize, native

needs_native = pytest.mark.skipif(not native.available(), reason=native.description())
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
GOLDEN_CHECKSUM = 0x59A0DE1FEE177BD6


def spread(*shape: int) -> torch.Tensor:
    """Numbers over many magnitudes, so that tiles hold subnormal values too."""
    return torch.randn(shape) * torch.rand(shape) ** 12


@pytest.mark.parametrize("backend", BACKENDS)
def test_literal_values(backend: str) -> None:
    # amax 448 gives scale 1: rounding to nearest even, 2^-9 the least subnormal, signed zero.
    weight = torch.tensor([[448.0, -1.0, 1.0625, 1.1875, 0.0], [2**-9, 2**-10, 3 * 2**-10, -0.0, 448.0]])
    values, scales, checksum = fp8_quantize(weight, backend=backend)
    assert values.float().tolist() == [[448.0, -1.0, 1.0, 1.25, 0.0], [2**-9, 0.0, 2**-8, -0.0, 448.0]]
    assert values.view(torch.uint8).tolist() == [[0x7E, 0xB8, 0x38, 0x3A, 0], [1, 0, 2, 0x80, 0x7E]]
    assert scales.tolist() == [[1.0]]
    assert checksum == GOLDEN_CHECKSUM


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_tile_has_its_scale_and_zeros_have_one(backend: str) -> None:
    weight = torch.zeros(130, 260)
    weight[0, 0], weight[129, 127], weight[0, 259] = 896.0, -224.0, 2.0**-140
    values, scales, _ = fp8_quantize(weight, backend=backend)
    assert scales.tolist() == [[2.0, 1.0, 2.0**-126], [0.5, 1.0, 1.0]]
    assert (values.float()[0, 0], values.float()[129, 127]) == (448.0, -448.0)
    assert int((values.float() != 0).sum()) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_that_of_three_bits(backend: str) -> None:
    weight = torch.randn(200, 300)
    back = fp8_dequantize(fp8_quantize(weight, backend=backend))
    floor = weight.abs().max() / 448 * 2**-9
    assert ((back - weight).abs() <= weight.abs() * 2**-4 + floor).all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (128, 128), (129, 257), (3, 1000)])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30, 1e-38])
def test_native_bits_equal_the_reference(dtype: torch.dtype, shape: tuple[int, int], scale: float) -> None:
    weight = (spread(*shape) * scale).to(dtype)
    for block in ((128, 128), (1, 32), (100, 200)):
        ours, theirs = (fp8_quantize(weight, block=block, backend=name) for name in ("native", "reference"))
        assert torch.equal(ours.values.view(torch.uint8), theirs.values.view(torch.uint8))
        assert torch.equal(ours.scales, theirs.scales)
        assert ours.checksum == theirs.checksum


@needs_native
def test_native_rounds_as_pytorch_does_near_every_value() -> None:
    # Every e4m3 value, every middle between two, and their neighbours.
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2])
    points = torch.cat([points, points.nextafter(torch.tensor(1e9)), points.nextafter(torch.tensor(-1e9))])
    points = points.clamp(-448, 448).view(1, -1)
    block = (1, points.numel())
    ours, theirs = (fp8_quantize(points, block=block, backend=name) for name in ("native", "reference"))
    assert ours.scales.item() == 1.0
    assert torch.equal(ours.values.view(torch.uint8), theirs.values.view(torch.uint8))
    direct = points.to(torch.float8_e4m3fn)
    assert torch.equal(ours.values.view(torch.uint8), direct.view(torch.uint8))


@needs_native
def test_threads_do_not_change_the_bits() -> None:
    weight = spread(300, 500)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(fp8_quantize(weight, backend="native").checksum)
    assert len(set(results)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_layouts_count_by_their_values(backend: str) -> None:
    weight = spread(40, 70)
    expected = fp8_quantize(weight, backend=backend).checksum
    assert fp8_quantize(weight.T.contiguous().T, backend=backend).checksum == expected
    assert fp8_quantize(weight.clone().requires_grad_(), backend=backend).checksum == expected


def test_checksum_is_of_values_and_scales() -> None:
    values, scales, checksum = fp8_quantize(spread(5, 6))
    words = [checksum64(values.view(torch.uint8)), checksum64(scales)]
    assert checksum == checksum64(b"".join(word.to_bytes(8, "little") for word in words))
    assert fp8_quantize(spread(5, 6)).checksum != checksum


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_refuses_what_is_not_finite(backend: str, bad: float) -> None:
    weight = torch.ones(130, 3)
    weight[129, 2] = bad
    with pytest.raises(ShapeError, match="fp8_quantize: weight_VH must be finite, got infinity or NaN"):
        fp8_quantize(weight, backend=backend)


def test_refuses_bad_arguments() -> None:
    with pytest.raises(ShapeError, match=r"must be \[V, H\] float32 or bfloat16, got \[3\] torch.float32"):
        fp8_quantize(torch.ones(3))
    with pytest.raises(ShapeError, match=r"got .* torch\.float16"):
        fp8_quantize(torch.ones(3, 3, dtype=torch.float16))
    with pytest.raises(ShapeError, match="block must be two positive numbers, got"):
        fp8_quantize(torch.ones(3, 3), block=(0, 128))
    with pytest.raises(BackendError, match="backend 'triton' does not exist for this op"):
        fp8_quantize(torch.ones(3, 3), backend="triton")
