"""Our judge and the package's own checker say the same of whole and of damaged replays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("bfcl_eval")
sys.path.insert(0, str(Path(__file__).parent))

import replays

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import environment_factory
from slipstream.environments.bfcl.judge import passed_turns
from slipstream.environments.bfcl.tasks import BfclTasks
from slipstream.types import Split


@pytest.fixture(scope="module")
def tasks() -> BfclTasks:
    made = environment_factory(EnvironmentConfig(name="bfcl"), RewardConfig()).tasks
    assert isinstance(made, BfclTasks)
    return made


@pytest.mark.parametrize("index", range(0, 80, 2))
def test_verdicts_are_the_packages_own(tasks: BfclTasks, index: int) -> None:
    task = tasks.task(Split.HELDOUT, index)
    said = [replays.verdicts(tasks.entry(task), replay, task) for replay in replays.replays(task)]
    assert [ours for ours, _ in said] == [theirs for _, theirs in said]
    assert said[0] == (True, True) and (False, False) in said


def test_the_first_turn_that_fails_ends_the_count(tasks: BfclTasks) -> None:
    task = next(
        task
        for task in (tasks.task(Split.TRAIN, index) for index in range(640))
        if len(task.data["calls"]) > 3 and all(task.data["calls"])
    )
    entry, gold = tasks.entry(task), task.data["calls"]
    assert passed_turns(entry, gold, gold) == len(gold)
    assert passed_turns(entry, gold[:2], gold) == 2
    assert passed_turns(entry, [gold[0], (), *gold[2:]], gold) == 1
    assert passed_turns(entry, [], gold) == 0


def test_a_directory_inside_itself_fails_and_harms_nobody(tasks: BfclTasks) -> None:
    task = next(
        task
        for task in (tasks.task(Split.TRAIN, index) for index in range(640))
        if tasks.entry(task).apis == ("GorillaFileSystem",) and task.data["calls"][0]
    )
    gold = task.data["calls"]
    trap = [("mkdir", {"dir_name": "x"}), ("cp", {"source": "x", "destination": "x"})]
    assert passed_turns(tasks.entry(task), [[*trap, *gold[0]], *gold[1:]], gold) == 0
