"""Floor 4. One episode of τ²: a service agent with a policy to follow, a database, and somebody to serve."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments.tau2.domains import DOMAINS, DONE, Domain, domain_of
from slipstream.environments.tau2.judge import DEFAULT, basis, begun, expected_digest, judged
from slipstream.environments.tau2.user import NOTES, ScriptedUser
from slipstream.environments.tool_episode import Result, ToolEpisode
from slipstream.interfaces import AssistantMessage, Observation, ToolSpec, Transition
from slipstream.types import Score, ScoreKind, Split, Task, TaskAttempt, ToolStatus

SECRET: Final = "criteria"
RULE: Final = "A message to the customer that asks nothing ends the conversation."
SOLO: Final = "Nobody answers you. When you have done all you can, call done."
TRANSFER: Final = "transfer_to_human_agents"
_FIELDS: Final = dict(
    zip(NOTES, ("reason_for_call", "known_info", "unknown_info", "task_instructions"), strict=True)
)


class Tau2Tasks:
    """The base tasks: the package's training split trains, its test split is held out and fresh in turn."""

    def __init__(self, domain: Domain, *, idle: bool = False) -> None:
        """Read all tasks of a domain; `idle` ones, which are done when nothing is, are left out or not."""
        self.domain = domain
        splits, self._tasks = _book(domain.name)
        left_out = frozenset() if idle else _idle(domain.name)
        tests = splits["test"]
        parts = {Split.TRAIN: splits["train"], Split.HELDOUT: tests[::2], Split.FRESH: tests[1::2]}
        self._listed = {
            split: [name for name in names if name not in left_out] for split, names in parts.items()
        }
        self.task = lru_cache(maxsize=1024)(self._task)

    def size(self, split: Split) -> int:
        """Return how many different tasks a split has."""
        return len(self._listed[split])

    def expected(self, task: Task) -> str:
        """Return the digest of the database that the gold actions lead to; worked out once per task."""
        return _expected(self.domain.name, task.data["id"])

    def _task(self, split: Split, index: int) -> Task:
        """Return the task at `index`; behind the last one the first comes again."""
        listed = self._listed[split]
        told = self._tasks[listed[index % len(listed)]]
        instructions = told["user_scenario"]["instructions"]
        notes = {name: instructions.get(field) or "" for name, field in _FIELDS.items()}
        question = told["ticket"] if self.domain.solo else ScriptedUser(notes).opening()
        data = {
            "id": told["id"],
            "notes": notes,
            "start": _start(told),
            SECRET: told["evaluation_criteria"],
        }
        return Task(split=split, index=index, question=question, data=data)


def _start(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    return (told.get("initial_state") or {}).get("initialization_actions") or []


@lru_cache(maxsize=len(DOMAINS))
def _book(domain: str) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    return domain_of(domain).tasks()


@lru_cache(maxsize=1024)
def _expected(domain: str, identifier: str) -> str:
    told = _book(domain)[1][identifier]
    return expected_digest(domain_of(domain), told["evaluation_criteria"], _start(told))


@lru_cache(maxsize=len(DOMAINS))
def _idle(domain: str) -> frozenset[str]:
    """Return the tasks in which the database is to stay as it is, and nothing is to be told."""
    untouched = domain_of(domain).fresh().digest()
    criteria = {name: told["evaluation_criteria"] for name, told in _book(domain)[1].items()}
    silent = [
        name
        for name, told in criteria.items()
        if not told.get("communicate_info") and set(basis(told)) <= set(DEFAULT)
    ]
    return frozenset(name for name in silent if _expected(domain, name) == untouched)


class Tau2Environment(ToolEpisode):
    """One episode."""

    secrets: Collection[str] = (SECRET,)

    def __init__(self, tasks: Tau2Tasks, config: EnvironmentConfig, rewards: RewardConfig) -> None:
        """Set nothing up yet."""
        super().__init__(config, rewards)
        self._tasks, self._domain = tasks, tasks.domain
        self.converses = not self._domain.solo
        self.tools: Sequence[ToolSpec] = [*self._domain.tools, *([DONE] if self._domain.solo else [])]

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Make what is wrong in the task's world wrong."""
        await super().reset(task, attempt)
        self._world = begun(self._domain, task.data["start"])
        self._user = ScriptedUser(task.data["notes"])
        opening = task.question if self._domain.solo else self._user.opening()
        self._calls: list[tuple[str, Mapping[str, Any]]] = []
        self._said: list[str] = []
        self._ended = False
        rule = SOLO if self._domain.solo else RULE
        return Observation(system=f"{self._domain.policy}\n\n{rule}", user=opening)

    async def step(self, message: AssistantMessage) -> Transition:
        """Carry one message out; plain text is for the customer."""
        if not self.converses or message.error or message.arguments is not None:
            return await super().step(message)
        self._turn += 1
        self._said.append(message.text)
        transferred = any(name == TRANSFER for name, _ in self._calls)
        answer = None if transferred else self._user.reply(message.text)
        self._ended = answer is None
        return Transition(
            observation=answer or "", done=self._ended, reward=-self._rewards.step_penalty, role="user"
        )

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Use a tool."""
        return self._used(name, arguments)

    async def score(self) -> Sequence[Score]:
        """Outcome +1 when the episode was ended and every criterion that counts is met, else -1."""
        criteria, expected = self._task.data[SECRET], self._tasks.expected(self._task)
        self._met = judged(criteria, self._world, expected, self._calls, self._said)
        return await super().score()

    def right(self) -> bool:
        """Tell whether the task is done."""
        return self._ended and all(self._met.values())

    def more_scores(self) -> Sequence[Score]:
        """Return the share of criteria that are met."""
        share = sum(self._met.values()) / len(self._met) if self._ended else 0.0
        return [Score(name="criteria", kind=ScoreKind.SHAPING, weight=self._rewards.shaping, value=share)]

    def memory(self) -> dict[str, Any]:
        """Return calls and messages: they lead to the same world again."""
        return {
            "calls": [[name, dict(arguments)] for name, arguments in self._calls],
            "said": list(self._said),
            "read": sorted(self._user.read),
            "ended": self._ended,
        }

    def remember(self, memory: dict[str, Any]) -> None:
        """Make the calls again."""
        for name, arguments in memory["calls"]:
            self._used(name, arguments)
        self._said, self._ended = list(memory["said"]), memory["ended"]
        self._user = ScriptedUser(self._task.data["notes"], memory["read"])

    def _used(self, name: str, arguments: Mapping[str, Any]) -> Result:
        if self._domain.solo and name == DONE.name:
            self._ended = True
            return Result(text="", done=True)
        self._calls.append((name, arguments))
        text, well = self._world.call(name, arguments)
        return Result(text=text, status=ToolStatus.OK if well else ToolStatus.ERROR)
