"""Floor 4. The key-value cache of continuous batching: one row per live rollout.

Dimensions: R rows (slots), S longest new span of a row, L cached length in use, H query heads, K
key-value heads, D head size, T packed tokens of one forward pass.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from slipstream.types import Int32Array

# Rounding the attended length keeps the shape, and with it the order of additions, the same for nearby
# lengths.
LENGTH_STEP = 32


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

    def plan(self, rows: Int32Array, starts: Int32Array, lengths: Int32Array) -> tuple[Tensor, Tensor]:
        """Prepare one forward pass.

        Row rows[i] gets tokens at positions starts[i] .. starts[i] + lengths[i] - 1. Returns the packed
        [T] row and position of every token; tokens are packed in the order of `rows`.
        """
        token_row = np.repeat(rows, lengths).astype(np.int64)
        offsets = np.cumsum(lengths) - lengths
        within = np.arange(len(token_row)) - np.repeat(offsets, lengths)
        token_position = np.repeat(starts, lengths) + within
        self._rows_T = torch.from_numpy(token_row).to(self._device)
        self._positions_T = torch.from_numpy(token_position.astype(np.int64)).to(self._device)
        single = lengths == 1
        self._groups = [
            self._group(rows[mask], starts[mask], lengths[mask], offsets[mask]) for mask in (single, ~single)
        ]
        return self._rows_T, self._positions_T

    def attend(
        self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
    ) -> Tensor:
        """Store the new keys and values, then attend each token to its row up to its own position."""
        keys_RKLD, values_RKLD = self._keys[layer], self._values[layer]
        planned = len(self._rows_T)  # the pass may be padded behind them
        keys_RKLD[self._rows_T, :, self._positions_T] = key_TKD[:planned]
        values_RKLD[self._rows_T, :, self._positions_T] = value_TKD[:planned]
        output_THD = torch.zeros_like(query_THD)
        grouped = query_THD.shape[1] != key_TKD.shape[1]
        for group in self._groups:
            if group is not None:
                group.attend(query_THD, keys_RKLD, values_RKLD, scale, grouped, output_THD)
        return output_THD

    def _group(
        self, rows: Int32Array, starts: Int32Array, lengths: Int32Array, offsets: Int32Array
    ) -> _Group | None:
        if len(rows) == 0:
            return None
        return _Group(rows, starts, lengths, offsets, self._device)


class _Group:
    """Rows that attend together, padded to their longest span."""

    def __init__(
        self,
        rows: Int32Array,
        starts: Int32Array,
        lengths: Int32Array,
        offsets: Int32Array,
        device: torch.device,
    ) -> None:
        span = int(lengths.max())
        self._length = -(-int((starts + lengths).max()) // LENGTH_STEP) * LENGTH_STEP
        # Neighbouring rows are read in place; scattered rows are copied out.
        first, last = int(rows.min()), int(rows.max())
        self._view = slice(first, last + 1) if (last + 1 - first) <= 2 * len(rows) else None
        columns_S = np.arange(span)
        # Padding repeats a row's last token: its output is finite and never used.
        source_BS = offsets[:, None] + np.minimum(columns_S, lengths[:, None] - 1)
        position_BS = starts[:, None] + np.minimum(columns_S, lengths[:, None] - 1)
        valid_BS = columns_S < lengths[:, None]
        if self._view is not None:
            slots = last + 1 - first
            source_BS, position_BS, valid_BS = (
                self._spread(x, rows - first, slots) for x in (source_BS, position_BS, valid_BS)
            )
        self._rows = torch.from_numpy(rows.astype(np.int64)).to(device)
        self._source_BS = torch.from_numpy(source_BS.astype(np.int64)).to(device)
        visible_B1SL = np.arange(self._length) <= position_BS[:, None, :, None]
        self._mask_B1SL = torch.from_numpy(visible_B1SL).to(device)
        self._valid_BS = torch.from_numpy(valid_BS).to(device)
        self._target_N = torch.from_numpy(source_BS[valid_BS].astype(np.int64)).to(device)

    @staticmethod
    def _spread(values_BS: np.ndarray, at: np.ndarray, slots: int) -> np.ndarray:
        spread = np.zeros((slots, values_BS.shape[1]), dtype=values_BS.dtype)
        spread[at] = values_BS
        return spread

    def attend(
        self,
        query_THD: Tensor,
        keys_RKLD: Tensor,
        values_RKLD: Tensor,
        scale: float,
        grouped: bool,
        output_THD: Tensor,
    ) -> None:
        """Write the group's attention output to its places in `output_THD`."""
        chosen = self._rows if self._view is None else self._view
        key, value = (x[chosen, :, : self._length] for x in (keys_RKLD, values_RKLD))
        query = query_THD[self._source_BS].transpose(1, 2)
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=self._mask_B1SL, scale=scale, enable_gqa=grouped
        )
        output_THD[self._target_N] = attended.transpose(1, 2)[self._valid_BS]
