"""Floor 4. One message out of a server's answers: one that was cut off is gone on with, perhaps elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from slipstream.errors import InfrastructureError, NumericsError
from slipstream.inference.vllm.contract import Generated
from slipstream.types import Completion, Int32Array, Sampling

MAX_ABORTS: Final = 8
"""An answer cut off so often is given up."""

Ask = Callable[[Sequence[int], Sampling], Awaitable[Generated]]
"""Asks some server to go on after these tokens."""


async def whole_message(ask: Ask, token_ids: Int32Array, sampling: Sampling) -> Completion:
    """Return one message after the [T] tokens, asking again with what there is whenever it was cut off.

    Raises InfrastructureError when that happens too often or nobody has proven the weights, NumericsError,
    and whatever `ask` raises.
    """
    tokens = [int(token) for token in token_ids]
    parts: list[Generated] = []
    sampled = 0
    while len(parts) <= MAX_ABORTS:
        part = await ask(tokens, replace(sampling, max_tokens=sampling.max_tokens - sampled))
        parts.append(part)
        tokens.extend(part.token_ids)
        sampled += len(part.token_ids)
        if part.finish_reason != "abort" or sampled >= sampling.max_tokens:
            return _completion(parts)
    raise InfrastructureError(f"{parts[-1].url}: it cut one answer off {MAX_ABORTS} times")


def _completion(parts: Sequence[Generated]) -> Completion:
    logprobs = np.array([value for part in parts for value in part.logprobs], dtype=np.float32)
    if not np.isfinite(logprobs).all():
        raise NumericsError(f"{parts[-1].url}: log-probabilities that are not finite")
    held = [(part, span, _serial_of(part, span.version)) for part in parts for span in part.spans]
    versions = [serial for _, span, serial in held for _ in range(span.start, span.end)]
    return Completion(
        token_ids=np.array([token for part in parts for token in part.token_ids], dtype=np.int32),
        logprobs=logprobs,
        versions=np.array(versions, dtype=np.int32),
        stopped=parts[-1].finish_reason == "stop",
        samplers=frozenset((part.server, serial) for part, _, serial in held if part.server),
    )


def _serial_of(part: Generated, version: str) -> int:
    if not version.isdecimal():
        raise InfrastructureError(
            f'{part.url}: it samples from weights of version "{version}", which nobody has proven; load '
            "some first"
        )
    return int(version)
