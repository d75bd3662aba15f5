"""Tables that episodes share: own rows by identifier, and the digest of everything."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import pytest

from slipstream.environments.tau2.overlay import Overlay, SharedTables

Rows = dict[str, dict[str, Any]]


def tables() -> dict[str, Rows]:
    users: Rows = {"zoe": {"paid": 1.5, "orders": ["#2"]}, "ada": {"paid": 0, "orders": []}}
    return {"users": users, "orders": {"#2": {"of": "zoe", "ü": None}}}


def digest_of(everything: Any) -> str:
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()


def test_a_row_that_was_read_is_the_episodes_own() -> None:
    rows = tables()["users"]
    overlay = Overlay(rows, copy.deepcopy)
    assert overlay["zoe"] is overlay["zoe"]
    overlay["zoe"]["orders"].append("#3")
    found = overlay.get("ada")
    assert found is not None
    found["paid"] = 9
    assert rows == tables()["users"]
    assert overlay.own == {"zoe": {"paid": 1.5, "orders": ["#2", "#3"]}, "ada": {"paid": 9, "orders": []}}


def test_going_through_a_table_copies_nothing_and_shows_what_has_changed() -> None:
    rows = tables()["users"]
    overlay = Overlay(rows, copy.deepcopy)
    assert dict(overlay.items()) == rows and list(overlay) == list(rows) and len(overlay) == 2
    assert [row["paid"] for row in overlay.values()] == [1.5, 0]
    assert not overlay.own
    overlay["ada"]["paid"] = 7
    overlay["new"] = {"paid": 3, "orders": []}
    assert {key: row["paid"] for key, row in overlay.items()} == {"zoe": 1.5, "ada": 7, "new": 3}
    assert "new" not in rows and "nobody" not in overlay
    with pytest.raises(KeyError):
        overlay["nobody"]


def test_the_digest_is_that_of_all_rows_as_one_document() -> None:
    shared = SharedTables(tables(), copy.deepcopy, lambda row: row)
    first, second = shared.overlays(), shared.overlays()
    assert shared.digest(first) == digest_of(tables())
    first["users"]["zoe"]["paid"] += 1
    first["users"]["Bob"] = {"paid": 1, "orders": []}
    expected = tables()
    expected["users"]["zoe"]["paid"] = 2.5
    expected["users"]["Bob"] = {"paid": 1, "orders": []}
    assert shared.digest(first) == digest_of(expected)
    assert shared.digest(second) == digest_of(tables())
    assert second["users"]["zoe"]["paid"] == 1.5
