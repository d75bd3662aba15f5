"""Floor 4. A linear head over its rows, a chunk of logits at a time, on whichever backend.

A chunk's logits are made by the backend (native_head.py, triton/linear_logprob.py), its statistics merged
over the shards of the vocabulary, and its gradient written over the logits before two matrix products.

Dimensions: N rows, C rows of a chunk, A active rows of a chunk, H hidden, V vocabulary (of this shard).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from slipstream_kernels import native_head
from slipstream_kernels.checks import plain
from slipstream_kernels.dispatch import Backend

CHUNK_BYTES: Final = {"cpu": 128 << 20, "cuda": 1 << 30}
"""Logits held at once, by device."""
KEPT_BYTES: Final = 32 << 20
"""Logits up to this size are kept by a thread for its next call: new pages cost more than filling them."""
SMALL_BYTES: Final = 64 << 10
"""Logits up to this size come from memory that malloc has at hand."""
LEAST_ROWS: Final = 256
"""Fewer rows would read the weight, and write its gradient, too often; a GPU's chunks are multiples of it."""


class _Kept(threading.local):
    """One buffer of float32 for each thread."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def room(self, count: int) -> Tensor:
        """Return [count] uninitialised."""
        if self._buffer.numel() < count:
            # A tensor made under inference_mode could not be written outside of it.
            with torch.inference_mode(mode=False):
                self._buffer = torch.empty(count)
        return self._buffer[:count]


_kept: Final = _Kept()


class Head:
    """A linear head and what happens to its logits; nothing changes it once it is made."""

    # Every call of an op makes one: a plain class takes a third of a frozen dataclass's time.
    __slots__ = ("bias_V", "group", "inverse_temperature", "is_native", "softcap", "weight_VH")

    def __init__(
        self, weight: Tensor, bias: Tensor | None, temperature: Tensor, softcap: float | None, group: str,
        backend: str,
    ) -> None:  # fmt: skip
        """Take an op's arguments, in the types that the backend computes in.

        temperature: [1] or [N] float32. group: name of the process group whose members hold the shards of
        the vocabulary in order of rank, or "" for one shard. backend: "native" or "triton".
        """
        self.is_native = backend == Backend.NATIVE
        self.weight_VH = plain(weight, torch.float32 if self.is_native else weight.dtype)
        """[V, H], contiguous; float32 on the CPU."""
        self.bias_V = None if bias is None else plain(bias, torch.float32)
        self.inverse_temperature, self.softcap, self.group = temperature, softcap, group

    def hidden(self, hidden_NH: Tensor) -> Tensor:
        """Return hidden states in the type of the weight, contiguous."""
        return plain(hidden_NH, self.weight_VH.dtype)

    def chunks(self, rows: int) -> list[slice]:
        """Return slices of the rows whose logits are held at once, at least one.

        Each has CHUNK_BYTES of logits, or LEAST_ROWS rows where those are more; the last may be shorter.
        """
        if rows <= LEAST_ROWS:
            return [slice(0, rows)]
        row_bytes = self.weight_VH.element_size() * self.weight_VH.shape[0]
        size = max(LEAST_ROWS, CHUNK_BYTES[self.weight_VH.device.type] // row_bytes)
        if not self.is_native:
            size -= size % LEAST_ROWS
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def logits(self, rows: int) -> Tensor:
        """Return [rows, V] uninitialised, to hold a chunk; valid until the next call."""
        columns = self.weight_VH.shape[0]
        if self.is_native:
            keep = SMALL_BYTES < 4 * rows * columns <= KEPT_BYTES
            return _kept.room(rows * columns).view(rows, columns) if keep else torch.empty(rows, columns)
        return self.weight_VH.new_empty((rows, columns))

    def temperature(self, chunk: slice) -> Tensor:
        """Return [1] or [C] inverse temperatures of a chunk."""
        every = self.inverse_temperature
        return every if every.numel() == 1 else every[chunk]

    def scores(self, hidden_NH: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return [N] log-probability, entropy and log-sum-exp of all rows; no logits stay."""
        if not self.is_native:
            return self.forward(hidden_NH, labels_N, self.inverse_temperature, None)
        chunks = self.chunks(hidden_NH.shape[0])
        logits = self.logits(chunks[0].stop)
        if len(chunks) == 1:
            return self.forward(hidden_NH, labels_N, self.inverse_temperature, logits)
        parts = []
        for chunk in chunks:
            logits_CV = logits[: chunk.stop - chunk.start]
            parts.append(self.forward(hidden_NH[chunk], labels_N[chunk], self.temperature(chunk), logits_CV))
        logprob_N, entropy_N, logsumexp_N = (torch.cat(part) for part in zip(*parts, strict=True))
        return logprob_N, entropy_N, logsumexp_N

    def forward(
        self, hidden_CH: Tensor, labels_C: Tensor, temperature: Tensor, logits_CV: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return [C] log-probability, entropy and log-sum-exp of a chunk, whose logits stay in logits_CV.

        Only Triton can do without logits_CV.
        """
        kernels: Any = native_head if self.is_native else _triton()
        settings = self.weight_VH, labels_C, temperature, self.bias_V, self.softcap, logits_CV
        scores: tuple[Tensor, Tensor, Tensor]
        if self.group:
            parts_K4C = kernels.head_parts(hidden_CH, *settings)
            scores = kernels.finish(self._merged(parts_K4C, kernels.merge_parts))
        else:
            scores = kernels.head_scores(hidden_CH, *settings)
        return scores

    def gradient_(
        self, logits_CV: Tensor, labels_C: Tensor, temperature: Tensor, *, active_A: Tensor,
        logsumexp_C: Tensor, entropy_C: Tensor, grad_logprob_C: Tensor | None,
        grad_entropy_C: Tensor | None = None, grad_logsumexp_C: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return [A, V] gradients to hidden @ weight.T of a chunk's active rows; its logits are gone then."""
        given: dict[str, Any] = {
            "logsumexp_C": logsumexp_C.contiguous(),
            "entropy_C": entropy_C.contiguous(),
            "grad_logprob_C": None if grad_logprob_C is None else grad_logprob_C.contiguous(),
            "grad_entropy_C": None if grad_entropy_C is None else grad_entropy_C.contiguous(),
            "grad_logsumexp_C": None if grad_logsumexp_C is None else grad_logsumexp_C.contiguous(),
            "inverse_temperature": temperature,
            "softcap": self.softcap,
        }
        if self.is_native:
            return native_head.logit_gradient_(logits_CV, labels_C, active_A=active_A, **given)
        _triton().logit_gradient_(logits_CV, labels_C, **given)
        every = active_A.numel() == logits_CV.shape[0]
        return logits_CV if every else logits_CV.index_select(0, active_A)

    def add_to_weight_(self, grad_VH: Tensor, grad_AV: Tensor, hidden_AH: Tensor, *, first: bool) -> None:
        """Add grad_AV.T @ hidden_AH to the [V, H] float32 gradient; the first chunk overwrites it.

        grad_AV: [A, V] of gradient_; hidden_AH: [A, H] of the same rows.
        """
        # beta 0: one pass over the gradient less, which need not hold zeros.
        beta = 0.0 if first else 1.0
        if grad_AV.dtype is torch.float32:
            grad_VH.addmm_(grad_AV.T, hidden_AH, beta=beta)
        else:
            torch.addmm(grad_VH, grad_AV.T, hidden_AH, out_dtype=torch.float32, beta=beta, out=grad_VH)

    def summed(self, grad_hidden: Tensor) -> Tensor:
        """Return the [N, H] gradient to the hidden states, summed in place over the shards."""
        if self.group:
            dist.all_reduce(grad_hidden, group=_group(self.group))
        return grad_hidden

    def _merged(self, parts_K4C: Tensor, merge_parts: Callable[[Tensor], Tensor]) -> Tensor:
        """Return [4, C] statistics of the whole vocabulary, the same on every rank.

        Each rank in turn merges its parts onto what lies before them and hands on the [4, C]: sums of shards
        that were merged beforehand would differ by rounding from those of a head in one piece.
        """
        group = _group(self.group)
        merged_4C = torch.empty_like(parts_K4C[0])
        for rank in range(dist.get_world_size(group)):
            if rank == dist.get_rank(group):
                merged_4C = merge_parts(parts_K4C if rank == 0 else torch.cat((merged_4C[None], parts_K4C)))
            dist.broadcast(merged_4C, group=group, group_src=rank)
        return merged_4C


def _triton() -> Any:
    """Return the kernels in Triton, which only a chosen backend loads."""
    return import_module("slipstream_kernels.triton.linear_logprob")


def _group(name: str) -> dist.ProcessGroup:
    """Return a process group by its name, the form in which an op can take it."""
    group: dist.ProcessGroup = _resolve_process_group(dist.GroupName(name))
    return group
