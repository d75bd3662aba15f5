"""Cases of the linear head: linear_logprob, linear_policy_loss, linear_kl.

Dimensions: N packed tokens, M trained ones, H hidden, V vocabulary, S segments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from kernels_suite import eager, head_peers
from kernels_suite.head_outputs import chosen_policy, gradients, masked_policy, scored, wide
from kernels_suite.plan import Case, Exact, Inputs, Outputs, Place, Product, Scale, Variant, ours
from slipstream_kernels import Objective, finish_metrics

SPREAD: Final = 3.0
"""Standard deviation of the logits."""
DRIFT: Final = 0.1
"""Standard deviation of current minus behavior log-probability: some tokens are clipped."""
SEGMENT: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A shape of the head."""

    name: str
    rows: int
    hidden: int
    vocabulary: int
    trained: tuple[float, ...] = (1.0, 0.5, 0.3, 0.1)
    """Shares of the rows that are trained."""


QUICKSTART: Final = Head(name="quickstart", rows=4096, hidden=96, vocabulary=480)
"""Recipe research: packed to batch.token_budget, 30 % of the tokens sampled by the policy."""
SHAPES: Final = {
    Scale.CHECK: (
        Head(name="one row", rows=1, hidden=64, vocabulary=1024, trained=(1.0,)),
        Head(name="ragged", rows=129, hidden=136, vocabulary=1025, trained=(1.0, 0.3)),
        Head(name="wide", rows=256, hidden=4096, vocabulary=32000, trained=(0.5,)),
    ),
    Scale.SMOKE: (Head(name="smoke", rows=192, hidden=32, vocabulary=257, trained=(0.5,)),),
    Scale.CPU: (QUICKSTART, Head(name="4k×1k×32k", rows=4096, hidden=1024, vocabulary=32768)),
    Scale.GPU: (
        Head(name="Qwen", rows=32768, hidden=4096, vocabulary=151936),
        Head(name="Llama", rows=8192, hidden=4096, vocabulary=128256, trained=(1.0,)),
        Head(name="Gemma", rows=8192, hidden=3840, vocabulary=262144, trained=(1.0,)),
    ),
}
LARGE_ON_CPU: Final = (
    Head(name="Qwen", rows=512, hidden=1024, vocabulary=151936, trained=(0.5,)),
    Head(name="Llama", rows=512, hidden=1024, vocabulary=128256, trained=(0.5,)),
    Head(name="Gemma", rows=512, hidden=1024, vocabulary=262144, trained=(0.5,)),
)
OBJECTIVE: Final = Objective(clip_low=eager.CLIP, clip_high=eager.CLIP)
TINY: Final = Head(name="tiny", rows=4, hidden=8, vocabulary=16, trained=(1.0,))
SMALL_ROWS: Final = 256
"""Rows of the comparison with float64."""


def shapes(place: Place) -> tuple[Head, ...]:
    """Return the shapes of a place; those of a GPU have fewer rows on a CPU."""
    if place.scale is Scale.GPU and place.device == "cpu":
        return SHAPES[Scale.CPU] + LARGE_ON_CPU
    return SHAPES[place.scale]


def logprob_cases(place: Place) -> Iterator[Case]:
    """Yield linear_logprob, forward and with backward, and its overhead."""
    for head in shapes(place):
        yield _logprob_case(place, head, "forward")
        yield _logprob_case(place, head, "forward+backward")
    yield _logprob_case(place, TINY, "call")
    yield _logprob_case(place, TINY, "call with gradient")


def policy_cases(place: Place) -> Iterator[Case]:
    """Yield linear_policy_loss with backward at each share of trained rows, and its overhead."""
    for head in shapes(place):
        for share in head.trained:
            yield _policy_case(place, head, share, "forward+backward")
    yield _policy_case(place, TINY, 1.0, "call with gradient")


def kl_cases(place: Place) -> Iterator[Case]:
    """Yield linear_kl, forward and with backward."""
    for head in shapes(place):
        yield _kl_case(place, head, "forward")
        yield _kl_case(place, head, "forward+backward")


def make(place: Place, head: Head, share: float, rows: int, gradient: bool, seed: int) -> Inputs:
    """Return random hidden states, weights, labels, and what a policy loss reads beside them."""
    random = place.random(seed)
    draw = partial(torch.randn, generator=random, device=place.device)
    hidden = draw(rows, head.hidden).to(place.dtype)
    weight = (draw(head.vocabulary, head.hidden) * (SPREAD * head.hidden**-0.5)).to(place.dtype)
    labels = torch.randint(head.vocabulary, (rows,), generator=random, device=place.device)
    trained = max(1, round(rows * share))
    order = torch.randperm(rows, generator=random, device=place.device)
    mask = torch.zeros(rows, device=place.device).index_fill_(0, order[:trained], 1.0)
    bounds = torch.tensor([*range(0, rows, SEGMENT), rows], device=place.device)
    logprob = eager.selected_logprob(hidden, weight, labels)
    return {
        "hidden_NH": hidden.requires_grad_(gradient),
        "weight_VH": weight.requires_grad_(gradient),
        "labels_N": labels,
        "behavior_N": logprob - DRIFT * draw(rows),
        "advantage_N": draw(rows),
        "weight_N": mask,
        "trained_M": mask.nonzero()[:, 0],
        "cu_seqlens": bounds,
        "upstream_N": draw(rows),
    }


def _logprob_case(place: Place, head: Head, mode: str) -> Case:
    backward, gradient = "backward" in mode, mode in {"forward+backward", "call with gradient"}

    def call(function: Callable[..., Any], inputs: Inputs) -> Outputs:
        logprob, entropy, *_ = function(inputs["hidden_NH"], inputs["weight_VH"], inputs["labels_N"])
        return scored(logprob, entropy, inputs, backward)

    def plain(inputs: Inputs) -> Outputs:
        return call(eager.logprob_entropy, inputs)

    own = Variant(name="eager", run=plain)
    peers = () if mode.startswith("call") else head_peers.logprob_peers(place, backward)
    return Case(
        op="linear_logprob",
        mode=mode,
        shape=head.name,
        dims=_dims(head),
        dtype=place.dtype,
        make=partial(make, place, head, 1.0, head.rows, gradient),
        make_small=partial(make, place, head, 1.0, min(head.rows, SMALL_ROWS), gradient, 0),
        exact=partial(_exact, plain),
        variants=(own, *ours("linear_logprob", call), *peers),
        products=partial(_products, head, backward),
        rows=head.rows,
    )


def _policy_case(place: Place, head: Head, share: float, mode: str) -> Case:
    backward = "backward" in mode

    def call(function: Callable[..., Any], inputs: Inputs) -> Outputs:
        result = function(
            inputs["hidden_NH"],
            inputs["weight_VH"],
            inputs["labels_N"],
            behavior_N=inputs["behavior_N"],
            proximal_N=inputs["behavior_N"],
            advantage_N=inputs["advantage_N"],
            weight_N=inputs["weight_N"],
            cu_seqlens=inputs["cu_seqlens"],
            objective=OBJECTIVE,
        )
        out = {"loss": result.loss, "entropy_mean": lambda: finish_metrics(result.metrics)["entropy"]}
        return out | (gradients(result.loss, inputs) if backward else {})

    truth = partial(masked_policy, eager.logprob_entropy, backward)
    peers = () if mode.startswith("call") else head_peers.policy_peers(place, backward)
    chosen = Variant(name="eager, trained rows", run=partial(chosen_policy, eager.logprob_entropy, backward))
    return Case(
        op="linear_policy_loss",
        mode=mode,
        shape=head.name if mode.startswith("call") else f"{head.name} {share:.0%} trained",
        dims={**_dims(head), "trained": share},
        dtype=place.dtype,
        make=partial(make, place, head, share, head.rows, True),
        make_small=partial(make, place, head, share, min(head.rows, SMALL_ROWS), True, 0),
        exact=partial(_exact, truth),
        variants=(
            Variant(name="eager", run=truth, lacks="metrics other than the mean entropy"),
            *((chosen,) if share < 1.0 else ()),
            *ours("linear_policy_loss", call),
            *peers,
        ),
        products=partial(_products, head, backward),
        rows=max(1, round(head.rows * share)),
    )


def _kl_case(place: Place, head: Head, mode: str) -> Case:
    backward = "backward" in mode

    def build(rows: int, seed: int) -> Inputs:
        made = make(place, head, 1.0, rows, backward, seed)
        other = place.random(seed + 1000)
        hidden, weight = made["hidden_NH"].detach(), made["weight_VH"].detach()
        near = 0.1 * torch.randn(hidden.shape, generator=other, device=place.device)
        made["hidden_q_NH"] = hidden + near.to(hidden.dtype)
        made["weight_q_VH"] = weight.clone()
        return made

    def finish(kl_N: Tensor, entropy_N: Tensor, inputs: Inputs) -> Outputs:
        out: Outputs = {"kl": kl_N, "entropy": entropy_N}
        return out | (gradients((kl_N * inputs["upstream_N"]).sum(), inputs) if backward else {})

    def call(function: Callable[..., Any], inputs: Inputs) -> Outputs:
        heads = (inputs[name] for name in ("hidden_NH", "weight_VH", "hidden_q_NH", "weight_q_VH"))
        kl, *_, entropy = _with_labels(function, inputs)(*heads, direction="reverse")
        return finish(kl, entropy, inputs)

    def plain(inputs: Inputs) -> Outputs:
        heads = (inputs[name] for name in ("hidden_NH", "weight_VH", "hidden_q_NH", "weight_q_VH"))
        return finish(*eager.head_kl(*heads), inputs)

    return Case(
        op="linear_kl",
        mode=mode,
        shape=head.name,
        dims=_dims(head),
        dtype=place.dtype,
        make=partial(build, head.rows),
        make_small=partial(build, min(head.rows, SMALL_ROWS), 0),
        exact=partial(_exact, plain),
        variants=(Variant(name="eager", run=plain), *ours("linear_kl", call)),
        products=lambda rows: _products(head, backward, rows) + _products(head, False, rows),
        rows=head.rows,
    )


def _with_labels(function: Callable[..., Any], inputs: Inputs) -> Callable[..., Any]:
    wanted = "labels_N" in inspect.signature(function).parameters
    return partial(function, labels_N=inputs["labels_N"]) if wanted else function


def _exact(run: Callable[[Inputs], Outputs], inputs: Inputs) -> Exact:
    """Return what `run` gives in float64; per-row statistics err relative to the greatest logit."""
    doubled = wide(inputs)
    with torch.no_grad():
        peak = float((doubled["hidden_NH"] @ doubled["weight_VH"].T).abs().max())
    scales = dict.fromkeys(("logprob", "entropy", "entropy_mean", "kl"), peak)
    # The loss is a mean of both signs: its own size says nothing about its terms.
    scales["loss"] = float((doubled["advantage_N"].abs() * doubled["weight_N"]).mean())
    return Exact(outputs=run(doubled), scales=scales)


def _dims(head: Head) -> dict[str, float]:
    return {"N": head.rows, "H": head.hidden, "V": head.vocabulary}


def _products(head: Head, backward: bool, rows: int) -> tuple[Product, ...]:
    forward = (rows, head.hidden, head.vocabulary)
    hidden = (rows, head.vocabulary, head.hidden)
    weight = (head.vocabulary, rows, head.hidden)
    return (forward, hidden, weight) if backward else (forward,)
