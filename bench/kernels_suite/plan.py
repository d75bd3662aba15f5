"""What is measured: a case of an op, and the variants that compute it.

Dimensions, as in slipstream_kernels: N packed tokens, M trained ones, H hidden, V vocabulary, S segments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, TypeAlias

import torch

import slipstream_kernels
from slipstream_kernels import Backend

Inputs: TypeAlias = dict[str, Any]
Outputs: TypeAlias = dict[str, Any]
"""name -> tensor or number, or a function that returns it and is not timed."""
Product: TypeAlias = tuple[int, int, int]
"""m, k, n of [m, k] @ [k, n]."""


class Scale(StrEnum):
    """How large the shapes are."""

    CHECK = "check"
    """Odd shapes, to compare with float64."""
    SMOKE = "smoke"
    """Seconds on two cores: whether everything runs."""
    CPU = "cpu"
    """What a CPU trains."""
    GPU = "gpu"
    """What a GPU trains; on a CPU only when asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where and how large."""

    device: str
    """cpu or cuda."""
    scale: Scale
    dtype: torch.dtype
    """Of hidden states and weights."""

    def random(self, seed: int) -> torch.Generator:
        """Return a generator on the device."""
        return torch.Generator(device=self.device).manual_seed(seed)


def training_dtype(device: str) -> torch.dtype:
    """Return the type of hidden states and weights that training uses on a device."""
    return torch.bfloat16 if device == "cuda" else torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to compute a case."""

    name: str
    """A backend of ours, eager, or a peer."""
    run: Callable[[Inputs], Outputs]
    lacks: str = ""
    """What it does not compute of the case's outputs, or computes besides."""
    obstacle: str = ""
    """Why it cannot run here; empty when it can."""
    ours: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """Outputs in float64."""

    outputs: Outputs
    scales: Mapping[str, float] = field(default_factory=dict)
    """name -> what the greatest difference is divided by; otherwise the error is that of the norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op at one shape."""

    op: str
    mode: str
    """forward, forward+backward, or for host overhead: call, call with gradient."""
    shape: str
    """Its name; `dims` has the numbers."""
    dims: Mapping[str, float]
    dtype: torch.dtype
    make: Callable[[int], Inputs]
    """Seed -> inputs of one call."""
    make_small: Callable[[], Inputs]
    """Inputs for the comparison with float64."""
    exact: Callable[[Inputs], Exact]
    variants: tuple[Variant, ...]
    eager: str = "eager"
    """The variant that ratios refer to."""
    products: Callable[[int], tuple[Product, ...]] | None = None
    """Rows -> the matrix products that no variant can do without."""
    rows: int = 0
    """Rows that enter the products."""
    size_bytes: float = 0.0
    """Least bytes read and written; the roof where there are no products."""

    @property
    def key(self) -> str:
        """Its name in baselines.json, without the variant."""
        return f"{self.op} {self.mode} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    @property
    def flops(self) -> float:
        """Of the matrix products."""
        products = () if self.products is None else self.products(self.rows)
        return float(sum(2 * m * k * n for m, k, n in products))

    @property
    def host_only(self) -> bool:
        """Whether the inputs are so small that only the overhead of the call is left."""
        return self.mode.startswith("call")


def ours(op: str, call: Callable[[Callable[..., Any], Inputs], Outputs]) -> tuple[Variant, ...]:
    """Return a variant for each backend of an op of slipstream_kernels, or one that says it is missing."""
    function = getattr(slipstream_kernels, op, None)
    if function is None:
        reason = f"slipstream_kernels has no op {op}"
        return (Variant(name="slipstream", run=dict, obstacle=reason, ours=True),)
    if "backend" not in inspect.signature(function).parameters:
        return (Variant(name="slipstream", run=partial(call, function), ours=True),)
    return tuple(
        Variant(name=backend.value, run=partial(call, partial(function, backend=backend.value)), ours=True)
        for backend in Backend
    )
