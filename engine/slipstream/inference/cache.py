"""Floor 4. The key-value cache of continuous batching: one row per live rollout.

Dimensions: R rows (slots), B rows of one pass, L cached length in use, H query heads, K key-value heads, D
head size, T packed tokens of one forward pass, P tokens it adds to the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from slipstream.attention import (
    LEAST_SPAN,
    Int64Array,
    RaggedAttention,
    RowGroup,
    gather,
    groups_of_like_spans,
)
from slipstream.packing import shared_paths
from slipstream.types import Int32Array

LENGTH_STEP = 32
"""The attended length is rounded up to a multiple, so that a row's bits do not depend on the others'."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Feed:
    """The packed tokens of one forward pass."""

    rows: Int64Array
    """[T] a row that takes each packed token."""
    positions: Int64Array
    """[T] its position there."""
    last: Int64Array
    """[B] the packed token that is each row's newest."""


class SlotCache:
    """Keys and values of all rows; attends any mix of decoding and prefilling rows."""

    def __init__(self, model: PreTrainedModel, *, rows: int, max_tokens: int) -> None:
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        length = -(-max_tokens // LENGTH_STEP) * LENGTH_STEP
        first = next(model.parameters())
        self._device = first.device
        # Heads before positions: what one head attends to lies together.
        shape = (config.num_hidden_layers, rows, heads, length, size)
        self._keys = torch.zeros(shape, dtype=first.dtype, device=first.device)
        self._values = torch.zeros_like(self._keys)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` cached tokens of row `source` to row `target`."""
        for cached in (self._keys, self._values):
            cached[:, target, :, :length] = cached[:, source, :, :length]

    def plan(
        self,
        rows: Int32Array,
        starts: Int32Array,
        spans: Int32Array,
        *,
        decodes: NDArray[np.bool_],
        shared: Int64Array,
    ) -> Feed:
        """Prepare one forward pass and return its packed tokens; all arguments are [B].

        Row rows[b] gets tokens at positions starts[b] .. starts[b] + spans[b] - 1; decodes[b] says that
        it gets a single one, which it drew itself. The first shared[b] tokens equal those of row
        rows[b - 1], whose start is the same, and are packed there only.
        """
        lengths = spans.astype(np.int64)
        row_P = np.repeat(rows, lengths).astype(np.int64)
        ends = np.cumsum(lengths)
        within_P = np.arange(len(row_P)) - np.repeat(ends - lengths, lengths)
        position_P = np.repeat(starts, lengths) + within_P
        _, _, heads, length, _ = self._keys.shape
        place_PK = (row_P[:, None] * heads + np.arange(heads)) * length + position_P[:, None]
        self._place = torch.from_numpy(place_PK.ravel()).to(self._device)
        path = shared_paths(lengths, shared)
        self._path_P = torch.from_numpy(path).to(self._device) if shared.any() else None
        own_P = within_P >= np.repeat(shared, lengths)
        self._tokens = int(own_P.sum())
        self._group(rows, starts + shared, lengths - shared, decodes)
        return Feed(rows=row_P[own_P], positions=position_P[own_P], last=path[ends - 1])

    def attend(
        self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
    ) -> Tensor:
        """Store the new keys and values, then attend each token to its row up to its own position."""
        stored = (self._keys[layer], self._values[layer])
        for cached_RKLD, new_TKD in zip(stored, (key_TKD, value_TKD), strict=True):
            # The pass may be padded behind the planned tokens.
            new_PKD = new_TKD[: self._tokens] if self._path_P is None else gather(new_TKD, self._path_P)
            size = new_PKD.shape[-1]
            cached_RKLD.view(-1, size).index_copy_(0, self._place, new_PKD.reshape(-1, size))
        views = (
            tuple(_rows(cached[:, :, : group.length], chosen) for cached in stored)
            for chosen, group in zip(self._chosen, self._groups, strict=True)
        )
        output = self._ragged(query_THD, views, scale)  # type: ignore[arg-type]
        if len(output) == len(query_THD):
            return output
        return torch.cat([output, output.new_zeros(len(query_THD) - len(output), *output.shape[1:])])

    def _group(
        self, rows: Int32Array, starts: Int64Array, spans: Int64Array, decodes: NDArray[np.bool_]
    ) -> None:
        first = np.cumsum(spans) - spans
        kinds = [(np.flatnonzero(decodes), 1)] if decodes.any() else []
        kinds += [(chosen, LEAST_SPAN) for chosen in groups_of_like_spans(np.where(decodes, 0, spans))]
        self._chosen: list[slice | Tensor] = []
        self._groups: list[RowGroup] = []
        for chosen, least in kinds:
            at, low, high = rows[chosen], int(rows[chosen].min()), int(rows[chosen].max()) + 1
            arrays = [first[chosen], starts[chosen], spans[chosen]]
            neighbours = high - low <= 2 * len(chosen)
            if neighbours:
                arrays = [_spread(x, at - low, high - low) for x in arrays]
            longest = int((starts + spans)[chosen].max())
            length = -(-longest // LENGTH_STEP) * LENGTH_STEP
            self._chosen.append(slice(low, high) if neighbours else torch.from_numpy(at).to(self._device))
            self._groups.append(RowGroup(*arrays, length=length, least=least))
        self._ragged = RaggedAttention(self._groups, self._device)


def _rows(cached_RKLD: Tensor, chosen: slice | Tensor) -> Tensor:
    """Return [B, K, L, D]: neighbouring rows in place, scattered rows copied."""
    return cached_RKLD[chosen] if isinstance(chosen, slice) else cached_RKLD.index_select(0, chosen)


def _spread(values: Int64Array, at: Int32Array, slots: int) -> Int64Array:
    """Return [slots]: the values at their places, 0 elsewhere."""
    spread = np.zeros(slots, dtype=np.int64)
    spread[at] = values
    return spread
