"""Slip along one line and across rollbacks, and the gate."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream.errors import ProtocolError
from slipstream.staleness import VersionTable, capacity
from slipstream.types import Version


def version(serial: int, incarnation: int, step: int, fork_step: int) -> Version:
    return Version(serial=serial, incarnation=incarnation, step=step, fork_step=fork_step, checksum64=step)


LINE = [version(step, 0, step, 0) for step in range(6)]
# The learner died at step 5 and went on from the checkpoint of step 3, then again from step 2.
FORKED = [*LINE, *(version(6 + n, 1, 3 + n, 3) for n in range(3)), version(9, 2, 2, 2), version(10, 2, 3, 2)]


def test_slip_along_one_line_is_the_difference_of_steps() -> None:
    slips = VersionTable(LINE).slip(5, np.array([5, 3, -1, 0, 3], np.int32))
    assert slips.tolist() == [0, 2, 0, 5, 2]


@pytest.mark.parametrize(
    ("current", "sampled", "slip"),
    [
        (6, 5, 2),  # both from fork step 3: (3 - 3) + (5 - 3)
        (8, 5, 4),  # (5 - 3) + (5 - 3)
        (8, 4, 3),
        (8, 3, 2),  # on the shared past: 5 - 3
        (8, 2, 3),
        (10, 8, 4),  # across the second fork at step 2: (3 - 2) + (5 - 2)
        (10, 5, 4),  # across both forks, the earlier one counts
        (10, 1, 2),
        (9, 9, 0),
    ],
)
def test_slip_across_rollbacks(current: int, sampled: int, slip: int) -> None:
    assert VersionTable(FORKED).slip(current, [sampled]).tolist() == [slip]


def test_a_step_not_yet_published_counts() -> None:
    assert VersionTable(LINE[:3]).slip_at(4, 0, [2]).tolist() == [2]


def test_serials_are_never_reused() -> None:
    table = VersionTable(LINE)
    with pytest.raises(ProtocolError, match="serial 3: expected"):
        table.add(version(3, 0, 4, 0))
    with pytest.raises(ProtocolError, match="serial 77: expected a published serial"):
        table.slip(5, [77])


def test_capacity() -> None:
    assert capacity(accepted=0, running=0, version=0, max_slip=0, batch=16) == 16
    assert capacity(accepted=48, running=20, version=2, max_slip=4, batch=16) == 44
    assert capacity(accepted=48, running=80, version=2, max_slip=4, batch=16) == -16
