"""Cases over packed tokens without a head: policy_loss, the scans, group_advantage.

Dimensions: N packed tokens, S segments, G trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

from kernels_suite import eager, edges
from kernels_suite.head_outputs import wide
from kernels_suite.heads import DRIFT
from kernels_suite.plan import Case, Exact, Inputs, Outputs, Place, Scale, Variant, ours
from slipstream_kernels import Objective

DISCOUNT: Final = 0.99
GAE_LAMBDA: Final = 0.95
HOLES: Final = 0.3
"""Share of tokens outside the mask: prompts and tool results."""
SHAPES: Final = {
    Scale.CHECK: (("one token", 1, 1), ("ragged", 4097, 33), ("long", 20001, 4)),
    Scale.SMOKE: (("smoke", 2048, 16),),
    Scale.CPU: (("64k in 256 segments", 65536, 256), ("1M in 1024 segments", 1 << 20, 1024)),
    Scale.GPU: (("1M in 1024 segments", 1 << 20, 1024),),
}
"""name, N, S."""
OBJECTIVE: Final = Objective(clip_low=eager.CLIP, clip_high=eager.CLIP)
TINY: Final = ("tiny", 16, 2)
GROUPS: Final = {Scale.CHECK: 33, Scale.SMOKE: 16, Scale.CPU: 512, Scale.GPU: 8192}
GROUP_SIZE: Final = 8
LONGEST_LOOP: Final = 65536
"""Tokens beyond which a Python loop over tokens is no longer run."""
FACTORS: Final = {"discount": DISCOUNT, "gae_lambda": GAE_LAMBDA}


def policy_loss_cases(place: Place) -> Iterator[Case]:
    """Yield policy_loss with its gradient, and its overhead."""
    for name, tokens, segments in SHAPES[place.scale]:
        yield _policy_case(place, name, tokens, segments, "forward+backward")
    yield _policy_case(place, *TINY, "call")
    yield _policy_case(place, *TINY, "call with gradient")


def gae_cases(place: Place) -> Iterator[Case]:
    """Yield gae without and with observation holes, and its overhead."""
    yield from _edges(place, "gae")
    for name, tokens, segments in SHAPES[place.scale]:
        yield _scan_case(place, "gae", name, tokens, segments, 0.0)
        yield _scan_case(place, "gae", f"{name}, 30 % holes", tokens, segments, HOLES)
    yield _scan_case(place, "gae", *TINY, HOLES)


def vtrace_cases(place: Place) -> Iterator[Case]:
    """Yield vtrace with observation holes."""
    yield from _edges(place, "vtrace")
    for name, tokens, segments in SHAPES[place.scale]:
        yield _scan_case(place, "vtrace", f"{name}, 30 % holes", tokens, segments, HOLES)


def td_lambda_cases(place: Place) -> Iterator[Case]:
    """Yield td_lambda with observation holes."""
    yield from _edges(place, "td_lambda")
    for name, tokens, segments in SHAPES[place.scale]:
        yield _scan_case(place, "td_lambda", f"{name}, 30 % holes", tokens, segments, HOLES)


def discounted_return_cases(place: Place) -> Iterator[Case]:
    """Yield discounted_return with observation holes."""
    yield from _edges(place, "discounted_return")
    for name, tokens, segments in SHAPES[place.scale]:
        yield _scan_case(place, "discounted_return", f"{name}, 30 % holes", tokens, segments, HOLES)


def segment_scan_cases(place: Place) -> Iterator[Case]:
    """Yield the scan that the estimators share."""
    yield from _edges(place, "segment_scan")
    for name, tokens, segments in SHAPES[place.scale]:
        yield _scan_case(place, "segment_scan", name, tokens, segments, 0.0)


def _edges(place: Place, op: str) -> Iterator[Case]:
    if place.scale is Scale.CHECK:
        yield from edges.cases(place, op)


def make(place: Place, tokens: int, segments: int, holes: float, gradient: bool, seed: int) -> Inputs:
    """Return random tokens in segments of uneven lengths."""
    random = place.random(seed)
    draw = partial(torch.randn, tokens, generator=random, device=place.device)
    share = torch.rand(tokens, generator=random, device=place.device)
    cuts = torch.randperm(tokens - 1, generator=random, device=place.device)[: segments - 1] + 1
    ends = cuts.new_tensor([0, tokens])
    if place.scale is Scale.CHECK:
        # Empty segments at both ends.
        ends = ends.repeat(2)
    logprob = -draw().abs()
    return {
        "logprob_N": logprob.requires_grad_(gradient),
        "behavior_N": logprob.detach() - DRIFT * draw(),
        "advantage_N": draw(),
        "weight_N": (share >= holes).float(),
        "values_N": draw(),
        "rewards_N": draw(),
        "mask_N": share >= holes,
        "log_ratio_N": DRIFT * draw(),
        "decay_N": DISCOUNT * GAE_LAMBDA * share.sqrt(),
        "cu_seqlens": torch.cat([ends, cuts]).sort()[0],
    }


def _policy_case(place: Place, name: str, tokens: int, segments: int, mode: str) -> Case:
    gradient, backward = mode != "call", mode == "forward+backward"

    def call(function: Callable[..., Any], inputs: Inputs) -> Outputs:
        result = function(
            inputs["logprob_N"],
            behavior_N=inputs["behavior_N"],
            proximal_N=inputs["behavior_N"],
            advantage_N=inputs["advantage_N"],
            weight_N=inputs["weight_N"],
            cu_seqlens=inputs["cu_seqlens"],
            objective=OBJECTIVE,
        )
        return {"loss": result.loss, "grad_logprob": result.grad_logprob_N}

    def plain(inputs: Inputs) -> Outputs:
        logprob = inputs["logprob_N"]
        loss = eager.clipped_loss(logprob, inputs["behavior_N"], inputs["advantage_N"], inputs["weight_N"])
        grad = torch.autograd.grad(loss, [logprob])[0] if backward else None
        return {"loss": loss} | ({} if grad is None else {"grad_logprob": grad})

    def exact(inputs: Inputs) -> Exact:
        doubled = wide(inputs)
        scale = float((doubled["advantage_N"].abs() * doubled["weight_N"]).mean())
        return Exact(outputs=plain(doubled), scales={"loss": scale})

    return Case(
        op="policy_loss",
        mode=mode,
        shape=name,
        dims={"N": tokens, "S": segments},
        dtype=torch.float32,
        make=partial(make, place, tokens, segments, HOLES, gradient),
        make_small=partial(make, place, tokens, segments, HOLES, gradient, 0),
        exact=exact,
        variants=(
            Variant(name="eager", run=plain, lacks="metrics, truncation, trust region"),
            *ours("policy_loss", call),
        ),
        # Read: log-probability, behavior, advantage, weight; written: the gradient.
        size_bytes=20.0 * tokens,
    )


def _scan_case(place: Place, op: str, name: str, tokens: int, segments: int, holes: float) -> Case:
    columns, options, loop = _estimator(op)

    def call(function: Callable[..., Any], inputs: Inputs) -> Outputs:
        given = {"log_ratio_N": inputs["log_ratio_N"]} if op == "vtrace" else {}
        out = function(*(inputs[column] for column in columns), inputs["cu_seqlens"], **options, **given)
        return _named(out)

    def plain(inputs: Inputs) -> Outputs:
        return call(loop, inputs)

    make_one = partial(make, place, tokens, segments, holes, False)
    peers: tuple[Variant, ...] = ()
    if op == "gae" and name != TINY[0]:
        peers = _gae_peers(
            tokens, holes, partial(call, eager.token_loop_gae), partial(call, eager.float_loop_gae)
        )
    return Case(
        op=op,
        mode="call" if name == TINY[0] else "forward",
        shape=name,
        dims={"N": tokens, "S": segments, "holes": holes},
        dtype=torch.float32,
        make=make_one,
        make_small=partial(make_one, 0),
        exact=lambda inputs: Exact(outputs=plain(wide(inputs))),
        variants=(
            Variant(name="eager", run=plain, lacks="a loop over time, segments side by side, padded"),
            *ours(op, call),
            *peers,
        ),
        size_bytes=tokens * (4.0 * (len(columns) + (2 if op in {"gae", "vtrace"} else 1)) - _mask_saving(op)),
    )


def _estimator(op: str) -> tuple[tuple[str, ...], dict[str, float], Callable[..., Any]]:
    match op:
        case "gae":
            return ("values_N", "rewards_N", "mask_N"), FACTORS, eager.vtrace_loop
        case "vtrace":
            return ("values_N", "rewards_N", "mask_N"), FACTORS, eager.vtrace_loop
        case "td_lambda":
            factors = {"discount": DISCOUNT, "trace_lambda": GAE_LAMBDA}
            return ("values_N", "rewards_N", "mask_N"), factors, eager.td_lambda_loop
        case "discounted_return":
            return ("rewards_N", "mask_N"), {"discount": DISCOUNT}, eager.return_loop
        case _:
            return ("decay_N", "rewards_N"), {}, eager.affine_loop


def _mask_saving(op: str) -> float:
    """Return the bytes by which a mask is smaller than a float, less those of a further column."""
    return {"gae": 3.0, "vtrace": -1.0, "td_lambda": 3.0, "discounted_return": 3.0}.get(op, 0.0)


def _named(out: Tensor | tuple[Tensor, Tensor]) -> Outputs:
    return {"output": out} if isinstance(out, Tensor) else {"advantage": out[0], "target": out[1]}


def _gae_peers(tokens: int, holes: float, on_tensors: Any, on_floats: Any) -> tuple[Variant, ...]:
    long = f"not run beyond {LONGEST_LOOP} tokens" if tokens > LONGEST_LOOP else ""
    missing = "" if find_spec("torchrl") else "torchrl is not installed (pip install torchrl)"
    unable = "it knows no tokens to be skipped" if holes else ""
    return (
        Variant(name="loop over tokens, tensors", run=on_tensors, obstacle=long),
        Variant(name="loop over tokens, floats", run=on_floats, obstacle=long),
        Variant(
            name="torchrl vectorised",
            run=_torchrl,
            lacks="observation holes; it takes padded segments, padding and packing are timed with it",
            obstacle=missing or unable,
        ),
    )


def _torchrl(inputs: Inputs) -> Outputs:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    bounds = inputs["cu_seqlens"]
    value = eager.padded(inputs["values_N"], bounds).T[..., None]
    reward = eager.padded(inputs["rewards_N"], bounds).T[..., None]
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    last = bounds.diff()[:, None] - 1
    done = torch.zeros_like(value, dtype=torch.bool)
    done[:, :, 0].scatter_(1, last, True)
    done[:, -1] = True
    advantage, target = vec_generalized_advantage_estimate(
        DISCOUNT, GAE_LAMBDA, value, following, reward, done, done
    )
    return {name: eager.packed(out[..., 0].T, bounds) for name, out in
            (("advantage", advantage), ("target", target))}  # fmt: skip


def group_advantage_cases(place: Place) -> Iterator[Case]:
    """Yield group_advantage in GRPO's form."""
    groups = GROUPS[place.scale]

    def make_groups(seed: int) -> Inputs:
        random = place.random(seed)
        rewards = torch.randn(groups * GROUP_SIZE, generator=random, device=place.device)
        ids = torch.arange(groups, device=place.device).repeat_interleave(GROUP_SIZE)
        return {"rewards_G": rewards, "group_ids": ids}

    def call(function: Callable[..., Any], inputs: Inputs) -> Outputs:
        return {"advantage": function(inputs["rewards_G"], inputs["group_ids"], kind="std")}

    def plain(inputs: Inputs) -> Outputs:
        return {"advantage": eager.group_loop(inputs["rewards_G"], inputs["group_ids"])}

    count = groups * GROUP_SIZE
    yield Case(
        op="group_advantage",
        mode="forward",
        shape=f"{count} in groups of {GROUP_SIZE}",
        dims={"G": count, "groups": groups},
        dtype=torch.float32,
        make=make_groups,
        make_small=partial(make_groups, 0),
        exact=lambda inputs: Exact(outputs=plain(wide(inputs))),
        variants=(
            Variant(name="eager", run=plain, lacks="a loop over groups"),
            *ours("group_advantage", call),
        ),
        size_bytes=16.0 * count,
    )
