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
from slipstream_kernels.objective import Objective
from slipstream_kernels.policy_inputs import own_shares
from slipstream_kernels.policy_result import PolicyLoss, merge_metrics

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
        self._several = len(self._chunks) > 1
        self._logits: Tensor | None = None
        self._entropy_matters = False

    def run(self, inputs: reference.PolicyInputs, share_M: Tensor, objective: Objective) -> PolicyLoss:
        """Return the loss of the M rows, its [M] gradients to their scores, and metrics; fill the gradients.

        inputs: of these rows alone, [M] each; logprob_N and entropy_N are set here. share_M: [M] of
        trained_shares. Raises NativeError.
        """
        self._entropy_matters = objective.entropy_coefficient > 0
        if objective.sequence_level:
            return self._after_all(inputs, share_M, objective)
        parts = []
        for chunk in self._chunks:
            scored = self._score(chunk)
            terms, active_A = self._terms(
                _with_scores(_rows(inputs, chunk) if self._several else inputs, scored),
                share_M[chunk],
                objective,
            )
            self._differentiate(chunk, scored, terms, active_A)
            parts.append(terms)
        return _joined(parts) if self._several else parts[0]

    def _after_all(self, inputs: reference.PolicyInputs, share_M: Tensor, objective: Objective) -> PolicyLoss:
        if self._several:
            scored = self._head.scores(self._hidden_MH, self._labels_M)
        else:
            scored = self._score(self._chunks[0])
        terms, active_B = self._terms(_with_scores(inputs, scored), share_M, objective)
        for chunk in self._chunks:
            if self._several:
                self._score(chunk)
            active_A = active_B[(active_B >= chunk.start) & (active_B < chunk.stop)] - chunk.start
            part = tuple(values[chunk] for values in scored)
            self._differentiate(chunk, part, _terms_of(terms, chunk), active_A)
        return terms

    def _terms(
        self, inputs: reference.PolicyInputs, share_M: Tensor, objective: Objective
    ) -> tuple[PolicyLoss, Tensor]:
        """Return loss, gradients and metrics of rows, and the places of those with a gradient."""
        if not self._head.is_native:
            # Loaded only here: Triton need not be installed.
            from slipstream_kernels.triton import policy_loss as kernels

            terms = kernels.policy_terms(inputs, share_M.contiguous(), objective)
            moved = terms.grad_logprob_N != 0
            if terms.grad_entropy_N is not None:
                moved |= terms.grad_entropy_N != 0
            return terms, moved.nonzero()[:, 0]
        return native_policy.policy_terms(inputs, share_M, objective)

    def _score(self, chunk: slice) -> Scored:
        hidden_CH, labels_C = self._hidden_MH[chunk], self._labels_M[chunk]
        temperature = self._head.temperature(chunk)
        return self._head.forward(hidden_CH, labels_C, temperature, self._logits_of(chunk))

    def _logits_of(self, chunk: slice) -> Tensor:
        if self._logits is None:
            self._logits = self._head.logits(self._chunks[0].stop)
        return self._logits[: chunk.stop - chunk.start]

    def _differentiate(self, chunk: slice, scored: Any, terms: PolicyLoss, active_A: Tensor) -> None:
        """Take the gradients of a chunk whose logits are there; rows without one stay out of the products."""
        to = self._gradients
        if to.hidden is None and to.weight is None and to.bias is None:
            return
        _, entropy_C, logsumexp_C = scored
        grad_AV = self._head.gradient_(
            self._logits_of(chunk),
            self._labels_M[chunk],
            self._head.temperature(chunk),
            active_A=active_A,
            logsumexp_C=logsumexp_C,
            entropy_C=entropy_C,
            grad_logprob_C=terms.grad_logprob_N,
            grad_entropy_C=terms.grad_entropy_N if self._entropy_matters else None,
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


def trained_shares(
    inputs: reference.PolicyInputs, objective: Objective, normalizer: Tensor | None, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [N] shares of the loss, [M] places of the trained tokens and [S + 1] bounds over these."""
    if backend is Backend.NATIVE:
        return native_policy.token_shares(inputs.weight_N, inputs.cu_seqlens, objective, normalizer)
    live = inputs.weight_N > 0
    before = torch.nn.functional.pad(live.cumsum(0), (1, 0))
    share_N = own_shares(inputs, objective, normalizer)
    return share_N, live.nonzero()[:, 0], before[inputs.cu_seqlens]


def trained_rows(
    inputs: reference.PolicyInputs, rows_M: Tensor, cu_seqlens: Tensor
) -> reference.PolicyInputs:
    """Return the inputs of the trained tokens alone, whose segments these bounds are."""
    return replace(_rows(inputs, rows_M), cu_seqlens=cu_seqlens)


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
