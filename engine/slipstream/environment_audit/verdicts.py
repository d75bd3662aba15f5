"""Floor 1. What an audit finds, as it goes from the worker to the terminal and the page."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Level(StrEnum):
    """How a check ended."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """Something said in an episode."""

    who: str
    text: str


class Transcript(msgspec.Struct, frozen=True, kw_only=True):
    """An episode to read."""

    title: str
    lines: tuple[Line, ...]
    ending: str


class PolicyRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy earned."""

    policy: str
    episodes: int
    successes: int
    reward: float | None
    """Mean of those that could be judged."""
    endings: dict[str, int]
    """Outcomes, and how many ended so."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One check's answer."""

    check: str
    level: Level
    sentence: str
    early: str = ""
    """Why it could not see all that it wanted to."""
    seconds: float = 0.0
    rows: tuple[PolicyRow, ...] = ()
    evidence: tuple[Transcript, ...] = ()


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why there is nothing to audit."""

    error: str
    exit_code: int


class Begun(msgspec.Struct, frozen=True, kw_only=True):
    """A check that is running."""

    check: str


class Digest(msgspec.Struct, frozen=True, kw_only=True):
    """An episode as another process must play it too."""

    name: str
    transcript: Transcript
    fingerprint: str


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing more comes."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a worker's answer: exactly one member is set."""

    verdict: Verdict | None = None
    refusal: Refusal | None = None
    begun: Begun | None = None
    digest: Digest | None = None
    versions: dict[str, str] | None = None
    """What the environment depends on, as its factory says."""
    done: Done | None = None


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """A whole audit."""

    verdicts: list[Verdict]
    versions: dict[str, str]
    seconds: float

    def count(self, level: Level) -> int:
        """Return how many checks ended so."""
        return sum(verdict.level is level for verdict in self.verdicts)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.count(Level.FAIL)


def plain(text: str) -> str:
    """Return text that UTF-8 takes: halves of characters are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
