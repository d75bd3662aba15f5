"""Floor 6. The whole RL head: hidden states to policy loss, only over rows that are trained.

Dimensions: N packed tokens, M of them with positive weight, H hidden, V vocabulary, S segments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream_kernels import reference
from slipstream_kernels.checks import check_cu_seqlens, check_labels
from slipstream_kernels.dispatch import Backend
from slipstream_kernels.errors import KernelError, NativeError
from slipstream_kernels.head import Head
from slipstream_kernels.library import recorded, register
from slipstream_kernels.linear_logprob import (
    HEAD_SCHEMA,
    check_head,
    choose_head,
    linear_logprob,
    shard_labels,
    temperature_of,
)
from slipstream_kernels.objective import Objective
from slipstream_kernels.policy_head import Gradients, PolicyHead, trained_rows, trained_shares
from slipstream_kernels.policy_inputs import checked_inputs, given_normalizer
from slipstream_kernels.policy_loss import policy_loss
from slipstream_kernels.policy_result import METRICS, PolicyLoss, PolicyMetrics


def linear_policy_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    inverse_temperature: float | Tensor = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    behavior_N: Tensor,
    proximal_N: Tensor | None = None,
    reference_N: Tensor | None = None,
    advantage_N: Tensor,
    weight_N: Tensor,
    cu_seqlens: Tensor,
    objective: Objective,
    normalizer: Tensor | float | None = None,
    backend: Backend | str | None = None,
) -> PolicyLoss:
    """Return policy_loss of the labels' log-probabilities under a linear head.

        logprob, entropy, _ = linear_logprob(hidden, weight, labels, ...)   on the M rows with
        weight_N > 0;   loss = policy_loss(logprob, entropy_N=entropy, ...)

    hidden_NH: [N, H], row n predicts labels_N[n]; weight_VH: [V, H]; arguments ending in _N: [N],
    as in linear_logprob and policy_loss. Labels of rows with weight 0 are never read, so they may
    be any number. `loss` backpropagates into hidden, weight and bias, once; entropy only when
    Objective.entropy_coefficient is positive. grad_logprob_N: [N].

    Backends other than the reference take gradients while a chunk's logits are there: 6 M H V
    operations, and fewer where the objective silences rows, whose gradient is exactly 0. Beside the
    gradients they hold one chunk of logits. Raises ShapeError, ObjectiveError and BackendError.
    """
    op = "linear_policy_loss"
    check_head(op, hidden_NH, weight_VH, labels_N, bias_V, softcap)
    temperature = temperature_of(op, inverse_temperature, hidden_NH)
    chosen = choose_head(op, backend, hidden_NH.dtype, hidden_NH.device.type, group is not None)
    inputs = checked_inputs(
        op, objective, tokens=hidden_NH.shape[0], behavior_N=behavior_N, proximal_N=proximal_N,
        reference_N=reference_N, advantage_N=advantage_N, weight_N=weight_N, cu_seqlens=cu_seqlens,
        native=chosen == Backend.NATIVE.value,
    )  # fmt: skip
    if chosen == Backend.REFERENCE.value:
        settings = temperature, bias_V, softcap
        return _composed(hidden_NH, weight_VH, labels_N, *settings, inputs, objective, normalizer)
    differentiable = hidden_NH, weight_VH, bias_V
    enabled = torch.is_grad_enabled()
    needs = [enabled and tensor is not None and tensor.requires_grad for tensor in differentiable]
    shards = "" if group is None else group.group_name
    arguments = (
        shard_labels(labels_N, vocab_start), temperature, softcap, shards, chosen,
        inputs.behavior_N, inputs.proximal_N, inputs.reference_N, inputs.advantage_N, inputs.weight_N,
        inputs.cu_seqlens, given_normalizer(op, normalizer, hidden_NH.device), objective.text, needs,
    )  # fmt: skip
    record: Callable[..., Any] = _Differentiable.apply if torch.compiler.is_compiling() else _record
    try:
        loss, grad_logprob_N, grad_entropy_N, metrics = record(*differentiable, *arguments)
    except NativeError:
        check_cu_seqlens(op, cu_seqlens, hidden_NH.shape[0])
        check_labels(op, labels_N[weight_N > 0], weight_VH.shape[0])
        raise
    return PolicyLoss(
        loss=loss,
        grad_logprob_N=grad_logprob_N,
        grad_entropy_N=grad_entropy_N,
        metrics=PolicyMetrics(metrics),
    )


def _composed(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, temperature: Tensor, bias_V: Tensor | None,
    softcap: float | None, inputs: reference.PolicyInputs, objective: Objective,
    normalizer: Tensor | float | None,
) -> PolicyLoss:  # fmt: skip
    """Return the definition: the two ops one after the other, over the trained rows."""
    rows = (inputs.weight_N > 0).nonzero()[:, 0]
    logprob, entropy, _ = linear_logprob(
        hidden_NH.index_select(0, rows),
        weight_VH,
        labels_N[rows],
        inverse_temperature=temperature[rows] if temperature.numel() > 1 else float(temperature),
        bias_V=bias_V,
        softcap=softcap,
        backend=Backend.REFERENCE,
    )
    # A detached entropy spares its gradient, which costs as much as that of the log-probability.
    entropy = entropy if objective.entropy_coefficient > 0 else entropy.detach()
    count = hidden_NH.shape[0]
    return policy_loss(
        _scatter(logprob, rows, count),
        behavior_N=inputs.behavior_N,
        proximal_N=inputs.proximal_N,
        reference_N=inputs.reference_N,
        advantage_N=inputs.advantage_N,
        weight_N=inputs.weight_N,
        cu_seqlens=inputs.cu_seqlens,
        objective=objective,
        entropy_N=_scatter(entropy, rows, count),
        normalizer=normalizer,
        backend=Backend.REFERENCE,
    )


def _scatter(values_M: Tensor, rows_M: Tensor, count: int) -> Tensor:
    """Return [count]: `values_M` at `rows_M`, 0 elsewhere."""
    return values_M.new_zeros(count).index_copy(0, rows_M, values_M)


@lru_cache(maxsize=64)
def _read(text: str) -> Objective:
    return Objective.of(text)


class _Differentiable(torch.autograd.Function):
    """The op computes its gradients with the loss; the backward pass scales them where they are.

    A scaled copy would hold the gradient of the weight twice. So they serve one backward pass; a compiled
    graph, which plans its own memory, saves and copies them.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        # Through the dispatcher, which costs as much as a small op itself, only to be compiled.
        compiling = torch.compiler.is_compiling()
        loss, grad_logprob_N, grad_entropy_N, metrics, *gradients = (_head if compiling else _run)(*arguments)
        ctx.needs = arguments[-1]
        if compiling:
            ctx.save_for_backward(*gradients)
        else:
            ctx.gradients = gradients
        ctx.mark_non_differentiable(grad_logprob_N, grad_entropy_N, metrics)
        return loss, grad_logprob_N, grad_entropy_N, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        if torch.compiler.is_compiling():
            scaled = [gradient * upstream for gradient in ctx.saved_tensors]
        else:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                raise KernelError(
                    "linear_policy_loss: its gradients serve one backward pass, and this is the second; call"
                    " the op again instead of retaining the graph"
                )
            # The usual upstream is 1; on a CPU to look costs nothing, on a GPU it would wait for the device.
            as_it_is = upstream.device.type == "cpu" and float(upstream) == 1.0
            scaled = gradients if as_it_is else [gradient.mul_(upstream) for gradient in gradients]
        needed = (gradient if need else None for gradient, need in zip(scaled, ctx.needs, strict=True))
        return *needed, *[None] * 14


_record = recorded(_Differentiable)


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: Tensor,
    softcap: float | None, group: str, backend: str, behavior: Tensor, proximal: Tensor | None,
    kl_reference: Tensor | None, advantage: Tensor, token_weight: Tensor, cu_seqlens: Tensor,
    normalizer: Tensor | None, objective: str, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    goal, count = _read(objective), hidden.shape[0]
    inputs = reference.PolicyInputs(
        logprob_N=behavior, behavior_N=behavior, proximal_N=proximal, reference_N=kl_reference,
        entropy_N=None, advantage_N=advantage, weight_N=token_weight, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    share_N, rows_M, bounds = trained_shares(inputs, goal, normalizer, Backend(backend))
    every = rows_M.numel() == count
    per_row = temperature if every or temperature.numel() == 1 else temperature[rows_M]
    head = Head(weight, bias, per_row, softcap, group, backend)
    hidden_MH = head.hidden(hidden if every else hidden.index_select(0, rows_M))
    gradients = Gradients(
        hidden=torch.empty_like(hidden_MH) if needs[0] else None,
        weight=torch.empty_like(head.weight_VH, dtype=torch.float32) if needs[1] else None,
        bias=head.weight_VH.new_zeros(weight.shape[0], dtype=torch.float32) if needs[2] else None,
    )
    terms = PolicyHead(head, hidden_MH, labels if every else labels[rows_M], gradients).run(
        inputs if every else trained_rows(inputs, rows_M, bounds), share_N if every else share_N[rows_M], goal
    )
    if gradients.hidden is not None:
        head.summed(gradients.hidden)

    def spread(values_M: Tensor | None) -> Tensor:
        if values_M is None:
            return hidden.new_zeros(count, dtype=torch.float32)
        return values_M if every else _scatter(values_M, rows_M, count)

    grad_hidden = gradients.hidden
    if grad_hidden is not None and not every:
        grad_hidden = grad_hidden.new_zeros(hidden.shape).index_copy_(0, rows_M, grad_hidden)
    return (
        terms.loss,
        spread(terms.grad_logprob_N),
        spread(terms.grad_entropy_N),
        terms.metrics.values_K,
        _typed(grad_hidden, hidden),
        _typed(gradients.weight, weight),
        _typed(gradients.bias, weight if bias is None else bias),
    )


def _typed(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient.to(like.dtype)


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    row_N, needs = hidden.new_empty(hidden.shape[0], dtype=torch.float32), arguments[-1]
    inputs = hidden, weight, weight if bias is None else bias
    return (
        row_N.new_empty(()),
        row_N,
        torch.empty_like(row_N),
        row_N.new_empty(len(METRICS)),
        *(torch.empty_like(t) if needed else t.new_empty(0) for t, needed in zip(inputs, needs, strict=True)),
    )


_head = register(
    f"linear_policy_loss({HEAD_SCHEMA}, Tensor behavior, Tensor? proximal, Tensor? kl_reference,"
    " Tensor advantage, Tensor token_weight, Tensor cu_seqlens, Tensor? normalizer, str objective,"
    " bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementation=_run,
    fake=_fake,
)
