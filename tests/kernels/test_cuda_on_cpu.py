"""The CUDA kernels, run on the CPU thread by thread, give what the native library gives.

The folder cuda_on_cpu stands in for CUDA's headers: it shows that the kernels compute the right thing, not
that a GPU runs them, nor how fast.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream_kernels import (
    NativeError,
    checksum64,
    delta_encode,
    delta_encode_cast,
    fp8_quantize,
    native,
    native_cuda,
    segment_scan,
)
from slipstream_kernels.native_advantage import CUDA_TILE, Estimator, Factors, estimate
from slipstream_kernels.testing import assert_matches_reference, cu_seqlens_of

ROOT = Path(__file__).parents[2]
HEADERS = Path(__file__).parent / "cuda_on_cpu"
COMPILER = shutil.which("g++")
LAUNCH = re.compile(r"(\w+(?:<\w+>)?)\s*<<<(.+?),\s+(\w+),\s+0,\s+queue>>>\((.*?)\);", re.S)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(COMPILER is None or not native.available(), reason="needs g++ and the native library"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build csrc/cuda with a C++ compiler, launches turned into calls."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    flags = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", f"-I{HEADERS}"]
    flags += [f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'csrc/include'}"]

    def build(source: Path) -> str:
        text = LAUNCH.sub(r"cuda_on_cpu::launch(\2, \3, [=] { \1(\4); });", source.read_text())
        assert "<<<" not in text, source
        made = folder / f"{source.stem}.cpp"
        made.write_text(text)
        subprocess.run(["g++", *flags, "-c", made, "-o", made.with_suffix(".o")], check=True, timeout=280)
        return str(made.with_suffix(".o"))

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sorted((ROOT / "csrc/cuda").glob("*.cu"))))
    target = folder / "libslipstream_cuda.so"
    subprocess.run(["g++", "-shared", "-pthread", *objects, "-o", target], check=True, timeout=280)
    return target


@pytest.fixture(autouse=True)
def use_library(library: Path) -> Iterator[None]:
    """Let native_cuda call it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_cuda, "LIBRARY", library)
        native_cuda.library.cache_clear()
        yield
    native_cuda.library.cache_clear()


def call(name: str, *arguments: object) -> None:
    """Call a function with the addresses of tensors, on the default stream."""
    plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    native_cuda.call(f"slipstream_cuda_{name}", *plain, None)


def workspace(count: int) -> Tensor:
    return torch.full((128 + 72 * -(-count // 512),), 77, dtype=torch.uint8)


def encode(plan: str, first: Tensor, second: Tensor) -> Tensor:
    room, size = workspace(second.numel()), torch.empty(1, dtype=torch.int64)
    call(plan, first, second, second.numel(), 1, 2, room, room.numel(), size)
    data = torch.full((int(size),), 99, dtype=torch.uint8)
    call("delta_write", second, second.numel(), room, data, data.numel())
    return data


def apply(base: Tensor, data: Tensor, output: Tensor) -> int:
    room, status = workspace(base.numel()), torch.empty(1, dtype=torch.int32)
    call("delta_apply", base, base.numel(), data, data.numel(), room, room.numel(), output, status)
    return int(status)


def pair(count: int, share: float) -> tuple[Tensor, Tensor]:
    old = torch.randn(count).bfloat16()
    new = old.clone()
    new.view(torch.int16)[torch.rand(count) < share] += 1
    return old.view(torch.int16), new.view(torch.int16)


@pytest.mark.parametrize("size", [0, 7, 16, 17, 40_001])
def test_checksum(size: int) -> None:
    data = torch.randint(0, 256, (size + 1,), dtype=torch.uint8)
    for part in (data[:size], data[1:]):
        result = torch.empty(1, dtype=torch.int64)
        call("checksum64", part, size, result)
        assert int(result) % 2**64 == checksum64(part)


@pytest.mark.parametrize(
    ("count", "share"),
    [(0, 0.0), (1, 1.0), (511, 0.12), (513, 0.003), (1024, 1.0), (3000, 0.0), (3000, 0.12), (33_500, 0.02)],
)
def test_delta(count: int, share: float) -> None:
    old, new = pair(count, share)
    data = encode("delta_plan", old, new)
    expected = delta_encode(old, new, base_version=1, new_version=2, backend="native")
    assert torch.equal(data, expected.data)
    output = torch.full_like(old, 7)
    assert apply(old, data, output) == native.OK
    assert torch.equal(output, new)
    changed = old.clone()
    assert apply(changed, data, changed) == native.OK
    assert torch.equal(changed, new)
    if count:
        output.fill_(7)
        assert apply(old + 1, data, output) == native.WRONG_BASE
        assert (output == 7).all()


@pytest.mark.parametrize("count", [1, 1500])
def test_delta_within_the_cast(count: int) -> None:
    weights = torch.randn(count).bfloat16()
    master = weights.float() * (1 + 0.004 * torch.rand(count))
    master[0] = float("nan")
    ours, theirs = weights.clone(), weights.clone()
    data = encode("delta_plan_cast", master, ours)
    expected = delta_encode_cast(master, theirs, base_version=1, new_version=2, backend="native")
    assert torch.equal(data, expected.data)
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def test_forged_deltas_get_the_status_of_the_native_library() -> None:
    choices, seen = random.Random(0), set()
    for _ in range(30):
        old, new = pair(1500, choices.choice([0.02, 0.2, 0.9]))
        data = bytearray(delta_encode(old, new, backend="native").to_bytes())
        for _ in range(choices.randint(1, 3)):
            place = choices.choice([choices.randrange(len(data) - 8), choices.randrange(64, 120)])
            data[place] = choices.choice([0, 1, 254, 255, choices.randrange(256)])
        data[-8:] = checksum64(bytes(data[:-8])).to_bytes(8, "little")
        forged = torch.frombuffer(data, dtype=torch.uint8).clone()
        ours, theirs = torch.full_like(old, 7), torch.full_like(old, 7)
        status = apply(old, forged, ours)
        arguments = (old.data_ptr(), 1500, forged.data_ptr(), forged.numel(), 1, theirs.data_ptr())
        assert status == native.status_of("slipstream_delta_apply", *arguments)
        assert torch.equal(ours, theirs)
        seen.add(status)
    assert {native.BAD_DELTA, native.WRONG_RESULT} <= seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 264), (130, 257)])
def test_fp8(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = (torch.randn(shape) * torch.rand(shape) ** 12).to(dtype)
    expected = fp8_quantize(weight, backend="native")
    values, scales = torch.empty_like(expected.values), torch.full_like(expected.scales, float("nan"))
    status = torch.full((1,), 77, dtype=torch.int32)
    is_bfloat16 = dtype is torch.bfloat16
    call("fp8_quantize", weight, is_bfloat16, *shape, values, scales, status)
    assert int(status) == native.OK
    assert torch.equal(values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(scales, expected.scales)
    weight[-1, -1] = float("nan")
    call("fp8_quantize", weight, is_bfloat16, *shape, values, scales, status)
    assert int(status) == native.NOT_FINITE


def scanned(decay: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
    tokens, output = value.numel(), torch.full_like(value, float("nan"))
    room = torch.empty(2 * -(-tokens // 4096))
    segments = bounds.numel() - 1
    call("segment_scan_f32", decay, value, bounds, segments, tokens, room, 4 * room.numel(), output)
    return output


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [0, 0, 5, 0, 2000, 3, 0],
        [4096, 1],
        [4095, 4097, 1],
        [300] * 40,
        [1] * 5000,
        [0] * 600 + [5, 8200],
    ],
)
def test_scan(lengths: list[int]) -> None:
    decay, value = torch.rand(sum(lengths)), torch.randn(sum(lengths))
    bounds = cu_seqlens_of(lengths)
    assert_matches_reference(scanned(decay, value, bounds), segment_scan(decay, value, bounds))


def test_scan_over_tiles_with_decay_near_one() -> None:
    decay, value = 0.999 + 0.001 * torch.rand(20_000), torch.randn(20_000)
    bounds = torch.tensor([0, 20_000])
    expected = segment_scan(decay, value, bounds)
    assert (scanned(decay, value, bounds) - expected).norm() / expected.norm() < 1e-5


def test_infinity_stays_in_its_segment() -> None:
    value = torch.ones(9000)
    value[4500:4502] = torch.tensor([float("inf"), float("nan")])
    result = scanned(torch.full((9000,), 0.5), value, torch.tensor([0, 4500, 4502, 9000]))
    assert result[:4500].isfinite().all()
    assert result[4502:].isfinite().all()
    assert not result[4500:4502].isfinite().any()


FACTORS = Factors(discount=0.99, trace_lambda=0.95, rho_cap=1.5, trace_cap=1.02)


@pytest.fixture
def without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=None))


def packed(lengths: list[int], *, holes: float = 0.3) -> dict[str, Any]:
    """Random segments; what must not be read is NaN."""
    tokens = sum(lengths)
    case: dict[str, Any] = {name: torch.randn(tokens) for name in ("values_N", "rewards_N", "log_ratio_N")}
    case["mask_N"] = torch.rand(tokens) >= holes
    for name in ("values_N", "rewards_N", "log_ratio_N"):
        case[name][~case["mask_N"]] = float("nan")
    case["cu_seqlens"] = cu_seqlens_of(lengths)
    case["bootstrap_S"] = torch.randn(len(lengths))
    return case


def assert_estimates_match(case: dict[str, Any], estimator: Estimator, factors: Factors = FACTORS) -> None:
    needed = dict(case)
    if estimator is not Estimator.VTRACE:
        del needed["log_ratio_N"]
    if estimator is Estimator.RETURN:
        del needed["values_N"]
        factors = replace(factors, trace_lambda=1.0)
    ours, theirs = (estimate(estimator, factors, **needed, cuda=cuda) for cuda in (True, False))
    for result, expected in zip(ours, theirs, strict=True):
        if expected is not None:
            assert result is not None
            # Sums that cancel keep the error of their terms.
            assert float((result - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
            assert (result[~case["mask_N"]] == 0).all()


@pytest.mark.usefixtures("without_streams")
@pytest.mark.parametrize("estimator", Estimator)
@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [CUDA_TILE - 1],
        [CUDA_TILE],
        [CUDA_TILE + 1],
        [0, 0, 5, 0, 3000, 3, 0],
        [CUDA_TILE, CUDA_TILE - 1, CUDA_TILE + 1, 1],
        [1] * 5000,
        [0] * 600 + [5, 8200],
    ],
    ids=lambda lengths: f"{len(lengths)} of {sum(lengths)}",
)
def test_estimators(estimator: Estimator, lengths: list[int]) -> None:
    assert_estimates_match(packed(lengths), estimator)


@pytest.mark.usefixtures("without_streams")
@pytest.mark.parametrize("estimator", Estimator)
def test_estimators_carry_over_holes_as_wide_as_tiles(estimator: Estimator) -> None:
    # Nothing sampled around two borders of tiles, in a whole tile, at the end of a segment, in a segment.
    case = packed([2 * CUDA_TILE + 5, 40, CUDA_TILE + 300, 17], holes=0.0)
    for start, end in ((2000, 2 * CUDA_TILE + 2), (4101, 4141), (7000, 7441)):
        case["mask_N"][start:end] = False
        case["rewards_N"][start:end] = float("nan")
    assert_estimates_match(case, estimator)


@pytest.mark.usefixtures("without_streams")
@pytest.mark.parametrize("estimator", Estimator)
@pytest.mark.parametrize("factors", [(0.0, 0.0), (1.0, 0.0), (0.9, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_estimators_at_the_ends_of_their_factors(estimator: Estimator, factors: tuple[float, float]) -> None:
    case = packed([3, CUDA_TILE + 100, 9])
    assert_estimates_match(case, estimator, Factors(discount=factors[0], trace_lambda=factors[1]))


@pytest.mark.usefixtures("without_streams")
@pytest.mark.parametrize("estimator", Estimator)
def test_estimators_at_addresses_that_no_wide_load_takes(estimator: Estimator) -> None:
    case = packed([700, CUDA_TILE])
    for name in ("values_N", "rewards_N", "log_ratio_N", "mask_N"):
        case[name] = torch.cat([case[name][:1], case[name]])[1:]
    assert_estimates_match(case | {"bootstrap_S": None}, estimator)


@pytest.mark.usefixtures("without_streams")
@pytest.mark.parametrize("estimator", Estimator)
def test_what_is_not_finite_stays_in_its_segment(estimator: Estimator) -> None:
    case = packed([CUDA_TILE, 2, CUDA_TILE + 1], holes=0.0)
    for name, bad in (("values_N", "nan"), ("rewards_N", "inf"), ("log_ratio_N", "nan")):
        case[name][CUDA_TILE : CUDA_TILE + 2] = float(bad)
    case["bootstrap_S"][1] = float("nan")
    if estimator is not Estimator.VTRACE:
        del case["log_ratio_N"]
    result = estimate(estimator, FACTORS, **case, cuda=True)[1]
    assert result.isfinite().tolist() == [True] * CUDA_TILE + [False] * 2 + [True] * (CUDA_TILE + 1)


@pytest.mark.usefixtures("without_streams")
@pytest.mark.parametrize("bounds", [[0, 9000], [5, 3000, 10, 2500], [-7, -9, 4], [3000, 0, 0, -1, 4096]])
def test_bounds_that_are_none_end_nothing_but_values(bounds: list[int]) -> None:
    case = packed([2500]) | {"cu_seqlens": torch.tensor(bounds), "bootstrap_S": None}
    del case["log_ratio_N"]
    advantage, _ = estimate(Estimator.GAE, FACTORS, **case, cuda=True)
    assert advantage is not None
    assert (advantage[~case["mask_N"]] == 0).all()


@pytest.mark.usefixtures("without_streams")
def test_refuses_a_workspace_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream_kernels.native_advantage._TILE_BYTES", 19)
    with pytest.raises(NativeError, match="a workspace or an output is too small"):
        assert_estimates_match(packed([CUDA_TILE + 1]), Estimator.GAE)
