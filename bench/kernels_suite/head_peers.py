"""Peers of the linear head, as installed; each says what it leaves out.

Dimensions: N packed tokens, M trained ones, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels_suite import head_outputs
from kernels_suite.plan import Inputs, Outputs, Place, Scale, Variant

NO_ENTROPY = "no entropy"
Score = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, None]]


def logprob_peers(place: Place, backward: bool) -> tuple[Variant, ...]:
    """Return peers that give each label's log-probability, and those that give their mean only."""

    def scored(score: Score, inputs: Inputs) -> Outputs:
        logprob, entropy = score(inputs["hidden_NH"], inputs["weight_VH"], inputs["labels_N"])
        return head_outputs.scored(logprob, entropy, inputs, backward)

    return (
        *(
            Variant(name=name, run=partial(scored, score), lacks=NO_ENTROPY, obstacle=obstacle)
            for name, score, obstacle in _scores(place)
        ),
        *_mean_peers(place, backward, chosen=False),
    )


def policy_peers(place: Place, backward: bool) -> tuple[Variant, ...]:
    """Return the same with the eager loss behind them, over the trained rows, and whole heads."""
    lacks = f"{NO_ENTROPY}, no metrics; the loss around it is eager code"
    return (
        *(
            Variant(
                name=name,
                run=partial(head_outputs.chosen_policy, score, backward),
                lacks=lacks,
                obstacle=obstacle,
            )
            for name, score, obstacle in _scores(place)
        ),
        _liger_grpo(backward),
        *_mean_peers(place, backward, chosen=True),
    )


def _scores(place: Place) -> list[tuple[str, Score, str]]:
    torch_obstacle = (
        ""
        if hasattr(functional, "linear_cross_entropy")
        else f"torch {torch.__version__} lacks it; 2.13 has it"
    )
    return [
        ("F.linear_cross_entropy", _torch_score, torch_obstacle),
        ("cut-cross-entropy", _cut_score, _cut_obstacle(place)),
    ]


def _torch_score(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> tuple[Tensor, None]:
    options = torch.nn.LinearCrossEntropyOptions()
    nll = functional.linear_cross_entropy(hidden_NH, weight_VH, labels_N, reduction="none", options=options)
    return -nll.float() if nll.dtype is torch.bfloat16 else -nll, None


def _cut_score(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> tuple[Tensor, None]:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if hidden_NH.is_cuda else "torch_compile"
    return -linear_cross_entropy(hidden_NH, weight_VH, labels_N, reduction="none", impl=impl).float(), None


def _cut_obstacle(place: Place) -> str:
    if place.device == "cpu" and place.scale is Scale.SMOKE:
        return "not in a smoke: on a CPU it is its torch.compile form, which compiles for half a minute"
    return _missing("cut_cross_entropy", "cut-cross-entropy")


def _missing(module: str, package: str) -> str:
    return "" if find_spec(module) else f"{package} is not installed (pip install {package})"


def _liger_grpo(backward: bool) -> Variant:
    def run(inputs: Inputs) -> Outputs:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        # One token each: its rows are sequences of a batch.
        rows = inputs["trained_M"]
        head = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo", chunk_size=_liger_chunk(rows)
        )
        loss, *_ = head(
            inputs["hidden_NH"][rows][:, None],
            inputs["weight_VH"],
            inputs["labels_N"][rows][:, None],
            torch.ones_like(rows)[:, None],
            inputs["advantage_N"][rows],
            old_per_token_logps=inputs["behavior_N"][rows][:, None],
        )
        return {"loss": loss} | (head_outputs.gradients(loss, inputs) if backward else {})

    return Variant(
        name="liger chunked GRPO",
        run=run,
        lacks=f"{NO_ENTROPY}, two metrics; one advantage a sequence, so each token is a sequence here",
        obstacle=_missing("liger_kernel", "liger-kernel"),
    )


def _liger_chunk(rows_M: Tensor) -> int:
    return min(rows_M.numel(), 1024)


def _mean_peers(place: Place, backward: bool, *, chosen: bool) -> tuple[Variant, ...]:
    """Return peers whose only output is a mean over tokens: the cost of the products, not the work of RL."""
    lacks = "cross-entropy with one weight for all tokens: no log-probabilities, no entropy, no policy loss"
    on_cpu = "it has no CPU form" if place.device == "cpu" else ""

    def run(mean: Callable[..., Tensor], inputs: Inputs) -> Outputs:
        hidden, labels = inputs["hidden_NH"], inputs["labels_N"]
        if chosen:
            hidden, labels = hidden[inputs["trained_M"]], labels[inputs["trained_M"]]
        loss = mean(hidden, inputs["weight_VH"], labels)
        unread = head_outputs.gradients(loss, inputs) if backward else {}
        return {f"unread_{name}": value for name, value in unread.items()} | {"unread_mean": loss}

    peers = (
        ("liger FLCE", _liger_mean, _missing("liger_kernel", "liger-kernel") or on_cpu),
        ("quack", _quack_mean, _missing("quack", "quack-kernels") or on_cpu),
    )
    return tuple(
        Variant(name=name, run=partial(run, mean), lacks=lacks, obstacle=obstacle)
        for name, mean, obstacle in peers
    )


def _liger_mean(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    result: Any = LigerFusedLinearCrossEntropyFunction.apply(hidden_NH, weight_VH, labels_N)
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    return loss


def _quack_mean(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss: Tensor = chunked_linear_cross_entropy(hidden_NH, weight_VH, labels_N, reduction="mean")
    return loss
