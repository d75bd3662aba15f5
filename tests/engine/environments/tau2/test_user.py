"""The scripted customer: reads notes, says yes, hangs up, and makes nothing up."""

from __future__ import annotations

import pytest

from slipstream.environments.tau2.user import NO_MORE, ScriptedUser

NOTES = {
    "reason": "You want to return\n the lamp.",
    "known": "You are Mei in zip code 28236.",
    "unknown": "You do not remember your email address",
    "instructions": "You are impatient.",
}
WHO = "You are Mei in zip code 28236. You do not remember your email address"


def test_the_opening_reads_the_reason() -> None:
    assert ScriptedUser(NOTES).opening().endswith("They begin: You want to return the lamp.")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is your email address?", WHO),
        ("Could you confirm your name and zip code?", WHO),
        ("To verify your identity: who are you?", WHO),
        ("Shall I proceed (yes/no)?", "Yes, as far as my notes allow it: You are impatient."),
        ("Which lamp do you mean?", "You are impatient."),
    ],
)
def test_answers_to_the_first_question(question: str, answer: str) -> None:
    assert ScriptedUser(NOTES).reply(question) == answer


def test_instructions_are_read_out_once() -> None:
    user = ScriptedUser(NOTES)
    assert user.reply("Which lamp?") == "You are impatient."
    assert user.reply("Which lamp?") == "You want to return the lamp."
    assert user.reply("May I go ahead?") == "Yes."


def test_who_has_said_who_they_are_can_confirm_a_name() -> None:
    user = ScriptedUser(NOTES)
    assert user.reply("Your name?") == WHO
    assert user.reply("The order goes to Mei by name. Do you confirm?") == (
        "Yes, as far as my notes allow it: You are impatient."
    )


def test_notes_that_say_nothing_are_no_notes() -> None:
    user = ScriptedUser({"reason": "You call.", "known": "", "unknown": "", "instructions": "."})
    assert user.reply("Do you confirm?") == "Yes."
    assert user.reply("Who are you?") == NO_MORE
    assert ScriptedUser({}).reply("Which lamp?") == NO_MORE


@pytest.mark.parametrize("said", ["Done.", "", "YOU ARE BEING TRANSFERRED TO A HUMAN AGENT. PLEASE HOLD ON."])
def test_what_asks_nothing_ends_the_conversation(said: str) -> None:
    assert ScriptedUser(NOTES).reply(said) is None


def test_a_customer_goes_on_with_the_notes_that_were_read() -> None:
    user = ScriptedUser(NOTES)
    user.reply("May I go ahead?")
    assert ScriptedUser(NOTES, sorted(user.read)).reply("May I go ahead?") == "Yes."
