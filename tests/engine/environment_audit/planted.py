"""A sound little environment, and the same with one flaw each: what an audit must find, each by one check.

The code of a person is three look-ups away: "Ada" -> "ask Bo" -> "ask Cy" -> "the code is 4711".
"""

from __future__ import annotations

import os
import random
import time
from asyncio import sleep
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory, Script
from slipstream.interfaces import AssistantMessage, Observation, ToolSpec, Transition
from slipstream.tools.hermes import format_call
from slipstream.types import Score, ScoreKind, Split, Task, TaskAttempt, ToolCall, ToolStatus

Factory = Callable[[EnvironmentConfig, RewardConfig], EnvironmentFactory]
SYLLABLES = [
    "ba",
    "be",
    "bi",
    "bo",
    "bu",
    "da",
    "de",
    "di",
    "do",
    "du",
    "fa",
    "fe",
    "fi",
    "fo",
    "fu",
    "ka",
    "ke",
    "ki",
    "ko",
    "ku",
]


def tool(name: str, argument: str, **more: Any) -> ToolSpec:
    schema = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return ToolSpec(name=name, description=f"The tool {name}", parameters={**schema, **more})


class Tasks:
    """Three names and a code for each split and index."""

    def task(self, split: Split, index: int) -> Task:
        draw = random.Random(f"{split} {index}")
        names = tuple("".join(draw.choices(SYLLABLES, k=4)).title() for _ in range(3))
        question = f"What is the code of {names[0]}?"
        return Task(
            split=split,
            index=index,
            question=question,
            data={"names": names, "code": str(draw.randint(10**5, 10**6))},
        )


class Codes:
    """One episode; a look-up fails as often as is configured, by the attempt."""

    tools: Sequence[ToolSpec] = (tool("look_up", "name"), tool("answer", "code"))
    secrets = ("code",)

    def __init__(self, config: EnvironmentConfig, rewards: RewardConfig) -> None:
        self.config, self.rewards = config, rewards
        self.turns, self.calls, self.answer = 0, 0, None

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        self.task, self.attempt = task, attempt
        self.faults = random.Random(self.fault_key())
        return Observation(system="Find the code.", user=task.question)

    def fault_key(self) -> str:
        return repr(self.attempt)

    def code(self) -> str:
        return str(Tasks().task(self.task.split, self.task.index).data["code"])

    def looked_up(self, name: str) -> str:
        names = self.task.data["names"]
        if name not in names:
            return "nobody is called that"
        number = names.index(name)
        return f"ask {names[number + 1]}" if number + 1 < len(names) else f"the code is {self.code()}"

    async def step(self, message: AssistantMessage) -> Transition:
        self.turns += 1
        if message.error or message.arguments is None:
            return Transition(observation=f"error: {message.error}", done=False, reward=-0.1)
        self.calls += 1
        argument = next(iter(message.arguments.values()))
        done, status = message.name == "answer", ToolStatus.OK
        if done:
            self.answer, shown = argument, ""
        elif self.faults.random() < self.config.tool_failure_rate:
            shown, status = "error: try again", ToolStatus.ERROR
        else:
            shown = self.looked_up(argument)
        call = ToolCall(
            turn=self.turns - 1, name=message.name, arguments=message.arguments, status=status, latency_s=0.0
        )
        return Transition(observation=shown, done=done, call=call)

    def right(self) -> bool:
        return self.answer == self.code()

    def value(self) -> float:
        return 1.0 if self.right() else -1.0

    async def score(self) -> Sequence[Score]:
        return (Score(name="outcome", kind=ScoreKind.OUTCOME, weight=1.0, value=self.value()),)

    def state(self) -> dict[str, Any]:
        return {
            "turns": self.turns,
            "calls": self.calls,
            "answer": self.answer,
            "faults": self.faults.getstate(),
        }

    async def restore(self, task: Task, attempt: TaskAttempt, state: dict[str, Any]) -> None:
        await self.reset(task, attempt)
        self.turns, self.calls, self.answer = state["turns"], state["calls"], state["answer"]
        version, words, gauss = state["faults"]
        self.faults.setstate((version, tuple(words), gauss))


def solve(task: Task) -> Generator[str, str, None]:
    name = task.data["names"][0]
    while True:
        shown = yield format_call("look_up", {"name": name})
        if shown.startswith("the code"):
            yield format_call("answer", {"code": task.data["code"]})
        elif shown.startswith("ask "):
            name = shown.split()[-1]


def factory_of(kind: type[Codes], tasks: Any = None, play: Any = solve) -> Factory:
    def made(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
        return EnvironmentFactory(
            tasks=tasks or Tasks(),
            make=lambda: kind(config, rewards),
            scripts={"oracle": Script(play=play, about="knows")} if play else {},
        )

    return made


class IllegalName(Codes):
    tools = (*Codes.tools, tool("look.further", "name"))


class SameInAllSplits(Tasks):
    def task(self, split: Split, index: int) -> Task:
        return replace(super().task(Split.TRAIN, index), split=split)


class Codebook(Codes):
    def code(self) -> str:
        return str(Tasks().task(Split.TRAIN, self.task.index).data["code"])


class TwoCodes(Tasks):
    """One code is right in three tasks of four."""

    def task(self, split: Split, index: int) -> Task:
        task = super().task(split, index)
        return task if index % 4 == 0 else replace(task, data={**task.data, "code": "1234567"})


class TwoCodebooks(Codes):
    def code(self) -> str:
        return str(TwoCodes().task(self.task.split, self.task.index).data["code"])


def solve_some(task: Task) -> Generator[str, str, None]:
    if task.index % 2:
        yield format_call("answer", {"code": "I do not know"})
    yield from solve(task)


class PaysSilence(Codes):
    def right(self) -> bool:
        return super().right() or not self.calls


class PaysNonsense(Codes):
    """As a scorer that compares truth values: whatever is no number counts as "no", and "no" is right."""

    def right(self) -> bool:
        return super().right() or (self.answer is not None and not self.answer.isdigit())


class PaysWordsOfTheQuestion(Codes):
    def right(self) -> bool:
        said = set((self.answer or "").split())
        return super().right() or bool(said and said <= {"What", "is", "the", "code", "of"})


class RaisesAtNul(Codes):
    def looked_up(self, name: str) -> str:
        if "\0" in name:
            raise ValueError("embedded null byte")
        return super().looked_up(name)


class FailsAtLongNames(Codes):
    def looked_up(self, name: str) -> str:
        if len(name) > 100_000:
            raise OSError("name too long")
        return super().looked_up(name)


class UnjudgedAtBraces(Codes):
    async def score(self) -> Sequence[Score]:
        (score,) = await super().score()
        cut = self.answer is None or (self.calls > 1 and self.answer == "zzz")
        return (replace(score, value=None, invalid="parser"),) if cut and self.hostile else (score,)

    hostile = False

    def looked_up(self, name: str) -> str:
        self.hostile = self.hostile or "{" in name
        return super().looked_up(name)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "hostile": self.hostile}

    async def restore(self, task: Task, attempt: TaskAttempt, state: dict[str, Any]) -> None:
        await super().restore(task, attempt, state)
        self.hostile = state["hostile"]


class PaysEndurance(Codes):
    def right(self) -> bool:
        return super().right() or self.calls >= self.config.max_turns


class Unseeded(Codes):
    def looked_up(self, name: str) -> str:
        return f"{super().looked_up(name)}" + random.choice(("", " "))


class HashOrder(Codes):
    def looked_up(self, name: str) -> str:
        found = super().looked_up(name)
        return f"ask ({hash(name) % 997}) {found[4:]}" if found.startswith("ask ") else found


class FaultsByTask(Codes):
    def fault_key(self) -> str:
        return str(self.attempt.task)


class ForgetsTurns(Codes):
    async def restore(self, task: Task, attempt: TaskAttempt, state: dict[str, Any]) -> None:
        await self.reset(task, attempt)
        self.turns, self.calls, self.answer = state["turns"], state["calls"], state["answer"]


class LivingState(Codes):
    def __init__(self, config: EnvironmentConfig, rewards: RewardConfig) -> None:
        super().__init__(config, rewards)
        self.log: list[int] = []

    async def step(self, message: AssistantMessage) -> Transition:
        self.log.append(self.turns)
        return await super().step(message)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "log": self.log}


class SmallGap(Codes):
    def value(self) -> float:
        return 0.05 if self.right() else 0.0


class NotANumber(Codes):
    def value(self) -> float:
        return float("nan") if self.answer is None else super().value()


class Generous(Codes):
    async def score(self) -> Sequence[Score]:
        bonus = Score(name="style", kind=ScoreKind.SHAPING, weight=0.5, value=float(self.right()))
        return (*await super().score(), bonus)


class TellsInTheOpening(Codes):
    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        opening = await super().reset(task, attempt)
        return replace(opening, system=f"Find the code. [id 7, expected: {self.code()}]")


class TellsInATool(Codes):
    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        opening = await super().reset(task, attempt)
        described = replace(self.tools[0], description=f"Looks up, for example {self.code()}")
        self.tools = (described, self.tools[1])
        return opening


class TellsAtFirst(Codes):
    def looked_up(self, name: str) -> str:
        found = super().looked_up(name)
        return f"ask (for {self.code()}) {found[4:]}" if self.calls == 1 and found[:4] == "ask " else found


class Megabytes(Codes):
    def looked_up(self, name: str) -> str:
        found = super().looked_up(name)
        return found * 100_000 if found.startswith("nobody") else found


class Bytes(Codes):
    def looked_up(self, name: str) -> Any:
        found = super().looked_up(name)
        return found.encode() if found.startswith("nobody") else found


class HalfACharacter(Codes):
    def looked_up(self, name: str) -> str:
        return super().looked_up(name).replace("nobody", "nobody\ud800")


class NewTool(Codes):
    async def step(self, message: AssistantMessage) -> Transition:
        if self.turns == 5:
            self.tools = (*self.tools, tool("give_up", "why"))
        return await super().step(message)


class OtherSchema(Codes):
    async def step(self, message: AssistantMessage) -> Transition:
        if self.turns == 5:
            self.tools = (tool("look_up", "name", maxProperties=1), self.tools[1])
        return await super().step(message)


class RaisesWhenCut(Codes):
    async def score(self) -> Sequence[Score]:
        if self.answer is None and self.calls > 5:
            raise KeyError("answer")
        return await super().score()


class BlocksWhenCut(Codes):
    async def score(self) -> Sequence[Score]:
        if self.answer is None and self.calls > 5:
            time.sleep(60)  # noqa: ASYNC251
        return await super().score()


class HangsWhenLookedFor(Codes):
    async def step(self, message: AssistantMessage) -> Transition:
        if self.calls > 5:
            await sleep(60)
        return await super().step(message)


class Aborts(Codes):
    def looked_up(self, name: str) -> str:
        os.abort()


def stuck(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    time.sleep(600)
    raise AssertionError("slept")


class Talks(Codes):
    """The same by talking: plain text is a message to somebody who looks names up, and takes codes."""

    converses = True

    async def step(self, message: AssistantMessage) -> Transition:
        if message.error or message.arguments is not None:
            return await super().step(message)
        self.turns, self.calls = self.turns + 1, self.calls + 1
        if message.text.startswith("It is "):
            self.answer = message.text.removeprefix("It is ")
            return Transition(observation="", done=True, role="user")
        return Transition(observation=self.looked_up(message.text), done=False, role="user")


class PaysTalk(Talks):
    def right(self) -> bool:
        return super().right() or (self.answer is None and self.calls > 0)


def ask(task: Task) -> Generator[str, str, None]:
    shown = yield task.data["names"][0]
    while not shown.startswith("the code"):
        shown = yield shown.split()[-1]
    yield f"It is {task.data['code']}"


class Game(Codes):
    """No call is an answer: the third right name in a row wins."""

    tools = (tool("go", "name"),)

    async def step(self, message: AssistantMessage) -> Transition:
        if message.arguments is None:
            return await super().step(message)
        self.turns, self.calls = self.turns + 1, self.calls + 1
        right = message.arguments["name"] == self.task.data["names"][len(self.answer or "")]
        self.answer = (self.answer or "") + "x" if right else ""
        return Transition(observation="yes" if right else "no", done=len(self.answer) == 3)

    def right(self) -> bool:
        return self.answer == "xxx"


def go(task: Task) -> Generator[str, str, None]:
    for name in task.data["names"]:
        yield format_call("go", {"name": name})


sound = factory_of(Codes)
talks = factory_of(Talks, play=ask)
new_tool = factory_of(NewTool)
game = factory_of(Game, play=go)
no_oracle = factory_of(Codes, play=None)
aborts = factory_of(Aborts)
hash_order = factory_of(HashOrder)
pays_nonsense = factory_of(PaysNonsense)
FLAWS: dict[str, tuple[str, Factory, str]] = {
    "an illegal name": ("schemas", factory_of(IllegalName), "look.further"),
    "one set of tasks": ("tasks", factory_of(Codebook, SameInAllSplits()), "train and heldout share"),
    "an oracle that errs": ("oracle", factory_of(Codes, play=solve_some), "solves 3 of 6 (0.50)"),
    "pays silence": ("do_nothing", factory_of(PaysSilence), "says nothing is paid for nothing: 6 of 6"),
    "pays talk": (
        "do_nothing constants",
        factory_of(PaysTalk, play=ask),
        "says nothing is paid for nothing: 6 of 6",
    ),
    "one usual answer": (
        "constants",
        factory_of(TwoCodebooks, TwoCodes()),
        "guessed: the same answer is right too often: always answer('1234567') earns success 5 of 6",
    ),
    "pays nonsense": (
        "constants",
        pays_nonsense,
        "exploitable: always answer('zzz') earns success 6 of 6 (1.00)",
    ),
    "pays words": ("random", factory_of(PaysWordsOfTheQuestion), "exploitable: random calls earn success"),
    "raises": ("crash", factory_of(RaisesAtNul), "ValueError: embedded null byte (planted.py:"),
    "ground fails": ("crash", factory_of(FailsAtLongNames), "brings the ground down in 1 of"),
    "unjudged": ("crash", factory_of(UnjudgedAtBraces), "without a judgement"),
    "pays endurance": ("slow", factory_of(PaysEndurance), "again and again earns success 6 of 6"),
    "unseeded": ("determinism", factory_of(Unseeded), "differ, the first in its step"),
    "faults by task": ("attempts", factory_of(FaultsByTask), "fail alike in all 8 attempts"),
    "forgets": ("resumable", factory_of(ForgetsTurns), "went another way: its step"),
    "a living state": ("resumable", factory_of(LivingState), "changes with the next step"),
    "small gap": ("rewards", factory_of(SmallGap), "is not beaten by the worst success (+0.05"),
    "not a number": ("rewards", factory_of(NotANumber), "score outcome is 1 x nan"),
    "generous": ("rewards", factory_of(Generous), "shaping earns +0.5, beyond rewards.shaping = 0"),
    "told at once": (
        "leaks",
        factory_of(TellsInTheOpening),
        "the opening gives the answer away in 100% of tasks",
    ),
    "told by a tool": (
        "leaks",
        factory_of(TellsInATool),
        "a tool's description gives the answer away",
    ),
    "told too early": ("leaks", factory_of(TellsAtFirst), "the first observation tells the answer in"),
    "megabytes": ("observations", factory_of(Megabytes), "has 2,100,000 characters"),
    "bytes": ("observations", factory_of(Bytes), "expected an observation to be a string, got bytes"),
    "half a character": ("observations", factory_of(HalfACharacter), "half a character"),
    "another schema": ("observations", factory_of(OtherSchema), "tool look_up became another in mid-run"),
    "raises when cut": ("errors", factory_of(RaisesWhenCut), "KeyError: 'answer' (planted.py:"),
    "blocks when cut": ("errors", factory_of(BlocksWhenCut), "blocked its whole process"),
}
"""Name: the check that must find it (and those that do too), the environment, what its sentence must hold."""
