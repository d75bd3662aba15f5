"""Floor 4. Drawing tokens: vectorised over rows, every random number keyed by rollout and position.

Dimensions: R rows, V vocabulary.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UInt64Array = NDArray[np.uint64]


def rollout_key(*parts: object) -> int:
    """Return a 63-bit key of the parts; equal parts give equal keys on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(keys_R: UInt64Array, positions_R: UInt64Array) -> NDArray[np.float64]:
    """Return [R] uniform numbers in [0, 1): SplitMix64 of key + (position + 1) x golden ratio.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 15.
    """
    with np.errstate(over="ignore"):
        mixed = keys_R + (positions_R + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    uniform_R: NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform_R


def draw(
    logits_RV: Tensor, *, temperature_R: Tensor, top_p_R: Tensor | None, uniform_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the distribution function.

    Returns [R] int64 tokens and their [R] fp32 log-probabilities under the distribution drawn from:
    softmax(logits / temperature), renormalised over the nucleus where `top_p_R` is below 1. A
    temperature of 0 takes the likeliest token.
    """
    greedy_R = temperature_R == 0
    scale_R = torch.where(greedy_R, 1.0, temperature_R)
    logprob_RV = torch.log_softmax(logits_RV.float() / scale_R[:, None], dim=-1)
    if top_p_R is not None:
        logprob_RV = _nucleus(logprob_RV, top_p_R)
    cumulative_RV = torch.cumsum(logprob_RV.exp(), dim=-1, dtype=torch.float64)
    target_R1 = (uniform_R * cumulative_RV[:, -1])[:, None]
    token_R = torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0].clamp_(
        max=logits_RV.shape[-1] - 1
    )
    if bool(greedy_R.any()):
        token_R = torch.where(greedy_R, logprob_RV.argmax(dim=-1), token_R)
    return token_R, logprob_RV.gather(1, token_R[:, None])[:, 0]


def _nucleus(logprob_RV: Tensor, top_p_R: Tensor) -> Tensor:
    """Keep the likeliest tokens whose mass reaches top-p, renormalised; the others get minus infinity."""
    ordered_RV, order_RV = logprob_RV.sort(dim=-1, descending=True)
    before_RV = ordered_RV.exp().cumsum(dim=-1) - ordered_RV.exp()
    ordered_RV = ordered_RV.masked_fill(before_RV >= top_p_R[:, None], float("-inf"))
    kept_RV = torch.empty_like(ordered_RV).scatter_(1, order_RV, ordered_RV)
    return kept_RV - torch.logsumexp(kept_RV, dim=-1, keepdim=True)
