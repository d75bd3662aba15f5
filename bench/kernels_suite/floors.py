"""What a case costs at least, as a call to be timed beside it; and a GPU's launches and host time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any, Final

import torch

from kernels_suite.plan import Case, Inputs, Variant

MOST_PIECES: Final = 64
MOST_ROWS: Final = {"cpu": 2048, "cuda": 8192}
"""Rows of the products behind a ceiling; their time is scaled up to all rows."""


def least_cost(case: Case, device: str, cache_bytes: int) -> tuple[Callable[[Inputs], object], float]:
    """Return a call of the case's products on random data, or of a copy; and what to multiply its time by."""
    if case.products is None:
        size = max(1, int(case.size_bytes / 2))
        length = size * min(MOST_PIECES, max(2, math.ceil(cache_bytes / size)))
        source = torch.ones(length, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        pieces = cycle(zip(target.split(size), source.split(size), strict=True))

        def copy(inputs: Inputs) -> None:
            there, here = next(pieces)
            there.copy_(here)

        return copy, 1.0
    rows = min(case.rows, MOST_ROWS[device])
    products = []
    for m, k, n in case.products(rows):
        left = torch.randn(m, k, device=device).to(case.dtype)
        right = torch.randn(k, n, device=device).to(case.dtype)
        products.append((left, right, torch.empty(m, n, dtype=case.dtype, device=device)))

    def run(inputs: Inputs) -> None:
        for left, right, out in products:
            torch.mm(left, right, out=out)

    return run, case.rows / rows


def gpu_extras(variant: Variant, inputs: list[Inputs]) -> dict[str, Any]:
    """Return launches of one call, and the microseconds until the host is free again."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        variant.run(inputs[0])
        torch.cuda.synchronize()
    kernels = [event for event in trace.events() if "CUDA" in str(event.device_type)]
    began = time.perf_counter()
    variant.run(inputs[0])
    host_s = time.perf_counter() - began
    torch.cuda.synchronize()
    return {"launches": len(kernels), "host_us": host_s * 1e6}
