"""Rubrics: from TOML, and what nobody could judge by."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream.errors import ConfigurationError
from slipstream.judging.rubric import Rubric, read_rubric

TOML = """
name = "polite"
criterion = "No insults."

[choices]
fails = 0
partly = 0.5
meets = 1
"""


def test_a_file_holds_a_rubric_with_its_verdicts_in_order(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(TOML)
    rubric = read_rubric(tmp_path / "r.toml")
    assert (rubric.name, rubric.criterion) == ("polite", "No insults.")
    assert list(rubric.choices.items()) == [("fails", 0), ("partly", 0.5), ("meets", 1)]
    assert [rubric.passes(choice) for choice in rubric.choices] == [False, False, True]
    assert rubric.choice(" MEETS\n") == "meets" and rubric.choice("meet") is None


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('name = "polite"', "", "expected the keys name, criterion, choices, got no name"),
        ('name = "polite"', 'names = 1\nname = "p"', "got an unknown key names"),
        ('"polite"', '"a b"', "rubric: name must be letters, digits, _ and -, the first a letter, got 'a b'"),
        ('"No insults."', '" "', "rubric polite: criterion must be text, got ' '"),
        ("partly = 0.5\nmeets = 1", "", "choices must be two verdicts or more, got {'fails': 0}"),
        ("meets = 1", "meets = true", "choices.meets must be a finite number, got True"),
        ("meets = 1", "meets = nan", "choices.meets must be a finite number, got nan"),
        ("meets = 1", "Fails = 1", "two verdicts differ in the case of letters alone"),
        ("partly = 0.5\nmeets = 1", "meets = 0", "all verdicts are worth the same"),
        ("meets = 1", '"a\\nb" = 1', "a verdict must be a line of at most 64 characters, got 'a\\nb'"),
        ("[choices]", "[choices", "expected TOML: "),
    ],
)
def test_a_mistake_names_the_file(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(TOML.replace(old, new))
    with pytest.raises(ConfigurationError) as caught:
        read_rubric(path)
    assert str(path) in str(caught.value) and sentence in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        read_rubric(tmp_path / "none.toml")


def test_values_are_checked_without_a_file_too() -> None:
    with pytest.raises(ConfigurationError, match="the same"):
        Rubric(name="r", criterion="c", choices={"a": 1, "b": 1})
