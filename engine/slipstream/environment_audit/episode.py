"""Floor 5. What is seen of an episode, and the environment that shows it."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec

from slipstream.environment_audit.verdicts import Line, Transcript, plain
from slipstream.interfaces import (
    AssistantMessage,
    Conversing,
    Environment,
    Observation,
    ToolSpec,
    Transition,
)
from slipstream.types import Outcome, Score, Split, Task, TaskAttempt, succeeded

MOST_SHOWN: Final = 4000
"""Characters kept of each text; its length and checksum are kept of all."""
MOST_OPENED: Final = 1 << 16
"""Characters kept of an opening, in which answers are looked for."""


@dataclass(slots=True, kw_only=True)
class Move:
    """One message, and what it led to."""

    said: str
    shown: str = ""
    size: int = 0
    """Characters of the whole observation."""
    checksum: int = 0
    role: str = ""
    reward: float = 0.0
    done: bool = False
    status: str = ""
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class Episode:
    """All that was seen of an episode."""

    policy: str
    split: Split
    attempt: TaskAttempt
    task: Task | None = None
    opening: Observation | None = None
    moves: list[Move] = field(default_factory=list)
    scores: Sequence[Score] = ()
    outcome: Outcome | None = None
    """None: it did not get to an end."""
    note: str = ""
    fault: str = ""
    """Why it did not, in words."""
    complaints: list[tuple[str, str]] = field(default_factory=list)
    """(kind, sentence): promises of an environment that were broken in it."""
    tools: dict[str, str] = field(default_factory=dict)
    """What each tool says of itself, by name, as it stood last."""
    other_tools: bool = False
    """Whether tools came or went after the reset."""
    reset_s: float = 0.0
    reward: float | None = None

    @property
    def success(self) -> bool:
        """Whether every outcome score is positive."""
        return self.outcome is not None and succeeded(self.scores)

    @property
    def grounded(self) -> bool:
        """Whether nothing beneath it failed or was late: an episode that this has cut tells nothing of it."""
        return self.outcome not in (Outcome.INFRASTRUCTURE_FAILURE, Outcome.TIMED_OUT)

    @property
    def name(self) -> str:
        """Which episode it is."""
        return f"{self.policy}, {self.split} task {self.attempt.task}, attempt {self.attempt.attempt}"

    def complain(self, kind: str, sentence: str) -> None:
        """Note a broken promise, once."""
        if (kind, sentence) not in self.complaints:
            self.complaints.append((kind, sentence))

    def transcript(self) -> Transcript:
        """Return the episode to be read."""
        lines = []
        if self.opening is not None:
            system, user = plain(self.opening.system[:MOST_SHOWN]), plain(self.opening.user[:MOST_SHOWN])
            lines += [Line(who="system", text=system)] if system else []
            lines.append(Line(who="task", text=user))
        for move in self.moves:
            lines.append(Line(who="policy", text=plain(move.said)))
            if not move.done:
                lines.append(Line(who=move.role or "tool", text=plain(move.shown)))
        return Transcript(title=self.name, lines=tuple(lines), ending=plain(self.ending()))

    def ending(self) -> str:
        """Return how it ended."""
        if self.fault:
            return self.fault
        parts = ", ".join(
            f"{score.name} {'invalid' if score.value is None else f'{score.weight * score.value:+.2f}'}"
            for score in self.scores
        )
        earned = "no reward" if self.reward is None else f"reward {self.reward:+.2f}"
        return f"{self.outcome}, {earned} ({parts})" + (f": {self.note}" if self.note else "")

    def essence(self) -> list[tuple[str, Any]]:
        """Return (what, value) of all that must be the same when it is played again."""
        opened = () if self.opening is None else (self.opening.system, self.opening.user)
        parts: list[tuple[str, Any]] = [("reset", opened), ("tools", self.tools)]
        for number, move in enumerate(self.moves, start=1):
            parts.append((f"message {number}", move.said))
            seen = (move.shown, move.checksum, move.role, move.reward, move.done, move.status)
            parts.append((f"step {number}", seen))
        scores = tuple((s.name, s.kind, s.weight, s.value, s.invalid) for s in self.scores)
        return [*parts, ("score", scores), ("end", (self.outcome, self.fault))]

    def difference(self, other: Episode) -> str:
        """Return what differs first between two episodes, or ""."""
        own, others = self.essence(), other.essence()
        for (what, mine), (_, theirs) in zip(own, others, strict=False):
            if repr(mine) != repr(theirs):
                return what
        return "" if len(own) == len(others) else "end"


class Watched:
    """An environment whose every answer is noted."""

    def __init__(self, inner: Environment, episode: Episode) -> None:
        self._inner, self._episode = inner, episode
        self.tools: Sequence[ToolSpec] = inner.tools
        """As they stand; a reset may choose them."""
        self.converses = isinstance(inner, Conversing) and inner.converses

    @property
    def attempt(self) -> TaskAttempt:
        """The attempt that is watched."""
        return self._episode.attempt

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Reset it."""
        began = time.perf_counter()
        opening = await self._inner.reset(task, attempt)
        episode = self._episode
        episode.reset_s = time.perf_counter() - began
        episode.task, episode.moves, episode.tools = task, [], {}
        texts = (opening.system, opening.user)
        if not all(map(self._is_text, texts, ("the system message", "the task's message"))):
            raise TypeError("an opening that is not text")
        episode.opening = Observation(system=opening.system[:MOST_OPENED], user=opening.user[:MOST_OPENED])
        self._look()
        return opening

    async def step(self, message: AssistantMessage) -> Transition:
        """Step it."""
        move = Move(said=message.text[:MOST_SHOWN])
        self._episode.moves.append(move)
        began = time.perf_counter()
        given = await self._inner.step(message)
        move.seconds = time.perf_counter() - began
        if not self._is_text(given.observation, "an observation"):
            raise TypeError("an observation that is not text")
        move.shown, move.size = given.observation[:MOST_SHOWN], len(given.observation)
        move.checksum = zlib.crc32(given.observation.encode("utf-8", "surrogatepass"))
        move.role, move.done, move.reward = given.role, given.done, given.reward
        move.status = "" if given.call is None else str(given.call.status)
        if given.role not in ("tool", "user"):
            self._episode.complain(
                "type", f'expected an observation to be of "tool" or "user", got {given.role!r}'
            )
        self._look()
        # Whatever is far too long is found by its size; played on it would only slow the audit down.
        return replace(given, observation=given.observation[:MOST_OPENED])

    async def score(self) -> Sequence[Score]:
        """Score it."""
        scores = await self._inner.score()
        self._look()
        return scores

    async def close(self) -> None:
        """Close it, if it has anything to close."""
        close = getattr(self._inner, "close", None)
        if close is not None:
            await close()

    def _is_text(self, value: object, what: str) -> bool:
        if not isinstance(value, str):
            self._episode.complain("type", f"expected {what} to be a string, got {type(value).__name__}")
            return False
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            self._episode.complain("text", f"{what} holds half a character, which no tokenizer takes")
        return True

    def _look(self) -> None:
        """Note the tools; that one comes or goes is told, that one becomes another is a broken promise."""
        self.tools = self._inner.tools
        seen, before = {tool.name: listed(tool) for tool in self._inner.tools}, self._episode.tools
        changed = [name for name, text in seen.items() if before.get(name, text) != text]
        if changed:
            when = f"after {len(self._episode.moves)} messages"
            self._episode.complain("tools", f"tool {changed[0]} became another in mid-run, {when}")
        self._episode.other_tools |= bool(before) and before.keys() != seen.keys()
        self._episode.tools = seen


class WatchedResumable(Watched):
    """The same of a resumable one."""

    @property
    def secrets(self) -> Any:
        """Its secrets."""
        return self._inner.secrets  # type: ignore[attr-defined]

    def state(self) -> dict[str, Any]:
        """Return its state."""
        state: dict[str, Any] = self._inner.state()  # type: ignore[attr-defined]
        return state

    async def restore(self, task: Task, attempt: TaskAttempt, state: dict[str, Any]) -> None:
        """Restore it; what the step to be tried again led to never happened."""
        del self._episode.moves[-1:]
        await self._inner.restore(task, attempt, state)  # type: ignore[attr-defined]


def listed(tool: ToolSpec) -> str:
    """Return a tool as text that is equal for equal ones."""
    return msgspec.json.encode(tool, enc_hook=repr, order="deterministic").decode()
