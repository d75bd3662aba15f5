"""What the head's cases return, from log-probabilities that any variant computed.

Dimensions: N packed tokens, M trained ones, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels_suite import eager
from kernels_suite.plan import Inputs, Outputs


def gradients(loss: Tensor, inputs: Inputs) -> Outputs:
    """Return the gradients of `loss` for hidden states and weights."""
    hidden, weight = torch.autograd.grad(loss, [inputs["hidden_NH"], inputs["weight_VH"]])
    return {"grad_hidden": hidden, "grad_weight": weight}


def wide(inputs: Inputs) -> Inputs:
    """Return the inputs in float64, gradients required as before."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def scored(logprob_N: Tensor, entropy_N: Tensor | None, inputs: Inputs, backward: bool) -> Outputs:
    """Return log-probability, entropy, and on wish gradients under a non-uniform upstream gradient."""
    out: Outputs = {"logprob": logprob_N}
    if entropy_N is not None:
        out["entropy"] = entropy_N
    if backward:
        out |= gradients((logprob_N * inputs["upstream_N"]).sum(), inputs)
    return out


def masked_policy(score: Callable[..., Any], backward: bool, inputs: Inputs) -> Outputs:
    """Return the clipped loss over all rows, those not trained weighing 0."""
    logprob, entropy = score(inputs["hidden_NH"], inputs["weight_VH"], inputs["labels_N"])
    return finished_policy(logprob, entropy, inputs, inputs, backward)


def chosen_policy(score: Callable[..., Any], backward: bool, inputs: Inputs) -> Outputs:
    """Return the clipped loss, the head computed over the trained rows only."""
    rows = inputs["trained_M"]
    kept = {name: value[rows] for name, value in inputs.items() if name.endswith(("_N", "_NH"))}
    logprob, entropy = score(kept["hidden_NH"], inputs["weight_VH"], kept["labels_N"])
    return finished_policy(logprob, entropy, kept, inputs, backward)


def finished_policy(
    logprob: Tensor, entropy: Tensor | None, kept: Inputs, inputs: Inputs, backward: bool
) -> Outputs:
    """Return loss, mean entropy and gradients from log-probabilities."""
    weight = kept["weight_N"]
    loss = eager.clipped_loss(logprob, kept["behavior_N"], kept["advantage_N"], weight)
    out: Outputs = {"loss": loss}
    if entropy is not None:
        out["entropy_mean"] = (entropy * weight).sum() / weight.sum()
    return out | (gradients(loss, inputs) if backward else {})
