"""Floor 3. One attention for training and sampling, hooked into any Hugging Face model.

The model sees packed tokens, ``[1, T]``; what a token may attend to is decided by the context handed to
`run_decoder`: `PackedSegments` (training: causal within a segment) or the sampler's KV cache. All other
layers work on packed tokens, so no padding is ever multiplied by a weight.

Dimensions: T packed tokens, B rows, S longest span of a group, L attended length, H query heads, K
key-value heads, D head size, P tokens of all segments one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

IMPLEMENTATION = "slipstream"

LEAST_SPAN = 4
"""Matrix products of 1 to 3 rows round otherwise than those of more (measured with MKL): with this many
queries a token's bits depend neither on the span it is fed in nor on who attends beside it. Rows that
decode, one token each, are a kind of their own."""

GPU_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's, which PyTorch prefers on Hopper: it plans for each new shape, and here shapes seldom recur."""

SPAN_FACTOR = 4
"""Spans padded together differ by less than this factor."""

Int64Array = NDArray[np.int64]


class AttentionContext(Protocol):
    """Decides what each packed token attends to."""

    def attend(
        self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
    ) -> Tensor:
        """Return the [T, H, D] attention output of one layer."""


class RowGroup:
    """Rows that attend together: their spans of packed tokens, padded to the longest."""

    def __init__(
        self,
        first_B: Int64Array,
        starts_B: Int64Array,
        spans_B: Int64Array,
        *,
        length: int = 0,
        least: int = LEAST_SPAN,
    ) -> None:
        """Row b has packed tokens first_B[b] .. first_B[b] + spans_B[b] - 1, at positions from starts_B[b].

        A row may have no token. `length` is the attended length, by default the longest row's; spans
        are padded to a multiple of `least`, 1 for rows that decode.
        """
        columns_S = np.arange(-(-int(spans_B.max()) // least) * least)
        # Padding repeats a row's last token: its output is finite and never used.
        within_BS = np.minimum(columns_S, np.maximum(spans_B - 1, 0)[:, None])
        self.shape = within_BS.shape
        self.length = length or int((starts_B + spans_B).max())
        self.source = (first_B[:, None] + within_BS).ravel()
        self.valid = (columns_S < spans_B[:, None]).ravel()
        self.causal = not starts_B.any()
        self._position_BS = starts_B[:, None] + within_BS

    def mask(self, like: Tensor) -> Tensor:
        """Return the [B, 1, S, L] additive mask, of the type and on the device of `like`."""
        position_B1S1 = torch.from_numpy(self._position_BS).to(like.device)[:, None, :, None]
        hidden_B1SL = torch.arange(self.length, device=like.device) > position_B1S1
        return like.new_zeros(hidden_B1SL.shape).masked_fill_(hidden_B1SL, float("-inf"))

    def attend(
        self, query_BSHD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Return the [B, S, H, D] output; without a mask, attention is causal from position 0."""
        if self.shape[1] == 1 and mask is not None:
            return _attend_once(query_BSHD[:, 0], key_BKLD, value_BKLD, mask[:, 0], scale)[:, None]
        with sdpa_kernel(GPU_BACKENDS) if query_BSHD.is_cuda else nullcontext():
            attended = scaled_dot_product_attention(
                query_BSHD.transpose(1, 2),
                key_BKLD,
                value_BKLD,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query_BSHD.shape[2] != key_BKLD.shape[1],
            )
        return attended.transpose(1, 2)


def _attend_once(
    query_BHD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, mask_B1L: Tensor, scale: float
) -> Tensor:
    """Return the [B, H, D] output of one query a row: two products over all heads, half the time on a CPU."""
    rows, heads, size = query_BHD.shape
    kv_heads = key_BKLD.shape[1]
    query = (query_BHD * scale).reshape(rows * kv_heads, heads // kv_heads, size)
    score = torch.bmm(query, key_BKLD.flatten(0, 1).transpose(1, 2)).view(rows, heads, -1)
    share = (score + mask_B1L).softmax(dim=-1, dtype=torch.float32).to(value_BKLD.dtype)
    output = torch.bmm(share.view(rows * kv_heads, heads // kv_heads, -1), value_BKLD.flatten(0, 1))
    return output.view(rows, heads, size)


class RaggedAttention:
    """Attention of packed tokens by groups of rows; masks are made once and serve every layer."""

    def __init__(self, groups: Sequence[RowGroup], device: torch.device, *, causal: bool = False) -> None:
        """With `causal`, a group whose rows all start at 0 needs no mask: its padding comes last."""
        self._groups = groups
        self._causal = [causal and group.causal for group in groups]
        self._masks: list[Tensor | None] = []
        source = np.concatenate([group.source for group in groups])
        place = np.flatnonzero(np.concatenate([group.valid for group in groups]))
        place_T = np.empty_like(place)
        place_T[source[place]] = place
        self._source = torch.from_numpy(source).to(device)
        self._place_T = torch.from_numpy(place_T).to(device)

    def __call__(self, query_THD: Tensor, rows: Iterable[tuple[Tensor, Tensor]], scale: float) -> Tensor:
        """Return the [T, H, D] output; `rows` yields each group's keys and values, [B, K, L, D]."""
        if not self._masks:
            self._masks = [
                None if causal else group.mask(query_THD)
                for group, causal in zip(self._groups, self._causal, strict=True)
            ]
        _, heads, size = query_THD.shape
        padded = gather(query_THD, self._source).split([group.source.size for group in self._groups])
        outputs = [
            group.attend(query.view(*group.shape, heads, size), key, value, mask, scale)
            for group, query, mask, (key, value) in zip(self._groups, padded, self._masks, rows, strict=True)
        ]
        outputs = [output.reshape(-1, heads, size) for output in outputs]
        return gather(outputs[0] if len(outputs) == 1 else torch.cat(outputs), self._place_T)


def gather(values_THD: Tensor, index: Tensor) -> Tensor:
    """Return [index, H, D] rows of the values; gradients of a row taken often are added in a fixed order."""
    _, heads, size = values_THD.shape
    return embedding(index, values_THD.reshape(-1, heads * size)).view(*index.shape, heads, size)


def groups_of_like_spans(spans_B: Int64Array) -> list[Int64Array]:
    """Return the indices of rows with tokens, those of like spans together."""
    steps = np.log(np.maximum(spans_B, LEAST_SPAN) / LEAST_SPAN) / np.log(SPAN_FACTOR)
    size_B = np.where(spans_B > 0, np.ceil(steps), -1)
    return [np.flatnonzero(size_B == size) for size in np.unique(size_B[spans_B > 0])]


class PackedSegments:
    """Causal attention within segments, which may share the packed tokens of a common beginning.

    Only here are rows padded; a group's keys and values are gathered for each of its segments.
    """

    def __init__(
        self,
        cu_seqlens: Int64Array | Tensor,
        device: torch.device | None = None,
        *,
        path: Int64Array | None = None,
        shared: Int64Array | None = None,
    ) -> None:
        """Describe B segments of P tokens; segment b holds tokens cu_seqlens[b] .. cu_seqlens[b + 1] - 1.

        path: [P] the packed token that stands for each; shared: [B] leading tokens of each segment
        that an earlier one holds, the others are packed one after another. Without them P = T and
        nothing is shared.
        """
        bounds = np.asarray(cu_seqlens, dtype=np.int64)
        starts_B = np.zeros(len(bounds) - 1, dtype=np.int64) if shared is None else shared
        path = np.arange(bounds[-1]) if path is None else path
        spans_B = np.diff(bounds) - starts_B
        first_B = np.cumsum(spans_B) - spans_B
        target = device or torch.device("cpu")
        self._paths: list[Tensor] = []
        groups: list[RowGroup] = []
        for rows in groups_of_like_spans(spans_B):
            group = RowGroup(first_B[rows], starts_B[rows], spans_B[rows])
            # Padding repeats a row's last token, which the mask hides.
            last = (starts_B + spans_B - 1)[rows, None]
            path_BL = path[bounds[rows, None] + np.minimum(np.arange(group.length), last)]
            groups.append(group)
            self._paths.append(torch.from_numpy(path_BL).to(target))
        self._ragged = RaggedAttention(groups, target, causal=True)

    def attend(
        self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
    ) -> Tensor:
        """Return the [T, H, D] output: gather each group's rows, attend causally, pack again.

        query_THD: [T, H, D]; key_TKD and value_TKD: [T, K, D], where K divides H.
        """
        rows = (tuple(gather(x, path).transpose(1, 2) for x in (key_TKD, value_TKD)) for path in self._paths)
        return self._ragged(query_THD, rows, scale)  # type: ignore[arg-type]


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


def install(model: PreTrainedModel) -> None:
    """Make `model` attend through the contexts of this module."""
    # Without a mask function of that name Hugging Face makes no mask, which would cost T squared.
    AttentionInterface.register(IMPLEMENTATION, _attention)
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
