"""Floor 5. Log-probability, entropy and log-sum-exp of a linear head, without the logits of all rows at once.

Dimensions: N rows, H hidden, V vocabulary.
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
from slipstream_kernels.checks import check_integers, check_labels, check_shape, plain
from slipstream_kernels.dispatch import Backend, choose
from slipstream_kernels.errors import BackendError, NativeError, ShapeError
from slipstream_kernels.head import Head
from slipstream_kernels.library import constant, recorded, register

IMPLEMENTED = (Backend.TRITON, Backend.NATIVE, Backend.REFERENCE)


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    inverse_temperature: float | Tensor = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score labels under a linear head.

    With x = hidden @ weight.T + bias and z = inverse_temperature * softcap * tanh(x / softcap) (no
    tanh without softcap):

        logsumexp_n = ln sum_v exp z_nv,   logprob_n = z_n,label - logsumexp_n,   entropy_n = -sum_v
        p_nv ln p_nv

    hidden_NH: [N, H]; weight_VH: [V, H]; labels_N: [N] integers in [0, V); inverse_temperature:
    number or [N]; bias_V: [V], finite. Returns logprob_N, entropy_N, logsumexp_N: [N] float32
    (float64 for float64 input), nats. All three are differentiable in hidden, weight and bias,
    once. Logits are never rounded below float32, and memory is bounded by a chunk of rows.

    A vocabulary may lie in shards: each rank of `group` then passes its rows [vocab_start,
    vocab_start + V) of weight and bias, in order of rank, and the same hidden states and labels.
    Each rank hands [4, N] statistics to the next, so that shards cut at multiples of 1,024 give
    the bits of the whole; the gradient to hidden_NH is summed over the group.

    Raises ShapeError and BackendError. Source of the gradient: p = softmax(z); dz = g (1_label - p) -
    g_entropy p (ln p + entropy) + g_logsumexp p.
    """
    op = "linear_logprob"
    check_head(op, hidden_NH, weight_VH, labels_N, bias_V, softcap)
    chosen = choose_head(op, backend, hidden_NH.dtype, hidden_NH.device.type, group is not None)
    temperature = temperature_of(op, inverse_temperature, hidden_NH)
    if chosen == "reference":
        check_labels(op, labels_N, weight_VH.shape[0])
        settings = reference.LogitSettings(inverse_temperature=temperature, softcap=softcap)
        return reference.linear_logprob(hidden_NH, weight_VH, labels_N, bias_V=bias_V, settings=settings)
    labels = shard_labels(labels_N, vocab_start)
    rest: tuple[Any, ...] = (labels, temperature, softcap, "" if group is None else group.group_name, chosen)
    compiling = torch.compiler.is_compiling()
    try:
        if torch.is_grad_enabled() and (
            hidden_NH.requires_grad
            or weight_VH.requires_grad
            or (bias_V is not None and bias_V.requires_grad)
        ):
            record: Callable[..., Any] = _Scored.apply if compiling else _record
            scored: tuple[Tensor, Tensor, Tensor] = record(hidden_NH, weight_VH, bias_V, rest)
        else:
            # Through the dispatcher, which costs as much as a small op itself, only to be compiled.
            scored = (_forward if compiling else _run_forward)(hidden_NH, weight_VH, bias_V, *rest)
    except NativeError:
        check_labels(op, labels_N, weight_VH.shape[0])
        raise
    return scored


def shard_labels(labels_N: Tensor, vocab_start: int) -> Tensor:
    """Return [N] int64 labels relative to a shard's first row, contiguous."""
    labels = plain(labels_N, torch.int64)
    return labels - vocab_start if vocab_start else labels


def check_head(
    op: str, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, bias_V: Tensor | None,
    softcap: float | None,
) -> None:  # fmt: skip
    """Raise ShapeError unless these can be a linear head, its input and labels."""
    hidden, weight = hidden_NH.shape, weight_VH.shape
    if len(hidden) != 2 or len(weight) != 2 or hidden[1] != weight[1] or 0 in weight:
        got = f"{list(hidden)} and {list(weight)}"
        raise ShapeError(f"{op}: hidden_NH and weight_VH must be [N, H] and [V, H] with V, H >= 1, got {got}")
    if hidden_NH.dtype is not weight_VH.dtype or not hidden_NH.is_floating_point():
        raise ShapeError(
            f"{op}: hidden_NH and weight_VH must have one floating-point type, got {hidden_NH.dtype} and "
            f"{weight_VH.dtype}"
        )
    if labels_N.dtype is not torch.int64:
        check_integers(op, labels_N)
    if labels_N.shape != hidden[:1]:
        check_shape(op, "labels_N", labels_N, (hidden[0],))
    if bias_V is not None:
        check_shape(op, "bias_V", bias_V, (weight[0],))
    if softcap is not None and not softcap > 0.0:
        raise ShapeError(f"{op}: softcap must be positive or None, got {softcap}")


@constant
def choose_head(
    op: str, backend: Backend | str | None, dtype: torch.dtype, device: str, sharded: bool
) -> str:
    """Return the name of a head op's backend; raises BackendError."""
    return _choose_head(op, backend, dtype, device, sharded)


# Once: what is available does not change while a process lives, and asking takes longer than a small op.
@lru_cache
def _choose_head(
    op: str, backend: Backend | str | None, dtype: torch.dtype, device: str, sharded: bool
) -> str:
    """Return the name of a head op's backend: float64 has only the reference, and shards never have it."""
    double = dtype is torch.float64
    if sharded and (double or backend == Backend.REFERENCE):
        raise BackendError(f"{op}: shards of a vocabulary need float32 and another backend than 'reference'")
    if double and backend not in (None, Backend.REFERENCE):
        raise BackendError(f"{op}: backend {str(backend)!r} takes no float64; choose 'reference', or None")
    implemented = (Backend.REFERENCE,) if double else IMPLEMENTED
    return choose(op, backend, implemented=implemented, device=device).value


def temperature_of(op: str, inverse_temperature: float | Tensor, hidden_NH: Tensor) -> Tensor:
    """Return [1] or [N] inverse temperatures, float32 or, for float64, float64; raises ShapeError."""
    dtype = torch.float64 if hidden_NH.dtype is torch.float64 else torch.float32
    if not isinstance(inverse_temperature, Tensor):
        if not 0.0 < inverse_temperature < float("inf"):
            raise ShapeError(f"{op}: inverse_temperature must be positive, got {inverse_temperature}")
        if torch.compiler.is_compiling():
            return torch.full((1,), inverse_temperature, dtype=dtype, device=hidden_NH.device)
        return _one_temperature(float(inverse_temperature), dtype, hidden_NH.device)
    if inverse_temperature.requires_grad:
        raise ShapeError(f"{op}: inverse_temperature must not require a gradient; detach it")
    check_shape(op, "inverse_temperature", inverse_temperature, (hidden_NH.shape[0],))
    return plain(inverse_temperature, dtype)


@lru_cache(maxsize=64)
def _one_temperature(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a [1] constant, made once: a tensor of one number costs as much as a small op."""
    # A tensor made under inference_mode could never be kept for a gradient.
    with torch.inference_mode(mode=False):
        return torch.full((1,), value, dtype=dtype, device=device)


class _Scored(torch.autograd.Function):
    """Keeps log-sum-exp and entropy of each row; the backward pass makes the logits of a chunk again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Any) -> Any:
        score = _forward if torch.compiler.is_compiling() else _run_forward
        logprob_N, entropy_N, logsumexp_N = score(hidden, weight, bias, *settings)
        labels, temperature, *ctx.settings = settings
        ctx.save_for_backward(hidden, weight, bias, labels, temperature, entropy_N, logsumexp_N)
        ctx.set_materialize_grads(False)
        return logprob_N, entropy_N, logsumexp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        hidden, weight, bias, labels, temperature, entropy_N, logsumexp_N = ctx.saved_tensors
        grad_hidden, grad_weight, grad_bias = _backward(
            hidden, weight, bias, labels, temperature, *ctx.settings, entropy_N, logsumexp_N, *gradients
        )
        return grad_hidden, grad_weight, None if bias is None else grad_bias, None


_record = recorded(_Scored)


def _run_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: Tensor,
    softcap: float | None, group: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    head = Head(weight, bias, temperature, softcap, group, backend)
    return head.scores(head.hidden(hidden), labels)


def _run_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: Tensor,
    softcap: float | None, group: str, backend: str, entropy: Tensor, logsumexp: Tensor,
    grad_logprob: Tensor | None, grad_entropy: Tensor | None, grad_logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    head = Head(weight, bias, temperature, softcap, group, backend)
    rows, hidden_NH = hidden.shape[0], head.hidden(hidden)
    grad_hidden = torch.empty_like(hidden_NH)
    grad_weight = torch.empty_like(head.weight_VH, dtype=torch.float32)
    grad_bias = grad_weight.new_zeros(weight.shape[0] if bias is not None else 0)
    chunks = head.chunks(rows)
    logits = head.logits(chunks[0].stop)

    gradients = grad_logprob, grad_entropy, grad_logsumexp
    for chunk in chunks:
        logits_CV, labels_C = logits[: chunk.stop - chunk.start], labels[chunk]
        head.forward(hidden_NH[chunk], labels_C, head.temperature(chunk), logits_CV)
        of_logprob, of_entropy, of_logsumexp = (None if g is None else g[chunk] for g in gradients)
        grad_CV = head.gradient_(
            logits_CV,
            labels_C,
            head.temperature(chunk),
            active_A=torch.arange(chunk.stop - chunk.start, device=hidden.device),
            logsumexp_C=logsumexp[chunk],
            entropy_C=entropy[chunk],
            grad_logprob_C=of_logprob,
            grad_entropy_C=of_entropy,
            grad_logsumexp_C=of_logsumexp,
        )
        torch.mm(grad_CV, head.weight_VH, out=grad_hidden[chunk])
        head.add_to_weight_(grad_weight, grad_CV, hidden_NH[chunk], first=chunk.start == 0)
        if bias is not None:
            grad_bias += grad_CV.sum(0)
    return (
        head.summed(grad_hidden).to(hidden.dtype),
        grad_weight.to(weight.dtype),
        grad_bias if bias is None else grad_bias.to(bias.dtype),
    )


def _fake_forward(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    row_N = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return row_N, torch.empty_like(row_N), torch.empty_like(row_N)


def _fake_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden),
        torch.empty_like(weight),
        torch.empty_like(bias) if bias is not None else weight.new_empty(0, dtype=torch.float32),
    )


HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor temperature, float? softcap,"
    " str group, str backend"
)
_forward = register(
    f"linear_logprob({HEAD_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    implementation=_run_forward,
    fake=_fake_forward,
)
_backward = register(
    f"linear_logprob_backward({HEAD_SCHEMA}, Tensor entropy, Tensor logsumexp, Tensor? grad_logprob,"
    " Tensor? grad_entropy, Tensor? grad_logsumexp) -> (Tensor, Tensor, Tensor)",
    implementation=_run_backward,
    fake=_fake_backward,
)
