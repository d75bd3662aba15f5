"""Floor 4. Tasks of one's own: lines of a JSONL file, or what a function returns.

    {"question": "Capital of Norway?", "answer": "Oslo"}                       split by a stable hash
    {"question": "Capital of Norway?", "answer": "Oslo", "split": "heldout"}   where the lines say it

All keys but the question and the split are `Task.data`. Finite sets wrap: index n is row n modulo their
number. No task stands in two splits: by its content the hash sends it to one, and lines that say otherwise
are refused. A line that is no task is one sentence with file and line, or is left out and counted.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

from slipstream import plain_json
from slipstream.authoring.episode import plain_copy
from slipstream.errors import ConfigurationError, SlipstreamError
from slipstream.foreign import Contained
from slipstream.types import Split, Task

Row = dict[str, Any]
Broken = Literal["refuse", "skip"]
Generate = Callable[[Split, int], Mapping[str, Any]]
SPLITS: Final[Mapping[str, Split]] = {
    "train": Split.TRAIN,
    "heldout": Split.HELDOUT,
    "validation": Split.HELDOUT,
    "valid": Split.HELDOUT,
    "dev": Split.HELDOUT,
    "fresh": Split.FRESH,
    "test": Split.FRESH,
}
"""What rows and files call the splits."""
SHARE: Final = 0.1
"""Of rows whose split nobody says, for `heldout` and for `fresh` each."""
_PROBED: Final = 16

log = logging.getLogger(__name__)


class RowTasks:
    """Tasks from a finite number of rows, read when the first one is asked for.

    `rows` yields (place, row, split or None); a place is "tasks.jsonl, line 7". `question` is the key that
    holds the question.
    """

    def __init__(
        self, rows: Callable[[], Iterable[tuple[str, Row, Split | None]]], *, source: str, question: str
    ) -> None:
        self._rows, self._source, self._question = rows, source, question
        self._of: dict[Split, list[bytes]] = {}
        # A group poses one task many times.
        self.task = lru_cache(maxsize=4096)(self._task)

    def check(self) -> None:
        """Read all rows; raises ConfigurationError."""
        if not self._of:
            self._of = self._read()

    def _task(self, split: Split, index: int) -> Task:
        """Return the task at `index` of `split`."""
        self.check()
        rows = self._of[split]
        row = json.loads(rows[index % len(rows)])
        return Task(split=split, index=index, question=row.pop(self._question), data=row)

    def _read(self) -> dict[Split, list[bytes]]:
        found: dict[Split, list[bytes]] = {split: [] for split in Split}
        places: dict[bytes, tuple[Split, str]] = {}
        for place, row, said in self._rows():
            body = json.dumps(row, ensure_ascii=False, sort_keys=True).encode()
            mark = hashlib.sha256(body).digest()
            split = said or _split_of(mark)
            other, first = places.setdefault(mark, (split, place))
            if other is not split:
                raise ConfigurationError(
                    f"{place}: expected each task in one split, got one of {split} that {first} has for "
                    f"{other}; remove one of them"
                )
            found[split].append(body)
        for split, rows in found.items():
            if not rows:
                total = sum(map(len, found.values()))
                raise ConfigurationError(
                    f"{self._source}: no task of the split {split} among {total}; add tasks, or say in each "
                    f'which split it is of ("split": "{split}")'
                )
        return found


def jsonl(path: str | Path, *, question: str = "question", broken: Broken = "refuse") -> RowTasks:
    """Return the tasks of a JSONL file: one object a line, of any keys, the question under `question`.

    broken: "refuse" ends with one sentence at the first line that is no task, "skip" leaves such lines out
    and says how many. Raises ConfigurationError for another value.
    """
    if broken not in ("refuse", "skip"):
        raise ConfigurationError(f'jsonl: broken must be "refuse" or "skip", got {broken!r}')
    file = Path(path)
    return RowTasks(lambda: _lines(file, question, broken), source=str(file), question=question)


def _lines(file: Path, question: str, broken: Broken) -> Iterator[tuple[str, Row, Split | None]]:
    left_out: list[str] = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{file}, line {number}"
                if not line.strip():
                    continue
                try:
                    yield (place, *checked_row(_object(line, place), place, question))
                except ConfigurationError as error:
                    if broken == "refuse":
                        raise
                    left_out.append(str(error))
    except OSError as error:
        raise ConfigurationError(f"tasks: {file} cannot be read: {error.strerror}") from None
    if left_out:
        log.warning("%s: %d lines left out, the first: %s", file, len(left_out), left_out[0])


def _object(line: bytes, place: str) -> Row:
    try:
        row = plain_json.parse(line)
    except ValueError as error:
        raise ConfigurationError(
            f"{place}: expected a JSON object, got a line that is none ({error})"
        ) from None
    if not isinstance(row, dict):
        raise ConfigurationError(f"{place}: expected a JSON object, got {type(row).__name__}")
    return row


def checked_row(row: Mapping[str, Any], place: str, question: str) -> tuple[Row, Split | None]:
    """Return a row as plain data without its split, and the split; raises ConfigurationError."""
    plain: Row = plain_copy(row, place)
    text = plain.get(question)
    if not isinstance(text, str) or not text:
        got = "none" if question not in plain else repr(text)[:80]
        raise ConfigurationError(f'{place}: expected text under "{question}", got {got}')
    said = plain.pop("split", None)
    if said is None:
        return plain, None
    if said not in SPLITS:
        raise ConfigurationError(f"{place}: expected a split of {', '.join(SPLITS)}, got {said!r}")
    return plain, SPLITS[said]


def _split_of(mark: bytes) -> Split:
    """Return the split of a row by its hash: it stays where it is when others are added."""
    share = int.from_bytes(mark[:8], "big") / 2.0**64
    return Split.HELDOUT if share < SHARE else Split.FRESH if share < 2 * SHARE else Split.TRAIN


class GeneratedTasks:
    """Tasks that a function of (split, index) returns, each a dictionary with a "question"."""

    def __init__(self, function: Generate, *, question: str = "question") -> None:
        self._function, self._question = function, question
        self._name = getattr(function, "__name__", "tasks")
        self.task = lru_cache(maxsize=4096)(self._task)

    def check(self) -> None:
        """Make a few tasks of each split, twice; raises ConfigurationError unless the splits alone differ."""
        made = {split: [self._task(split, index) for index in range(_PROBED)] for split in Split}
        for split, tasks in made.items():
            for task in tasks:
                if self._task(split, task.index) != task:
                    raise ConfigurationError(
                        f"tasks: {self._name}({split}, {task.index}) gives another task each time; draw from "
                        'random.Random(f"{split} {index}")'
                    )
        bodies = {split: [(task.question, task.data) for task in tasks] for split, tasks in made.items()}
        for split in (Split.HELDOUT, Split.FRESH):
            if bodies[split] == bodies[Split.TRAIN]:
                raise ConfigurationError(
                    f"tasks: {self._name} gives the tasks of train for {split} too; let them differ by "
                    'split, such as with random.Random(f"{split} {index}")'
                )

    def _task(self, split: Split, index: int) -> Task:
        """Return the task at `index` of `split`."""
        place = f"tasks: {self._name}({split}, {index})"
        row: object = None
        with Contained(SlipstreamError) as ran:
            row = self._function(split, index)
        if ran.error is not None:
            kind = type(ran.error).__name__
            raise ConfigurationError(f"{place} failed with {kind}: {ran.error}") from ran.error
        if not isinstance(row, Mapping):
            raise ConfigurationError(f"{place}: expected a dictionary, got {type(row).__name__}")
        plain, _ = checked_row({**row, "split": split.value}, place, self._question)
        return Task(split=split, index=index, question=plain.pop(self._question), data=plain)


def listed(rows: Sequence[Mapping[str, Any]], *, question: str = "question") -> RowTasks:
    """Return the tasks of a list of dictionaries, as lines of a JSONL file."""

    def read() -> Iterator[tuple[str, Row, Split | None]]:
        for number, row in enumerate(rows):
            place = f"tasks[{number}]"
            yield (place, *checked_row(row, place, question))

    return RowTasks(read, source="tasks", question=question)
