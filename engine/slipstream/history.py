"""Floor 1. What a line of training consists of, as one short text that both ends compute.

    history_0 = ""        history_n+1 = SHA-256(history_n, identities of batch n), its first 32 digits

A checkpoint holds the history of its step and the hub computes its own from its log: they agree only if the
log holds the very trajectories, in the very order, that made those weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from slipstream.types import TrajectoryId

START: Final = ""
"""The history of no training at all."""


def extend(history: str, identities: Iterable[TrajectoryId]) -> str:
    """Return the history after one more batch."""
    digest = hashlib.sha256(history.encode())
    for identity in identities:
        digest.update(f"\n{identity.run}/{identity.actor}/{identity.epoch}/{identity.seq}".encode())
    return digest.hexdigest()[:32]
