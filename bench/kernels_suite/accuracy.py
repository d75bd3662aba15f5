"""Errors of outputs against float64, and the limits they are judged by."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from kernels_suite.plan import Case, Exact, Outputs

FLOAT32: Final = 1e-5
"""Relative error of a float32 path."""
LOGPROB: Final = 2e-5
"""Greatest |difference| of a log-probability, entropy or KL over the greatest |logit|, in any type."""
EAGER_TIMES: Final = 2.0
"""Gradients of bfloat16 inputs, and of a divergence: at most so many times eager PyTorch's error.

A divergence's gradient is a difference of two log-probabilities that are nearly equal: the rounding of the
logits, small against them, is not small against it.
"""
FP8: Final = 0.03
"""Rounding to float8 itself: three bits of mantissa."""
BFLOAT16: Final = 2e-2
"""But never more than this: eager's rounded log-probabilities also fall on the wrong side of the clip."""
PREFIXES: Final = ("unread_", "fact_")
"""Outputs that have no truth to compare with, and facts to report."""


def errors(outputs: Outputs, exact: Exact) -> dict[str, float]:
    """Return the error of each output with an exact one, NaN when it is not finite or of another shape."""
    shared = [name for name in outputs if name in exact.outputs and not name.startswith(PREFIXES)]
    return {name: _error(_read(outputs[name]), _read(exact.outputs[name]), exact.scales.get(name))
            for name in shared}  # fmt: skip


def facts(outputs: Outputs) -> dict[str, float]:
    """Return what outputs report besides values."""
    return {name.removeprefix("fact_"): float(_read(value)) for name, value in outputs.items()
            if name.startswith("fact_")}  # fmt: skip


def limit(case: Case, output: str, of_eager: float | None) -> float:
    """Return the greatest error allowed; `of_eager`: what eager PyTorch has in the same type."""
    if case.op == "fp8_quantize":
        return FP8
    if output in {"checksum", "restored"}:
        return 0.0
    if output in {"logprob", "entropy", "entropy_mean", "kl"}:
        return LOGPROB
    if of_eager is not None and follows_eager(case):
        return max(FLOAT32, min(BFLOAT16, EAGER_TIMES * of_eager))
    return FLOAT32


def follows_eager(case: Case) -> bool:
    """Return whether eager PyTorch's own error sets limits."""
    return case.dtype is torch.bfloat16 or case.op == "linear_kl"


def _read(value: Any) -> Any:
    return value() if callable(value) else value


def _error(actual: Any, expected: Any, scale: float | None) -> float:
    if not isinstance(expected, Tensor):
        return float(actual != expected)
    found, truth = actual.detach().double().cpu().flatten(), expected.detach().double().cpu().flatten()
    if found.shape != truth.shape or not bool(torch.isfinite(found).all()):
        return float("nan")
    tiny = torch.finfo(torch.float64).tiny
    if scale is not None:
        return float((found - truth).abs().max()) / max(scale, tiny)
    return float((found - truth).norm()) / max(float(truth.norm()), tiny)
