"""Floor 4. The words in which tools fail: one place, so that a policy learns to read them once.

    error: REASON        what the policy is shown; one line

What the engine says itself stands here; what a tool refuses (ToolError) is its author's own reason.
"""

from __future__ import annotations

from typing import Final

ERROR: Final = "error: "
"""What every failure shown to the policy begins with."""
LONGEST_ERROR: Final = 200
"""Most characters of a tool's own reason."""

TIMEOUT, UNAVAILABLE, RATE_LIMIT = "timeout", "unavailable", "rate limit"
FAULTS: Final = tuple(f"{ERROR}{reason}" for reason in (TIMEOUT, UNAVAILABLE, RATE_LIMIT))
"""What seeded failures say: the call may succeed when it is made again."""

NO_CALL = "no tool call"
MORE_THAN_ONE = "more than one tool call"
UNKNOWN_TOOL = "unknown tool"
NO_OBJECT = "arguments are not an object"
MISSING = "missing argument {}"
UNKNOWN_ARGUMENT = "unknown argument"
NO_STRING = "argument is not a string"
NO_TEXT = "argument is not valid text"
COMPLAINTS: Final = (f"{ERROR}{NO_CALL}", f"{ERROR}call is not JSON")
"""What every environment says of messages that hold no call."""

CRASHED = "tool crashed"
BROKE_PROTOCOL = "tool broke its protocol"
TOO_MUCH = "tool answered too much"
TOO_LARGE = "tool call too large: {} bytes"
TOO_SLOW = "tool did not answer within {:g} s"


def error(reason: str) -> str:
    """Return a failure as the policy is shown it: one line, its reason at most LONGEST_ERROR characters.

    Example: ``error("no such document")`` is ``"error: no such document"``.
    """
    return f"{ERROR}{' '.join(reason.split())}"[:LONGEST_ERROR]
