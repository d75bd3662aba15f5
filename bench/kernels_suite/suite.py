"""All ops and their cases; and this machine's ceilings, which are measured before any of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from kernels_suite import codecs, heads, tokens
from kernels_suite.measure import timed
from kernels_suite.plan import Case, Place, Scale

CASES: Final[dict[str, Callable[[Place], Iterator[Case]]]] = {
    "linear_logprob": heads.logprob_cases,
    "linear_policy_loss": heads.policy_cases,
    "linear_kl": heads.kl_cases,
    "policy_loss": tokens.policy_loss_cases,
    "gae": tokens.gae_cases,
    "vtrace": tokens.vtrace_cases,
    "td_lambda": tokens.td_lambda_cases,
    "discounted_return": tokens.discounted_return_cases,
    "segment_scan": tokens.segment_scan_cases,
    "group_advantage": tokens.group_advantage_cases,
    "checksum64": codecs.checksum64_cases,
    "delta_encode": codecs.delta_encode_cases,
    "delta_apply": codecs.delta_apply_cases,
    "fp8_quantize": codecs.fp8_quantize_cases,
}
SQUARE: Final = {Scale.SMOKE: 256, Scale.CPU: 2048, Scale.GPU: 8192}
COPY_BYTES: Final = {Scale.SMOKE: 64 << 20, Scale.CPU: 512 << 20, Scale.GPU: 4 << 30}
ROUNDS: Final = 7


def ceilings(place: Place) -> dict[str, Any]:
    """Return copy bandwidth and the rate of a square matrix product, both on random data: medians."""
    scale = Scale.CPU if place.device == "cpu" and place.scale is Scale.GPU else place.scale
    size, side = COPY_BYTES[scale] // 2, SQUARE[scale]
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=place.device).to(place.dtype) for _ in range(2))
    copy_s = _median(lambda _: target.copy_(source), place.device)
    product_s = _median(lambda _: left @ right, place.device)
    return {
        "copy_gb_s": 2 * size / copy_s / 1e9,
        "copy_bytes": 2 * size,
        "matmul_tflop_s": 2 * side**3 / product_s / 1e12,
        "matmul": f"{side}×{side}×{side} {str(place.dtype).removeprefix('torch.')}",
    }


def _median(call: Callable[[Any], object], device: str) -> float:
    timed(call, [{}], 1, device)
    return statistics.median(timed(call, [{}], 1, device) for _ in range(ROUNDS))
