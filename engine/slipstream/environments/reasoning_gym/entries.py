"""Floor 4. Datasets of reasoning-gym as tasks of three splits, and scores of answers nobody vouches for.

A block of 64 generated entries gives 8 tasks to each split: an entry belongs to the split that the text of
its question says, so that no question crosses splits however few a dataset has.
"""

from __future__ import annotations

import inspect
import math
import re
from functools import lru_cache
from typing import Any, Final

from slipstream.config_sentences import hint
from slipstream.environments.splits import split_of
from slipstream.errors import ConfigurationError
from slipstream.extras import require
from slipstream.types import Split

BLOCK: Final = 64
TASKS_PER_BLOCK: Final = 8
FAR: Final = 1 << 29
LONGEST_ANSWER: Final = 2000
FUNCTIONS: Final = ["sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "exp", "log", "sqrt"]
_RUN: Final = re.compile(r"\b(eval|exec|parse_expr|sympify)\(\s*\w*answer\b")
_WORD_CALLED: Final = re.compile(r"([A-Za-z_]\w*)\s*\(")
_REACHES: Final = re.compile(
    r"__|\.\s*[A-Za-z_]|\*\*\s*-?\d{3,}|\*\*[^+\-,\]]*\*\*|\b(lambda|for|import|while)\b"
)


class Entries:
    """One dataset: entries by number, for ever and always the same.

    An entry has `question`, `answer` and `metadata`.
    """

    def __init__(self, name: str) -> None:
        """Load the dataset; raises ConfigurationError when the package, or the dataset, is missing."""
        self._gym = _package()
        known = self._gym.factory.DATASETS.keys() - {"composite"}
        if name not in known:
            near = hint(name, sorted(known)) or f"; there are {', '.join(sorted(known))}"
            raise ConfigurationError(
                "environment.name: expected a dataset of reasoning-gym, as in reasoning-gym:chain_sum, got "
                f"{name or 'none'}{near}"
            )
        self.name = name
        self._whole = self._gym.create_dataset(name, size=BLOCK, seed=0)
        self._endless = self._is_endless()
        self._runs_answers = runs_answers(self._whole)
        self._block = lru_cache(maxsize=16)(self._created)
        self.entry = lru_cache(maxsize=4096)(self._entry)

    def number(self, split: Split, index: int) -> int:
        """Return the number of the entry that is the task at `index` of a split."""
        block, place = divmod(index, TASKS_PER_BLOCK)
        numbers = range(block * BLOCK, (block + 1) * BLOCK)
        found: list[int] = []
        for number in numbers:
            if split_of(self.entry(number)["question"]) is split:
                found.append(number)
                if len(found) > place:
                    return number
        if not found:
            raise ConfigurationError(
                f"environment.name: reasoning-gym:{self.name} has too few different questions for three "
                f"splits: none of entries {numbers.start} to {numbers.stop - 1} belongs to {split}; choose "
                "another"
            )
        return found[place % len(found)]

    def score(self, number: int, answer: str) -> float:
        """Return the dataset's own score of an answer, 0 to 1.

        Some scorers run an answer as code, and some raise on what they cannot read: neither helps a policy.
        To those an answer that could call or reach anything is not shown, and what makes a scorer raise that
        can judge its own answer is worth 0. Raises RuntimeError when it cannot.
        """
        if self._runs_answers and not harmless(answer):
            return 0.0
        entry = self.entry(number)
        try:
            return self._judged(answer, entry)
        except RAISED:
            pass
        try:
            self._judged(entry["answer"], entry)
        except RAISED as error:
            raise RuntimeError(f"the scorer raised {type(error).__name__} at its own answer") from error
        return 0.0

    def _judged(self, answer: str, entry: Any) -> float:
        score = float(self._whole.score_answer(answer=answer, entry=entry))
        return min(1.0, max(0.0, score)) if math.isfinite(score) else 0.0

    def _entry(self, number: int) -> dict[str, Any]:
        block, place = divmod(number, BLOCK)
        entry: dict[str, Any] = self._whole[number] if self._endless else self._block(block)[place]
        return entry

    def _created(self, block: int) -> Any:
        return self._gym.create_dataset(self.name, size=BLOCK, seed=block * BLOCK)

    def _is_endless(self) -> bool:
        """Tell whether entries beyond the dataset's size are drawn like those within: making one is dear."""
        try:
            return bool(self._whole[FAR]["question"] != self._whole[FAR + 1]["question"])
        except (IndexError, KeyError):
            return False


RAISED: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What scorers raise at answers they do not expect."""


def runs_answers(dataset: Any) -> bool:
    """Tell whether a dataset's scorer gives the answer to `eval`, or to sympy's parser, which does."""
    return bool(_RUN.search(inspect.getsource(type(dataset).score_answer)))


def harmless(answer: str) -> bool:
    """Tell whether an answer, run as code, could neither call nor reach anything, nor take for ever."""
    if len(answer) > LONGEST_ANSWER or _REACHES.search(answer):
        return False
    return all(name in FUNCTIONS for name in _WORD_CALLED.findall(answer))


def _package() -> Any:
    require("reasoning-gym", "reasoning_gym", by="environment reasoning-gym")
    import reasoning_gym
    import reasoning_gym.factory

    return reasoning_gym
