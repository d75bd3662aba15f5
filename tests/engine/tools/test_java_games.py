"""Ways through games: what loops are, and what may not be cut."""

from __future__ import annotations

import pytest

from slipstream.tools.java_games import _without_loops

START = ("look around", "open door to north", "open door to south")
IN_START = ("hall",) * 3


@pytest.mark.parametrize(
    ("path", "rooms", "doors", "left"),
    [
        (("move north", "take coin"), ("hall", "attic"), True, ("move north", "take coin")),
        (
            ("move north", "move south", "move south"),
            ("hall", "attic", "hall", "cellar"),
            True,
            ("move south",),
        ),
        (
            ("move north", "move south", "move north", "move south", "move south", "take coin"),
            ("hall", "attic", "hall", "attic", "hall", "cellar"),
            False,
            ("move south", "take coin"),
        ),
        (
            ("move north", "open door to east", "move south", "move south"),
            ("hall", "attic", "attic", "hall", "cellar"),
            True,
            ("move south",),
        ),
        (
            ("move north", "open door to east", "move south", "move south"),
            ("hall", "attic", "attic", "hall", "cellar"),
            False,
            ("move north", "open door to east", "move south", "move south"),
        ),
        (
            ("move north", "take key", "move south"),
            ("hall", "attic", "attic", "hall"),
            True,
            ("move north", "take key", "move south"),
        ),
    ],
    ids=["straight", "there and back", "twice", "over a door", "a door is kept", "for something"],
)
def test_a_way_that_leads_back_goes_unless_something_was_done_on_it(
    path: tuple[str, ...], rooms: tuple[str, ...], doors: bool, left: tuple[str, ...]
) -> None:
    assert _without_loops((*START, *path), (*IN_START, *rooms), doors=doors) == (*START, *left)


def test_rooms_that_are_not_told_are_no_loop() -> None:
    path = ("move north", "move south")
    assert _without_loops(path, ("", "", ""), doors=True) == path
