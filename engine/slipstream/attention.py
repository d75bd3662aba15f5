"""Floor 3. One attention for training and sampling, hooked into any Hugging Face model.

The model sees packed tokens, ``[1, T]``; what a token may attend to is decided by the context handed to
`run_decoder`: `PackedSegments` (training: causal within a segment) or the sampler's KV cache. All other
layers work on packed tokens, so no padding is ever multiplied by a weight.

Dimensions: T packed tokens, B segments, L longest segment, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

IMPLEMENTATION = "slipstream"


class AttentionContext(Protocol):
    """Decides what each packed token attends to."""

    def attend(
        self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
    ) -> Tensor:
        """Return the [T, H, D] attention output of one layer."""


class PackedSegments:
    """Causal attention within segments: only here are rows padded, to the longest segment.

    Padding follows the real tokens of a row, so the causal rule alone hides it.
    """

    def __init__(self, cu_seqlens: Tensor) -> None:
        """`cu_seqlens` [B + 1] int64: where segments start; the last entry is T."""
        lengths_B = cu_seqlens[1:] - cu_seqlens[:-1]
        longest = int(lengths_B.max())
        columns_L = torch.arange(longest, device=cu_seqlens.device)
        self._valid_BL = columns_L < lengths_B[:, None]
        # Padding reads the segment's first token: any finite row will do, its output is never used.
        self._source_BL = torch.where(
            self._valid_BL, cu_seqlens[:-1, None] + columns_L, cu_seqlens[:-1, None]
        )

    def attend(
        self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
    ) -> Tensor:
        """Pad rows, attend causally, pack again."""
        query, key, value = (x[self._source_BL].transpose(1, 2) for x in (query_THD, key_TKD, value_TKD))
        grouped = query.shape[1] != key.shape[1]
        output = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return output.transpose(1, 2)[self._valid_BL]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Adapter in Hugging Face's form: [1, heads, T, D] in, [1, T, H, D] out."""
    context: AttentionContext = kwargs["slipstream_context"]
    query_THD, key_TKD, value_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    return context.attend(module.layer_idx, query_THD, key_TKD, value_TKD, scaling)[None], None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The context masks; a dense mask would cost T squared."""
    return None


def install(model: PreTrainedModel) -> None:
    """Make `model` attend through the contexts of this module."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
    model.set_attn_implementation(IMPLEMENTATION)


def run_decoder(
    model: PreTrainedModel, token_ids_T: Tensor, positions_T: Tensor, context: AttentionContext
) -> Tensor:
    """Return the [T, hidden] final hidden states of packed tokens; the head's kernels go on from there."""
    output = model.base_model(
        input_ids=token_ids_T[None],
        position_ids=positions_T[None],
        use_cache=False,
        slipstream_context=context,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden
