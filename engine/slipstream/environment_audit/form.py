"""Floor 5. What can be judged without playing: the schemas of tools, and the tasks."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing.exceptions import Unresolvable

from slipstream.demonstrations import FIRST_DEMONSTRATION
from slipstream.environment_audit.episode import MOST_SHOWN
from slipstream.environment_audit.stage import Stage
from slipstream.environment_audit.verdicts import Level, Line, Transcript, Verdict, plain
from slipstream.interfaces import ToolSpec
from slipstream.types import Split, Task

LEGAL_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What every server and client of OpenAI's form takes."""
SAMPLE: Final = 256
"""Tasks read of each split."""
FAR: Final = (FIRST_DEMONSTRATION, FIRST_DEMONSTRATION + 1, (1 << 31) - 1)
"""Indices that a run may reach: those of demonstrations, and the last that is counted."""
_ADDRESS: Final = re.compile(r" at 0x[0-9a-f]+")


async def schemas(stage: Stage, until: float) -> Verdict:
    """Can a policy, a parser and a server read what the tools say of themselves?"""
    faults, remarks = list(_schema_faults(stage.tools)), []
    if stage.doubled:
        faults.append("an opening offers two tools of one name")
    remarks += [f"tool {tool.name} has no description" for tool in stage.tools if not _described(tool)]
    if not stage.tools and not stage.converses:
        faults.append("it has no tools, and nobody to talk to")
    level = Level.FAIL if faults else Level.WARN if remarks else Level.PASS
    told = [*faults, *remarks]
    many = "1 tool" if len(stage.tools) == 1 else f"{len(stage.tools)} tools"
    sentence = f"{many} with legal names, valid schemas and descriptions"
    if told:
        sentence = told[0] + (f"; {len(told) - 1} more" if len(told) > 1 else "")
    lines = tuple(Line(who="tools", text=plain(text)) for text in told)
    shown = (Transcript(title="tools", lines=lines, ending=""),) if told else ()
    return Verdict(check="schemas", level=level, sentence=plain(sentence), evidence=shown)


def _described(tool: ToolSpec) -> bool:
    return isinstance(tool.description, str) and bool(tool.description.strip())


def _schema_faults(tools: Sequence[ToolSpec]) -> Iterator[str]:
    for tool in tools:
        if not isinstance(tool.name, str) or not LEGAL_NAME.fullmatch(tool.name):
            yield f"expected a tool's name to be up to 64 of A-Z a-z 0-9 _ -, got {tool.name!r}"
        schema = tool.parameters
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            yield f"tool {tool.name}: parameters are no JSON schema: {error.message}"
            continue
        if not isinstance(schema, Mapping) or schema.get("type") != "object":
            yield f'tool {tool.name}: expected parameters of type "object", got {str(schema)[:80]}'
            continue
        known = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in known:
                yield f"tool {tool.name}: requires {name}, which is none of its properties"
        for name, inner in known.items():
            try:
                Draft202012Validator(inner).is_valid(None)
            except Unresolvable:
                yield f"tool {tool.name}: argument {name} refers beyond itself; write its schema out"


async def tasks(stage: Stage, until: float) -> Verdict:
    """Are tasks the same each time they are asked for, and does no task stand in two splits?"""
    read: dict[Split, list[str]] = {split: [] for split in Split}
    faults: list[str] = []

    async def reading() -> None:
        source, again = stage.factory().tasks, stage.factory(stage.failing, second=True).tasks
        for number in range(SAMPLE):
            if time.monotonic() > until:
                return
            for split in Split:
                task = source.task(split, number)
                read[split].append(spelled(task))
                if number < SAMPLE // 8 and spelled(again.task(split, number)) != read[split][-1]:
                    faults.append(f"{split} task {number} is another each time it is made")
        for split in Split:
            for index in FAR:
                source.task(split, index)

    if fault := await stage.guarded(reading):
        faults.append(f"a task cannot be made: {fault}")
    kinds, examples = {split: set(found) for split, found in read.items()}, list[Line]()
    for one, other in (
        (Split.TRAIN, Split.HELDOUT),
        (Split.TRAIN, Split.FRESH),
        (Split.HELDOUT, Split.FRESH),
    ):
        if shared := kinds[one] & kinds[other]:
            share = len(shared) / max(1, min(len(kinds[one]), len(kinds[other])))
            faults.append(f"{one} and {other} share {len(shared)} tasks ({share:.0%} of the smaller)")
            examples += [Line(who="task", text=text[:MOST_SHOWN]) for text in sorted(shared)[:2]]
    doubled = {split: len(found) - len(kinds[split]) for split, found in read.items()}
    counts = ", ".join(f"{len(found)} in {split}" for split, found in kinds.items())
    level, sentence = (
        Level.PASS,
        f"different ones among the first {len(read[Split.TRAIN])}: {counts}; no split shares one",
    )
    if faults:
        level, sentence = Level.FAIL, faults[0] + (f"; {len(faults) - 1} more faults" if faults[1:] else "")
    elif irregular := [s for s, found in read.items() if doubled[s] > 0.1 * len(found) and not _wraps(found)]:
        level = Level.WARN
        sentence = f"{irregular[0]} poses {doubled[irregular[0]]} of its first {SAMPLE} tasks a second time"
    return Verdict(
        check="tasks",
        level=level,
        sentence=sentence,
        evidence=(Transcript(title="in two splits", lines=tuple(examples), ending=""),) if examples else (),
        early=""
        if len(read[Split.FRESH]) == SAMPLE
        else f"stopped after {len(read[Split.FRESH])} of {SAMPLE} tasks",
    )


def spelled(task: Task) -> str:
    """Return question and data as text that is equal for equal tasks, whatever their place."""
    data = msgspec.json.encode(_plain_keys(task.data), enc_hook=repr, order="deterministic")
    return _ADDRESS.sub("", f"{task.question}\n{data.decode('utf-8', 'replace')}")


def _plain_keys(value: Any) -> Any:
    match value:
        case Mapping():
            return {str(key): _plain_keys(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain_keys(inner) for inner in value]
        case set() | frozenset():
            return sorted(map(str, value))
        case str():
            return plain(value)
        case _:
            return value


def _wraps(found: Sequence[str]) -> bool:
    """Return whether tasks begin again in the same order, as those of a finite set do."""
    again = next((i for i, text in enumerate(found) if i and text == found[0]), 0)
    return bool(again) and all(text == found[i % again] for i, text in enumerate(found))
