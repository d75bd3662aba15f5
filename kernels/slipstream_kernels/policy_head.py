"""Floor 5. The fused reinforcement-learning head: logits, loss and gradients of a chunk before the next.

Normalisers and advantages are known beforehand, so that a chunk's gradient can be taken while its logits are
there: 6 N H V operations instead of the 8 of a backward pass that makes the logits again. An objective
that needs whole sequences scores all rows first, and makes the logits again unless one chunk holds them all.

Dimensions: N packed tokens, M trained rows, C rows of a chunk, A of them with a gradient, H hidden,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from slipstream_kernels import native_policy, reference
from slipstream_kernels.dispatch import Backend
from slipstream_kernels.head import Head
from slipstream_kernels.objective import Objective, PolicyLoss
from slipstream_kernels.policy_loss import merge_metrics

Scored = tuple[Tensor, Tensor, Tensor]
"""Log-probability, entropy and log-sum-exp of some rows."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradients:
    """Room for the gradients of a loss, or None where nobody asks; the bias's begins with zeros."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class PolicyHead:
    """One pass of the head over the trained rows of packed tokens.

    Example: ``loss = PolicyHead(head, hidden_MH, labels_M, gradients).run(inputs, share_M, objective)``.
    """

    def __init__(self, head: Head, hidden_MH: Tensor, labels_M: Tensor, gradients: Gradients) -> None:
        """Prepare to fill `gradients`; that of the hidden states is of these rows alone."""
        self._head, self._hidden_MH, self._labels_M, self._gradients = head, hidden_MH, labels_M, gradients
        self._chunks = head.chunks(hidden_MH.shape[0])
        self._logits = head.logits(hidden_MH.shape[0])

    def run(self, inputs: reference.PolicyInputs, share_M: Tensor, objective: Objective) -> PolicyLoss:
        """Return the loss; logprob_N and entropy_N of `inputs` are set here."""
        if objective.sequence_level:
            return self._after_all(inputs, share_M, objective)
        parts = []
        for chunk in self._chunks:
            scored = self._score(chunk)
            terms = self._terms(_with_scores(_rows(inputs, chunk), scored), share_M[chunk], objective)
            self._differentiate(chunk, scored, terms)
            parts.append(terms)
        return _joined(parts)

    def _after_all(self, inputs: reference.PolicyInputs, share_M: Tensor, objective: Objective) -> PolicyLoss:
        every = [self._score(chunk) for chunk in self._chunks]
        logprob_M, entropy_M, logsumexp_M = (torch.cat(part) for part in zip(*every, strict=True))
        scored = logprob_M, entropy_M, logsumexp_M
        terms = self._terms(_with_scores(inputs, scored), share_M, objective)
        for chunk in self._chunks:
            if len(self._chunks) > 1:
                self._score(chunk)
            self._differentiate(chunk, tuple(part[chunk] for part in scored), _terms_of(terms, chunk))
        return terms

    def _terms(self, inputs: reference.PolicyInputs, share_M: Tensor, objective: Objective) -> PolicyLoss:
        if self._head.backend is Backend.TRITON:
            # Loaded only here: Triton need not be installed.
            from slipstream_kernels.triton import policy_loss as kernels

            return kernels.policy_terms(inputs, share_M.contiguous(), objective)
        return native_policy.policy_terms(inputs, share_M, objective)

    def _score(self, chunk: slice) -> Scored:
        hidden_CH, labels_C = self._hidden_MH[chunk], self._labels_M[chunk]
        temperature = self._head.temperature(chunk)
        return self._head.forward(hidden_CH, labels_C, temperature, self._logits_of(chunk))

    def _logits_of(self, chunk: slice) -> Tensor:
        return self._logits[: chunk.stop - chunk.start]

    def _differentiate(self, chunk: slice, scored: Any, terms: PolicyLoss) -> None:
        """Take the gradients of a chunk whose logits are there; rows without one stay out of the products."""
        to = self._gradients
        if to.hidden is None and to.weight is None and to.bias is None:
            return
        _, entropy_C, logsumexp_C = scored
        grad_logprob_C, grad_entropy_C = terms.grad_logprob_N, terms.grad_entropy_N
        moved = grad_logprob_C != 0
        if grad_entropy_C is not None:
            moved |= grad_entropy_C != 0
        active_A = moved.nonzero()[:, 0]
        grad_AV = self._head.gradient_(
            self._logits_of(chunk),
            self._labels_M[chunk],
            self._head.temperature(chunk),
            active_A=active_A,
            logsumexp_C=logsumexp_C,
            entropy_C=entropy_C,
            grad_logprob_C=grad_logprob_C,
            grad_entropy_C=grad_entropy_C,
        )
        every = active_A.numel() == chunk.stop - chunk.start
        hidden_CH = self._hidden_MH[chunk]
        if to.hidden is not None and every:
            torch.mm(grad_AV, self._head.weight_VH, out=to.hidden[chunk])
        elif to.hidden is not None:
            to.hidden[chunk].zero_().index_copy_(0, active_A, grad_AV @ self._head.weight_VH)
        if to.weight is not None:
            hidden_AH = hidden_CH if every else hidden_CH.index_select(0, active_A)
            self._head.add_to_weight_(to.weight, grad_AV, hidden_AH, first=chunk.start == 0)
        if to.bias is not None:
            to.bias.add_(grad_AV.sum(0))


def trained_rows(inputs: reference.PolicyInputs, rows_M: Tensor) -> reference.PolicyInputs:
    """Return the inputs of the trained rows alone, with segment bounds over them."""
    before = torch.nn.functional.pad((inputs.weight_N > 0).cumsum(0), (1, 0))
    return replace(_rows(inputs, rows_M), cu_seqlens=before[inputs.cu_seqlens])


def _rows(inputs: reference.PolicyInputs, rows: slice | Tensor) -> reference.PolicyInputs:
    chosen = {
        field.name: value[rows]
        for field in fields(inputs)
        if field.name.endswith("_N") and (value := getattr(inputs, field.name)) is not None
    }
    return replace(inputs, **chosen)


def _with_scores(inputs: reference.PolicyInputs, scored: Scored) -> reference.PolicyInputs:
    return replace(inputs, logprob_N=scored[0], entropy_N=scored[1])


def _terms_of(terms: PolicyLoss, chunk: slice) -> PolicyLoss:
    entropy = terms.grad_entropy_N
    return replace(
        terms,
        grad_logprob_N=terms.grad_logprob_N[chunk],
        grad_entropy_N=None if entropy is None else entropy[chunk],
    )


def _joined(parts: list[PolicyLoss]) -> PolicyLoss:
    entropies = [part.grad_entropy_N for part in parts if part.grad_entropy_N is not None]
    return PolicyLoss(
        loss=torch.stack([part.loss for part in parts]).sum(),
        grad_logprob_N=torch.cat([part.grad_logprob_N for part in parts]),
        grad_entropy_N=torch.cat(entropies) if entropies else None,
        metrics=merge_metrics(part.metrics for part in parts),
    )
