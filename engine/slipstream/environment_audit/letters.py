"""Floor 3. A chat format whose tokens are characters: no tokenizer is needed, and no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slipstream.call_formats import HERMES, CallFormat
from slipstream.interfaces import Observation, ToolSpec
from slipstream.types import Int32Array


class Letters:
    """Says everything as it is spelled; stands where `slipstream.chat.Chat` does in training.

    Example: ``Letters().text(Letters().message("hello")) == "hello"``.
    """

    calls: CallFormat = HERMES
    stop_token: int = 0x110000
    """The first number that is no character."""

    def prompt(
        self,
        observation: Observation,
        tools: Sequence[ToolSpec],
        *,
        schemas: bool = False,
        converses: bool = False,
    ) -> Int32Array:
        """Return the [T] characters of the opening."""
        return _encoded(f"{observation.system}\n{observation.user}")

    def message(self, text: str) -> Int32Array:
        """Return the characters of a message of the policy, stop token included."""
        return np.append(_encoded(text), np.int32(self.stop_token))

    def text(self, token_ids: Int32Array) -> str:
        """Return what `message` was given."""
        kept = token_ids[:-1] if len(token_ids) and token_ids[-1] == self.stop_token else token_ids
        return kept.astype("<i4").tobytes().decode("utf-32-le", "surrogatepass")

    def bridge(self, result: str, role: str = "tool") -> Int32Array:
        """Return the characters of an observation."""
        return _encoded(result)


def _encoded(text: str) -> Int32Array:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<i4").astype(np.int32)
