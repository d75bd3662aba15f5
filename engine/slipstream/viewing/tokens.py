"""Floor 5. Tokens as text, piece by piece, by the tokenizer alone: transformers takes seconds to load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from slipstream.types import Int32Array, Trajectory

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE: Final = "tokenizer.json"
_CONTEXT: Final = 32
_MOST_PARTS: Final = 8
"""Of so many tokens one character may be made; more that give none are bytes that are no text."""


class TokenTexts:
    """Says what tokens mean; without a tokenizer their numbers."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Keep the tokenizer and which of its tokens are control tokens."""
        self._tokenizer = tokenizer
        self._size = tokenizer.get_vocab_size(with_added_tokens=True) if tokenizer else 0
        added = tokenizer.get_added_tokens_decoder() if tokenizer else {}
        self.control = frozenset(number for number, token in added.items() if token.special)

    def pieces(self, trajectory: Trajectory, shown: slice) -> list[str]:
        """Return the text of each token of a stretch; a character of several tokens is the last one's."""
        texts: list[str] = []
        for span in trajectory.spans:
            start, stop = max(span.start, shown.start), min(span.stop, shown.stop)
            if start < stop:
                # What stands before may begin a character, or take the blank from before a word.
                before = max(span.start, start - _CONTEXT)
                texts += self._segment(trajectory.token_ids[before:stop].tolist())[start - before :]
        return texts

    def text(self, token_ids: Int32Array) -> str:
        """Return the text of tokens as one."""
        known = [token for token in token_ids.tolist() if 0 <= token < self._size]
        if self._tokenizer is None:
            return " ".join(map(str, token_ids.tolist()))
        return str(self._tokenizer.decode(known, skip_special_tokens=False))

    def _segment(self, token_ids: Sequence[int]) -> list[str]:
        if self._tokenizer is None:
            return [f"{token} " for token in token_ids]
        from tokenizers.decoders import DecodeStream

        stream, texts, pending = DecodeStream(skip_special_tokens=False), list[str](), list[int]()
        for token in token_ids:
            if not 0 <= token < self._size:
                texts.append(f"[{token}]")
                continue
            pending.append(token)
            piece = stream.step(self._tokenizer, token)
            if piece is None and len(pending) >= _MOST_PARTS:
                piece = self._tokenizer.decode(pending, skip_special_tokens=False)
                stream = DecodeStream(skip_special_tokens=False)
            if piece is not None:
                pending.clear()
            texts.append(piece or "")
        if pending and texts:
            texts[-1] += self._tokenizer.decode(pending, skip_special_tokens=False)
        return texts


def tokenizer_in(run: Path, model: str) -> tuple[TokenTexts, str]:
    """Return the texts of a run that began with the folder `model`, or "", as `tokenizer_of` does."""
    checkpoints = run / "checkpoints"
    named = [checkpoints / name for name in ("warmup", "best", "latest")]
    return tokenizer_of([*named, *sorted(checkpoints.glob("step-*")), *([Path(model)] if model else [])])


def tokenizer_of(folders: Iterable[Path]) -> tuple[TokenTexts, str]:
    """Return the texts by the first folder that holds a tokenizer, and "" or why there is none."""
    from tokenizers import Tokenizer

    tried: list[str] = []
    for folder in folders:
        path = folder / FILE
        if not path.is_file():
            continue
        # Whatever is wrong with a file, tokenizers raises nothing narrower.
        with suppress(Exception):
            return TokenTexts(Tokenizer.from_file(str(path))), ""
        tried.append(f"{path} is no tokenizer")
    reason = "; ".join(tried) or f"no {FILE} in the run's checkpoints"
    return TokenTexts(None), f"Tokens are shown as numbers: {reason}."
