"""The 800 tasks: splits that share no scenario, options, tools that are withheld and given."""

from __future__ import annotations

from itertools import chain

import pytest

pytest.importorskip("bfcl_eval")

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import environment_factory
from slipstream.environments.bfcl.tasks import BfclTasks, split_of
from slipstream.errors import ConfigurationError
from slipstream.types import Split, Task


def tasks(**options: object) -> BfclTasks:
    config = EnvironmentConfig(name="bfcl", options=options)
    made = environment_factory(config, RewardConfig()).tasks
    assert isinstance(made, BfclTasks)
    return made


def every(source: BfclTasks, split: Split) -> list[Task]:
    return [source.task(split, index) for index in range(source.size(split))]


def test_every_task_is_in_one_split_and_scenarios_stay_together() -> None:
    source = tasks()
    found = {split: every(source, split) for split in Split}
    assert {split: len(listed) for split, listed in found.items()} == {
        Split.TRAIN: 640,
        Split.HELDOUT: 80,
        Split.FRESH: 80,
    }
    assert len({task.data["id"] for listed in found.values() for task in listed}) == 800
    numbers = [{source.entry(task).number for task in listed} for listed in found.values()]
    assert not (numbers[0] & numbers[1] or numbers[0] & numbers[2] or numbers[1] & numbers[2])
    domains = {api for task in found[Split.HELDOUT] for api in source.entry(task).apis}
    assert len(domains) == 8


def test_tasks_come_again_and_are_the_same_for_ever() -> None:
    source = tasks()
    first, again = source.task(Split.FRESH, 2), source.task(Split.FRESH, 82)
    assert first.data == again.data and first.question == again.question
    assert [source.task(Split.TRAIN, index).data["id"] for index in range(3)] == GOLDEN
    assert source.task(Split.TRAIN, 7) == tasks().task(Split.TRAIN, 7)


GOLDEN = ["multi_turn_miss_param_140", "multi_turn_base_134", "multi_turn_long_context_40"]


def test_options_choose_tasks() -> None:
    source = tasks(categories=["miss_func"], domains=["TravelAPI", "MessageAPI"], most_turns=5)
    chosen = list(chain.from_iterable(every(source, split) for split in Split))
    entries = [source.entry(task) for task in chosen]
    assert entries and {entry.category for entry in entries} == {"miss_func"}
    assert {api for entry in entries for api in entry.apis} == {"TravelAPI", "MessageAPI"}
    assert max(len(entry.turns) for entry in entries) == 5


def test_options_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"no task of split fresh .* most_turns = 1 "):
        tasks(most_turns=1)
    with pytest.raises(ConfigurationError, match="has no option tool_per_task; did you mean tools_per_task"):
        tasks(tool_per_task=3)
    with pytest.raises(ConfigurationError, match="options: categories must be 'base', "):
        tasks(categories=["missing"])


@pytest.mark.parametrize("most", [0, 1, 8])
def test_tools_that_a_task_needs_are_always_among_its_tools(most: int) -> None:
    source = tasks(tools_per_task=most)
    for task in every(source, Split.HELDOUT):
        entry, given = source.entry(task), task.data["given"]
        known = set(task.data["tools"])
        assert known.isdisjoint(chain.from_iterable(given.values()))
        assert set(entry.withheld) == set(map(int, given))
        for turn, calls in enumerate(task.data["calls"]):
            known |= set(given.get(str(turn), ()))
            assert known.issuperset(name for name, _ in calls), task.data["id"]
        if most:
            needed = {name for calls in task.data["calls"] for name, _ in calls}
            needed |= set(chain.from_iterable(entry.withheld.values()))
            assert len(known) == max(len(needed), min(most, len(source.catalogue.tools_of(entry))))


def test_a_solution_never_needs_a_tool_before_it_is_given() -> None:
    """One of the package's does; there the tool is there from the start."""
    source = tasks(categories=["miss_func"])
    (odd,) = [task for task in every(source, Split.FRESH) if task.data["id"] == "multi_turn_miss_func_49"]
    assert source.entry(odd).withheld == {3: ("wc", "tail", "cat")}
    assert odd.data["given"] == {"3": ("wc", "cat")}
    assert "tail" in odd.data["tools"]


def test_no_tool_is_told_as_bfcl_tells_it() -> None:
    catalogue = tasks().catalogue
    tool = catalogue.tools("MathAPI")["power"]
    assert tool.description == "Raise a number to a power."
    assert tool.parameters["type"] == "object"
    assert tool.parameters["properties"]["base"]["type"] == "number"
    closing = catalogue.tools("TicketAPI")["close_ticket"]
    assert closing.parameters["properties"]["ticket_id"]["type"] == ["integer", "string"]


def test_splits_are_by_the_last_digit() -> None:
    assert [split_of(number) for number in (7, 8, 9, 10, 198, 199)] == [
        Split.TRAIN,
        Split.HELDOUT,
        Split.FRESH,
        Split.TRAIN,
        Split.HELDOUT,
        Split.FRESH,
    ]
