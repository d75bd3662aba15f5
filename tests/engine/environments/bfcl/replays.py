"""Replays of BFCL tasks, whole and damaged, and what our judge and the package's own checker say of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slipstream.environments.bfcl.judge import passed_turns
from slipstream.environments.bfcl.tasks import SECRET, Entry
from slipstream.types import Task

Call = tuple[str, Mapping[str, Any]]
Turns = list[list[Call]]
NUMBERS = itertools.count()
DAMAGE = ("none", "dropped", "twice", "reversed", "other", "early", "moved", "raising", "silent")


def replays(task: Task) -> Iterator[Turns]:
    """The gold calls of a task, and what comes of each kind of damage to one turn."""
    for kind in DAMAGE:
        yield damaged(kind, task.data[SECRET], random.Random(f"{task.data['id']} {kind}"))


def damaged(kind: str, gold: Sequence[Sequence[Call]], draw: random.Random) -> Turns:
    """Gold calls with one turn damaged."""
    turns = [list(turn) for turn in gold]
    number = draw.choice([number for number, turn in enumerate(turns) if turn])
    turn = turns[number]
    match kind:
        case "dropped":
            turn.pop(draw.randrange(len(turn)))
        case "twice":
            turn.insert(0, turn[0])
        case "reversed":
            turn.reverse()
        case "other":
            place = draw.randrange(len(turn))
            name, arguments = turn[place]
            turn[place] = (name, {key: changed(value) for key, value in arguments.items()})
        case "early" if number:
            turns[number - 1] += turn
        case "moved" if number:
            turns[number - 1] += turn
            turns[number] = []
        case "raising":
            turn.append((turn[0][0], {"nonsense": 1}))
        case "silent":
            turns[number] = []
    return turns


def changed(value: Any) -> Any:
    """Another value of the same type, if that is easily said."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value}x" if isinstance(value, str) else value


def verdicts(entry: Entry, played: Turns, task: Task) -> tuple[bool, bool]:
    """What our judge says, and what the package's checker says of the same calls as text."""
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker

    gold = task.data[SECRET]
    theirs = multi_turn_checker(
        [[[written(call)] for call in turn] for turn in played],
        [[written(call) for call in turn] for turn in gold],
        {"initial_config": entry.setting(), "involved_classes": list(entry.apis), "id": entry.identifier},
        "",
        # The checker keeps its objects under this name for as long as the process lives.
        f"replay_{next(NUMBERS)}",
    )
    return passed_turns(entry, played, gold) == len(gold), bool(theirs["valid"])


def written(call: Call) -> str:
    """A call as the package's data has it."""
    name, arguments = call
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
