"""Floor 4. An episode as its author sees it: what tools may change, what rewards and monitors read."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from slipstream.errors import ConfigurationError
from slipstream.types import Task, TaskAttempt, ToolStatus

_SCALARS: Final = (str, int, float, bool, type(None))
_DEEPEST: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One tool call that was carried out."""

    name: str
    arguments: Mapping[str, Any]
    status: ToolStatus
    result: str
    """What the policy was shown."""


@dataclass(slots=True, kw_only=True)
class Episode:
    """One episode, so far or in the end.

    Example: ``episode.state["opened"] = [*episode.state.get("opened", []), document]`` in a tool,
    ``episode.answer == episode.task.data["answer"]`` in a reward.
    """

    task: Task
    """For tools without the secrets of `data`, for rewards whole."""
    attempt: TaskAttempt
    messages: list[dict[str, str]] = field(default_factory=list)
    """All messages in OpenAI's form, {"role", "content"}; calls as the policy wrote them."""
    calls: list[Call] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    """The tools' own: plain data (None, booleans, numbers, text, lists, dictionaries with text keys)."""
    answer: Any = None
    """What the policy gave as its answer; None while it gave none."""
    ended: bool = False
    turns: int = 0
    """Messages of the policy."""
    invalid: int = 0
    """Those of them that were no valid call."""

    def end(self, answer: Any = None) -> None:
        """End the episode with the current call; an `answer` that is not None is the policy's."""
        self.ended = True
        if answer is not None:
            self.answer = answer

    @property
    def random(self) -> random.Random:
        """A fresh generator, the same for equal attempts and turns: a tool's only source of chance."""
        a = self.attempt
        return random.Random(
            f"episode {self.task.split} {a.task} {a.seed} {a.group} {a.attempt} {self.turns}"
        )


def plain_copy(value: Any, where: str, _depth: int = 0) -> Any:
    """Return a copy of plain data in which nothing is shared; tuples become lists.

    Raises ConfigurationError naming the place of what is none.
    """
    if isinstance(value, _SCALARS):
        return value
    if _depth < _DEEPEST:
        if isinstance(value, list | tuple):
            return [plain_copy(item, f"{where}[{i}]", _depth + 1) for i, item in enumerate(value)]
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: plain_copy(item, f"{where}[{key!r}]", _depth + 1) for key, item in value.items()}
    raise ConfigurationError(
        f"{where} must be plain data (None, booleans, numbers, text, lists, dictionaries with text keys), "
        f"got {type(value).__name__}"
    )
