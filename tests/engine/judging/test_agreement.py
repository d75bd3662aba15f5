"""Agreement of outcomes and verdicts, against numbers of the literature."""

from __future__ import annotations

import pytest

from slipstream.judging.agreement import agreement


def pairs(both: int, outcome: int, verdict: int, neither: int) -> list[tuple[bool, bool]]:
    return (
        [(True, True)] * both + [(True, False)] * outcome + [(False, True)] * verdict
        + [(False, False)] * neither
    )  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "accuracy", "kappa"),
    [
        ((20, 5, 10, 15), 0.7, 0.4),
        ((45, 15, 25, 15), 0.6, 0.1304348),
        ((25, 35, 5, 35), 0.6, 0.2592593),
        ((10, 0, 0, 10), 1.0, 1.0),
        ((0, 10, 10, 0), 0.0, -1.0),
        ((5, 5, 5, 5), 0.5, 0.0),
        ((9, 0, 1, 0), 0.9, 0.0),
    ],
)
def test_accuracy_and_kappa(counts: tuple[int, int, int, int], accuracy: float, kappa: float) -> None:
    found = agreement(pairs(*counts))
    assert (found.count, found.accuracy) == (sum(counts), pytest.approx(accuracy))
    assert found.kappa == pytest.approx(kappa, abs=1e-7)


def test_kappa_is_not_defined_where_nothing_is_told_apart() -> None:
    assert (agreement(pairs(7, 0, 0, 0)).accuracy, agreement(pairs(7, 0, 0, 0)).kappa) == (1.0, None)
    assert (agreement([]).accuracy, agreement([]).kappa, agreement([]).count) == (None, None, 0)
