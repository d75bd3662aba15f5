"""What is read in a judge's message: tolerant around the object, strict inside it."""

from __future__ import annotations

import json

import pytest

from slipstream.judging.answers import Fault, Unjudged, read_answer
from slipstream.judging.rubric import Rubric

RUBRIC = Rubric(name="r", criterion="c", choices={"fails": 0, "meets fully": 1})
GOOD = '{"reason": "Because.", "verdict": "meets fully"}'
BAD = '{"reason": "Because.", "verdict": "fails"}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Here it is: {GOOD} Thank you.",
        f"A set {{1, 2}} and {{}} and then {GOOD}",
        f"<think>It says {BAD}, so</think>{GOOD}",
        f"{GOOD}\n{GOOD}",
        '{"reason": "Because.", "verdict": " MEETS fully ", "more": {"verdict": "fails"}}',
    ],
)
def test_an_answer_is_found(text: str) -> None:
    found = read_answer(text, RUBRIC)
    assert (found.choice, found.value, found.reason) == ("meets fully", 1.0, "Because.")


def test_a_reason_is_a_line_that_can_be_shown() -> None:
    said = json.dumps({"reason": "a\n\x1b[2J\ud800 é" + "x" * 600, "verdict": "fails"})
    assert read_answer(said, RUBRIC).reason == "a ?[2J? é" + "x" * 491


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", Fault.NONSENSE),
        ("meets fully", Fault.NONSENSE),
        (json.dumps([1, 2]), Fault.NONSENSE),
        (GOOD[:-1], Fault.NONSENSE),
        (f"{BAD} or rather {GOOD}", Fault.NONSENSE),
        (f"{GOOD} {json.dumps({'verdict': 1})}", Fault.NONSENSE),
        ('{"verdict": "meets fully", "reason": "Because."}', Fault.NONSENSE),
        ('{"verdict": "meets fully"}', Fault.NONSENSE),
        ('{"reason": "", "verdict": "meets fully"}', Fault.NONSENSE),
        ('{"reason": "a", "verdict": "fails", "verdict": "meets fully"}', Fault.NONSENSE),
        ('{"reason": "a", "verdict": "meets"}', Fault.CHOICE),
        ('{"reason": "a", "verdict": 1}', Fault.CHOICE),
        ('{"reason": "a", "verdict": null}', Fault.CHOICE),
        (f"{GOOD}{' x' * 16_000}", Fault.NONSENSE),
        ("{" * 16_000, Fault.NONSENSE),
        ('{"a":' * 3_000, Fault.NONSENSE),
        ('{"reason": "a", "verdict": ' + "9" * 5_000 + "}", Fault.NONSENSE),
    ],
)
def test_what_is_no_answer(text: str, fault: Fault) -> None:
    with pytest.raises(Unjudged) as caught:
        read_answer(text, RUBRIC)
    assert caught.value.fault is fault
