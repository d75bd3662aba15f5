"""Floor 4. A scripted customer, who has notes and nothing else.

The tasks of τ² tell a language model how to play the customer. This customer reads what the model is told,
word for word and one note at a time, and makes nothing up:

    opening                                    the reason of the call
    a question about who the customer is       what the customer knows, and does not know
    a question whether to go ahead             yes, within the instructions, which are read the first time
    any other question                         the instructions, then the reason once more
    a message that asks nothing                the customer hangs up

What depends on how the conversation goes ("if the agent asks again, ...") is read out and not acted upon.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

IDENTITY: Final = re.compile(
    r"\b(e-?mail|names?|zip|zip ?code|user ?id|identi\w+|authenticat\w+|verif\w+|who (are|am))\b",
    re.IGNORECASE,
)
CONFIRMATION: Final = re.compile(
    r"\b(yes/no|confirm\w*|proceed|go ahead|continue|agree|is (that|this) (right|correct|ok(ay)?))\b",
    re.IGNORECASE,
)
NOTES: Final = ("reason", "known", "unknown", "instructions")
GREETING: Final = "Hello. All I can do is read you my notes and say yes. They begin: {}"
NO_MORE: Final = "My notes say no more about that."


class ScriptedUser:
    """One customer in one conversation.

    Example: ``ScriptedUser({"reason": "You want a refund."}).reply("May I go ahead?") == "Yes."``.
    """

    def __init__(self, notes: Mapping[str, str], read: Collection[str] = ()) -> None:
        """`notes` by the names in NOTES, those that say something; `read` are those read out already."""
        self._notes = {name: " ".join(text.split()) for name, text in notes.items() if text.strip(" .\n")}
        self.read = set(read)

    def opening(self) -> str:
        """Return the first message."""
        return GREETING.format(self._read("reason") or NO_MORE)

    def reply(self, said: str) -> str | None:
        """Return the answer to a message of the agent, or None: the customer hangs up."""
        if "?" not in said:
            return None
        if IDENTITY.search(said) and not (CONFIRMATION.search(said) and "known" in self.read):
            return " ".join(filter(None, (self._read("known"), self._read("unknown")))) or NO_MORE
        if CONFIRMATION.search(said):
            first = "instructions" not in self.read
            rules = self._read("instructions") if first else ""
            return f"Yes, as far as my notes allow it: {rules}" if rules else "Yes."
        for name in ("instructions", "reason"):
            if (name not in self.read or name == "reason") and (text := self._read(name)):
                return text
        return NO_MORE

    def _read(self, name: str) -> str:
        self.read.add(name)
        return self._notes.get(name, "")
