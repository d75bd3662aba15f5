"""Shapes at which a scan over tiles of tokens goes wrong first, against a loop over Python's floats.

Dimensions: N packed tokens, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, Final

import torch

from kernels_suite.plan import Case, Exact, Inputs, Outputs, Place, ours
from slipstream_kernels import Backend

DISCOUNT: Final = 0.99
TRACE: Final = 0.95
CAPS: Final = {"rho_cap": 1.2, "trace_cap": 1.02}
FAR: Final = "300 tiles in one segment, undiscounted"
"""What comes last counts at the first token: no tile may be left out of what follows one."""
LAYOUTS: Final[dict[str, tuple[tuple[int, ...], tuple[tuple[int, int], ...]]]] = {
    "a tile of 2048 less one": ((2047,), ()),
    "a tile of 2048": ((2048,), ()),
    "a tile of 2048 and one": ((2049,), ()),
    "a tile of 4096 and one, in two": ((4096, 1), ()),
    "tiles in one segment": ((0, 0, 13_000, 0, 5), ()),
    "a segment each token": ((1,) * 5000, ()),
    FAR: ((600_000, 7), ()),
    # Around borders of tiles, over a whole tile, a whole segment, and up to the end of one.
    "holes over borders": ((4101, 40, 2348, 17), ((2000, 4098), (4101, 4141), (6000, 6489))),
}
"""name -> lengths of the segments, and stretches that are not sampled beside the scattered holes."""
HOLES: Final = 0.3
COLUMNS: Final = {
    "gae": ("values_N", "rewards_N", "mask_N"),
    "vtrace": ("values_N", "rewards_N", "mask_N"),
    "td_lambda": ("values_N", "rewards_N", "mask_N"),
    "discounted_return": ("rewards_N", "mask_N"),
    "segment_scan": ("decay_N", "rewards_N"),
}


def cases(place: Place, op: str) -> Iterator[Case]:
    """Yield each layout, with bootstrap values where the op takes them."""
    for name in LAYOUTS:
        lengths, _ = LAYOUTS[name]
        make_one = partial(_make, place, name)
        yield Case(
            op=op,
            mode="forward",
            shape=name,
            dims={"N": sum(lengths), "S": len(lengths)},
            dtype=torch.float32,
            make=make_one,
            make_small=partial(make_one, 0),
            exact=partial(_exact, op, name),
            # The reference takes a step of PyTorch for each of a segment's tokens.
            variants=tuple(
                variant
                for variant in ours(op, partial(_call, op, name))
                if name != FAR or variant.name != Backend.REFERENCE
            ),
            size_bytes=1.0,
        )


def _make(place: Place, name: str, seed: int) -> Inputs:
    lengths, stretches = LAYOUTS[name]
    tokens, random = sum(lengths), place.random(seed)
    draw = partial(torch.randn, generator=random, device=place.device)
    mask = torch.rand(tokens, generator=random, device=place.device) >= HOLES
    for start, end in stretches:
        mask[start:end] = False
    spread = 0.0 if name == FAR else 0.1
    bounds = torch.tensor([0, *lengths], device=place.device).cumsum(0)
    made = {"values_N": draw(tokens), "rewards_N": draw(tokens), "log_ratio_N": 0.3 * draw(tokens)}
    return made | {
        "mask_N": mask,
        "decay_N": 1.0 - spread * torch.rand(tokens, generator=random, device=place.device),
        "cu_seqlens": bounds,
        "bootstrap_S": draw(len(lengths)),
    }


def _factors(op: str, name: str) -> tuple[float, float]:
    """Return discount and trace."""
    if name == FAR:
        return 1.0, 1.0
    return DISCOUNT, 1.0 if op == "discounted_return" else TRACE


def _call(op: str, name: str, function: Callable[..., Any], inputs: Inputs) -> Outputs:
    options: dict[str, Any] = {}
    discount, trace = _factors(op, name)
    match op:
        case "gae":
            options = {"gae_lambda": trace}
        case "vtrace":
            options = {"gae_lambda": trace, "log_ratio_N": inputs["log_ratio_N"], **CAPS}
        case "td_lambda":
            options = {"trace_lambda": trace}
    if op != "segment_scan":
        options |= {"discount": discount, "bootstrap_S": inputs["bootstrap_S"]}
    out = function(*(inputs[column] for column in COLUMNS[op]), inputs["cu_seqlens"], **options)
    return {"output": out} if isinstance(out, torch.Tensor) else {"advantage": out[0], "target": out[1]}


def _exact(op: str, name: str, inputs: Inputs) -> Exact:
    """Return float64 outputs: V-trace, of which ratios of 1 make GAE, and its targets TD and returns."""
    listed = {column: tensor.double().tolist() for column, tensor in inputs.items()}
    bounds = [int(bound) for bound in listed["cu_seqlens"]]
    if op == "segment_scan":
        return Exact(outputs={"output": torch.tensor(_scan(listed, bounds), dtype=torch.float64)})
    ratios = inputs["log_ratio_N"].double().exp()
    rhos, traces = (
        (ratios.clamp(max=cap) if op == "vtrace" else torch.ones_like(ratios)).tolist()
        for cap in (CAPS["rho_cap"], CAPS["trace_cap"])
    )
    # Over values of 0 the bootstrap enters at the last step alone, as into a return.
    values = [0.0] * len(ratios) if op == "discounted_return" else listed["values_N"]
    discount, trace = _factors(op, name)
    advantages, targets = [0.0] * len(values), [0.0] * len(values)
    for (start, end), bootstrap in zip(pairwise(bounds), listed["bootstrap_S"], strict=True):
        next_value, next_target, carry = bootstrap, bootstrap, 0.0
        for t in range(end - 1, start - 1, -1):
            if listed["mask_N"][t]:
                value, reward = values[t], listed["rewards_N"][t]
                carry = discount * trace * traces[t] * carry
                carry += rhos[t] * (reward + discount * next_value - value)
                gain = rhos[t] * (reward + discount * next_target - value)
                advantages[t] = gain if op == "vtrace" else carry
                next_value, next_target = value, value + carry
                targets[t] = next_target
    made = {"advantage": advantages, "target": targets}
    if op in {"td_lambda", "discounted_return"}:
        made = {"output": targets}
    return Exact(outputs={output: torch.tensor(out, dtype=torch.float64) for output, out in made.items()})


def _scan(listed: dict[str, list[float]], bounds: list[int]) -> list[float]:
    out = [0.0] * len(listed["rewards_N"])
    for start, end in pairwise(bounds):
        carry = 0.0
        for t in range(end - 1, start - 1, -1):
            carry = listed["rewards_N"][t] + listed["decay_N"][t] * carry
            out[t] = carry
    return out
