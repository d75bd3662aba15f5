"""Floor 4. By what a server is known to speak the run's tokens; the server's workers compute it, too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def vocabulary_digest(vocabulary: Mapping[str, int]) -> str:
    """Return the SHA-256 of all tokens with their ids, in the order of the ids, as hexadecimal digits.

    Example: ``vocabulary_digest(tokenizer.get_vocab())``.
    """
    ordered = sorted((token_id, token) for token, token_id in vocabulary.items())
    return hashlib.sha256(json.dumps(ordered).encode()).hexdigest()
