"""Episodes as text: a line each, nothing that is not text, no longer than it may be."""

from __future__ import annotations

from slipstream.judging.prompts import transcript


def test_a_message_is_a_line() -> None:
    text = transcript([{"role": "user", "content": "a\nb é"}, {"role": "tool", "content": "\ud800"}])
    assert text == '{"role": "user", "content": "a\\nb é"}\n{"role": "tool", "content": "?"}'


def test_what_is_too_long_loses_its_middle() -> None:
    whole = transcript([{"role": "user", "content": "x" * 100}])
    cut = transcript([{"role": "user", "content": "x" * 100}], most_chars=41)
    left = len(whole) - 41
    assert cut == f"{whole[:20]}\n… {left} characters left out …\n{whole[-21:]}"
    assert transcript([{"role": "user", "content": "x" * 100}], most_chars=len(whole)) == whole
