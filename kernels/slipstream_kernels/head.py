"""Floor 4. Passes of a linear head over its rows, a chunk of logits at a time, on whichever backend.

A chunk's logits are made by the backend (native_head.py, triton/linear_logprob.py), its statistics merged
over the shards of the vocabulary, and its gradient written over the logits before two matrix products.

Dimensions: N rows, C rows of a chunk, A active rows of a chunk, H hidden, V vocabulary (of this shard).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from slipstream_kernels import native_head
from slipstream_kernels.statistics import finish, merge

CHUNK_BYTES: Final = 128 << 20
"""Logits held at once."""
LEAST_ROWS: Final = 256
"""Fewer rows would read the weight, and write its gradient, too often."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """A linear head and what happens to its logits."""

    weight_VH: Tensor
    """[V, H] float32, contiguous."""
    bias_V: Tensor | None
    inverse_temperature: Tensor
    """[1] or [N] float32."""
    softcap: float | None
    group: str
    """Name of the process group whose members hold the shards in order of rank, or "" for one shard."""

    def chunks(self, rows: int) -> list[slice]:
        """Return slices of the rows whose logits are held at once, at least one."""
        size = max(LEAST_ROWS, CHUNK_BYTES // (4 * self.weight_VH.shape[0]))
        return [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]

    def logits_of(self, rows: int) -> Tensor:
        """Return [C, V] uninitialised, for the largest chunk of so many rows."""
        return self.weight_VH.new_empty(self.chunks(rows)[0].stop, self.weight_VH.shape[0])

    def temperature(self, chunk: slice) -> Tensor:
        """Return [1] or [C] inverse temperatures of a chunk."""
        every = self.inverse_temperature
        return every if every.numel() == 1 else every[chunk]

    def forward(
        self, hidden_CH: Tensor, labels_C: Tensor, temperature: Tensor, logits_CV: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return [C] log-probability, entropy and log-sum-exp of a chunk, whose logits stay in logits_CV."""
        result = native_head.head_statistics(
            hidden_CH,
            self.weight_VH,
            labels_C,
            inverse_temperature=temperature,
            bias_V=self.bias_V,
            softcap=self.softcap,
            logits_CV=logits_CV,
            whole_vocabulary=not self.group,
        )
        logprob_C, entropy_C, logsumexp_C = finish(self._merged(result)) if self.group else result.unbind()
        return logprob_C, entropy_C, logsumexp_C

    def gradient_(
        self, logits_CV: Tensor, labels_C: Tensor, temperature: Tensor, *, active_A: Tensor,
        logsumexp_C: Tensor, entropy_C: Tensor, grad_logprob_C: Tensor | None,
        grad_entropy_C: Tensor | None = None, grad_logsumexp_C: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return [A, V] gradients to hidden @ weight.T of a chunk's active rows, over its logits."""
        return native_head.logit_gradient_(
            logits_CV,
            labels_C,
            logsumexp_C=logsumexp_C,
            entropy_C=entropy_C,
            grad_logprob_C=grad_logprob_C,
            grad_entropy_C=grad_entropy_C,
            grad_logsumexp_C=grad_logsumexp_C,
            inverse_temperature=temperature,
            softcap=self.softcap,
            active_A=active_A,
        )

    def summed(self, grad_hidden: Tensor) -> Tensor:
        """Return the gradient to the hidden states, which every shard adds to."""
        if self.group:
            dist.all_reduce(grad_hidden, group=_group(self.group))
        return grad_hidden

    def _merged(self, statistics_4C: Tensor) -> Tensor:
        group = _group(self.group)
        parts = [torch.empty_like(statistics_4C) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, statistics_4C, group=group)
        return merge(torch.stack(parts))


def _group(name: str) -> dist.ProcessGroup:
    """Return a process group by its name, the form in which an op can take it."""
    group: dist.ProcessGroup = _resolve_process_group(dist.GroupName(name))
    return group
