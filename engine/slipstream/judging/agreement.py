"""Floor 4. How far a judge agrees with the programmatic verifier.

    accuracy  p_o   = share of pairs that agree
    chance    p_e   = sum over success and failure of (share of outcomes) x (share of verdicts)
    kappa           = (p_o - p_e) / (1 - p_e), Cohen's: 1 full agreement, 0 that of chance

Kappa is not defined, and None, where all outcomes and all verdicts are the same one: nothing was told apart.

Source: J. Cohen, "A Coefficient of Agreement for Nominal Scales", Educational and Psychological Measurement
20 (1), 1960, pages 37 to 46.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of pairs (outcome, verdict), each a success or none."""

    count: int
    accuracy: float | None
    """None without pairs."""
    kappa: float | None
    """None where it is not defined."""


def agreement(pairs: Sequence[tuple[bool, bool]]) -> Agreement:
    """Return accuracy and Cohen's kappa of pairs of an outcome and a verdict.

    Example: of 20 both, 5 outcome alone, 10 verdict alone, 15 neither, accuracy is 0.7 and kappa 0.4.
    """
    count = len(pairs)
    if not count:
        return Agreement(count=0, accuracy=None, kappa=None)
    agree = sum(outcome == verdict for outcome, verdict in pairs)
    outcomes = sum(outcome for outcome, _ in pairs)
    verdicts = sum(verdict for _, verdict in pairs)
    # In whole numbers, times count², so that "not defined" is exact.
    chance = outcomes * verdicts + (count - outcomes) * (count - verdicts)
    left = count * count - chance
    kappa = (agree * count - chance) / left if left else None
    return Agreement(count=count, accuracy=agree / count, kappa=kappa)
