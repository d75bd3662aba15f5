"""Cases of the weight codecs: checksum64, delta_encode, delta_apply, fp8_quantize.

Dimensions: V rows, H columns of a weight.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

import slipstream_kernels
from kernels_suite import eager
from kernels_suite.plan import Case, Exact, Inputs, Outputs, Place, Scale, Variant, ours

SIDE: Final = {Scale.CHECK: 384, Scale.SMOKE: 512, Scale.CPU: 4096, Scale.GPU: 16384}
"""Rows and columns of the weight."""
CHANGED: Final = 0.02
"""Share of weights that an optimizer's step changes in bfloat16."""
PAIRS: Final = "index and value pairs of 6 bytes; no versions, no checksums"


def checksum64_cases(place: Place) -> Iterator[Case]:
    """Yield checksum64."""

    def call(function: Callable[..., Any], inputs: Inputs) -> Outputs:
        return {"checksum": function(inputs["new"])}

    def crc(inputs: Inputs) -> Outputs:
        data = inputs["new"].view(torch.uint8).cpu().numpy()
        return {"unread_crc": zlib.crc32(data)}

    def exact(inputs: Inputs) -> Exact:
        truth = slipstream_kernels.checksum64(inputs["new"].cpu(), backend="reference")
        return Exact(outputs={"checksum": truth})

    peer = Variant(name="zlib.crc32", run=crc, lacks="another checksum, of 32 bits")
    variants = (*ours("checksum64", call), peer)
    yield _case(place, "checksum64", variants, exact, eager_name="reference", bytes_each=2.0)


def delta_encode_cases(place: Place) -> Iterator[Case]:
    """Yield delta_encode at 2 % changed values."""

    def call(function: Callable[..., Any], inputs: Inputs) -> Outputs:
        delta = function(inputs["old"], inputs["new"])
        old = inputs["old"]
        return {
            "restored": lambda: slipstream_kernels.delta_apply(old, delta),
            "fact_times_smaller": lambda: old.nbytes / len(delta.to_bytes()),
        }

    def plain(inputs: Inputs) -> Outputs:
        positions, values = eager.changed_pairs(inputs["old"], inputs["new"])
        old = inputs["old"]
        return {
            "restored": lambda: eager.apply_pairs(old, positions, values),
            "fact_times_smaller": lambda: old.nbytes / (positions.nbytes + values.nbytes),
        }

    variants = (Variant(name="eager", run=plain, lacks=PAIRS), *ours("delta_encode", call))
    yield _case(place, "delta_encode", variants, _restored, bytes_each=4.0 + 2.0 / 25)


def delta_apply_cases(place: Place) -> Iterator[Case]:
    """Yield delta_apply at 2 % changed values."""
    encode = getattr(slipstream_kernels, "delta_encode", None)

    def call(function: Callable[..., Any], inputs: Inputs) -> Outputs:
        return {"restored": function(inputs["old"], inputs["delta"])}

    def plain(inputs: Inputs) -> Outputs:
        return {"restored": eager.apply_pairs(inputs["old"], *inputs["pairs"])}

    def prepare(inputs: Inputs) -> Inputs:
        old, new = inputs["old"], inputs["new"]
        delta = None if encode is None else encode(old, new)
        return inputs | {"pairs": eager.changed_pairs(old, new), "delta": delta}

    variants = (Variant(name="eager", run=plain, lacks=PAIRS), *ours("delta_apply", call))
    yield _case(place, "delta_apply", variants, _restored, bytes_each=4.0 + 2.0 / 25, prepare=prepare)


def fp8_quantize_cases(place: Place) -> Iterator[Case]:
    """Yield fp8_quantize in blocks of 128 × 128."""

    def call(function: Callable[..., Any], inputs: Inputs) -> Outputs:
        quantized = function(inputs["new"])
        return {"weight": lambda: dequantized(quantized)}

    def plain(inputs: Inputs) -> Outputs:
        values, scale = eager.fp8_blocks(inputs["new"])
        return {"weight": lambda: _spread(values, scale)}

    def exact(inputs: Inputs) -> Exact:
        return Exact(outputs={"weight": inputs["new"].double()})

    variants = (
        Variant(name="eager", run=plain, lacks="no checksum"),
        *ours("fp8_quantize", call),
    )
    yield _case(place, "fp8_quantize", variants, exact, bytes_each=3.0)


def dequantized(quantized: Any) -> Tensor:
    """Return the weight of an fp8_quantize result: float8 values and float32 scales among its members."""
    members = quantized if isinstance(quantized, tuple | list) else [
        getattr(quantized, name) for name in dir(quantized) if not name.startswith("_")
    ]  # fmt: skip
    tensors = [member for member in members if isinstance(member, Tensor)]
    values = next(tensor for tensor in tensors if tensor.element_size() == 1)
    scale = next(tensor for tensor in tensors if tensor.dtype is torch.float32 and tensor.ndim == 2)
    return _spread(values.view(torch.float8_e4m3fn), scale)


def _spread(values_VH: Tensor, scale: Tensor) -> Tensor:
    block = values_VH.shape[0] // scale.shape[0], values_VH.shape[1] // scale.shape[1]
    whole = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return values_VH.float().double() * whole.double()


def _restored(inputs: Inputs) -> Exact:
    return Exact(outputs={"restored": inputs["new"]})


def _make(place: Place, prepare: Callable[[Inputs], Inputs], side: int, seed: int) -> Inputs:
    random = place.random(seed)
    old = torch.randn(side, side, generator=random, device=place.device).to(torch.bfloat16)
    touched = torch.rand(side, side, generator=random, device=place.device) < CHANGED
    # Another bit pattern for certain: the last bit flips.
    words = old.view(torch.int16)
    new = torch.where(touched, words ^ 1, words).view(torch.bfloat16)
    return prepare({"old": old, "new": new})


def _case(
    place: Place,
    op: str,
    variants: tuple[Variant, ...],
    exact: Callable[[Inputs], Exact],
    *,
    bytes_each: float,
    eager_name: str = "eager",
    prepare: Callable[[Inputs], Inputs] = dict,
) -> Case:
    side = SIDE[place.scale]
    return Case(
        op=op,
        mode="forward",
        shape=f"{side}×{side} bfloat16",
        dims={"V": side, "H": side},
        dtype=torch.bfloat16,
        make=partial(_make, place, prepare, side),
        make_small=partial(_make, place, prepare, min(side, 1024), 0),
        exact=exact,
        variants=variants,
        eager=eager_name,
        size_bytes=bytes_each * side * side,
    )
