"""Floor 4. Questions that only reading answers, made from the passages themselves.

A *clue* is two words that stand side by side in one place of the whole library; the word behind them there is
what they lead to. A question chains clues: what the first leads to is half of the next.

    Find the last word: "terminates the _", then "_ loop _".

Hops list, beside their passage, near misses: passages that hold both words somewhere. Splits share no last
passage. Questions of evaluations have as many near misses as hops or more and end at a word that says
something; those for training are all that the text gives, so that reading is easier to learn than they are.
"""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

from slipstream.environments.deep_research.passages import LISTED, Library, library, words
from slipstream.errors import ConfigurationError
from slipstream.types import Split, Task

MOST_CLUES: Final = 16384
MOST_TASKS: Final = 131072
"""Of all splits together, before the balance."""
MOST_WAYS: Final = 64
"""Clues that may follow one clue in different chains."""
MOST_OF_A_WORD: Final = {Split.TRAIN: 0.02, Split.HELDOUT: 0.01, Split.FRESH: 0.01}
"""Largest share of the questions of a split whose gap one word fills, if there are as many other words.

Of those for training a guess may earn a little more: few questions are learnt by heart, many are read for.
"""
NUMBERS: Final = 89
"""Two-digit numbers that a task gives to the passages its searches list; a prime."""
LEAST_ROUNDS: Final = 2
MOST_ROUNDS: Final = 5
"""What is left out in a round makes the rest fewer, so that a word's share grows: rounds end when that is
at most twice what it should be."""
SHARES: Final = ((60, Split.TRAIN), (80, Split.HELDOUT), (100, Split.FRESH))
"""Up to which percent of the last passages a split has."""
_CLUE: Final = re.compile(r"(?<![\w\"'`*-])(?=([A-Za-z]\w*) ([A-Za-z]\w*) ([A-Za-z]\w*) )")
_ANSWER: Final = re.compile(r"[A-Za-z]\w{3,}")
_COMMON: Final = frozenset(
    [
        "that",
        "this",
        "with",
        "from",
        "which",
        "when",
        "then",
        "than",
        "have",
        "been",
        "will",
        "would",
        "they",
        "them",
        "their",
        "there",
        "these",
        "those",
        "into",
        "such",
        "only",
        "also",
        "does",
        "each",
        "some",
        "more",
        "most",
        "used",
        "using",
        "must",
        "where",
        "while",
        "what",
        "other",
        "another",
        "same",
        "both",
        "either",
        "like",
    ]
)
"""Words too common to be an answer in an evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clue:
    """Two neighbours, and what they lead to.

    Example: ``Clue(first="terminates", second="the", passage=17, leads_to="nearest", listed=2)``.
    """

    first: str
    second: str
    passage: int
    leads_to: str
    listed: int
    """Passages that a search for both lists."""


Chain = tuple[Clue, ...]


class DeepResearchTasks:
    """The questions of one library with so many hops; raises ConfigurationError when there are too few.

    uses: passages that hold each word of a clue, and what it leads to, at least.
    """

    def __init__(self, corpus: str, hops: int, uses: int = 1) -> None:
        self.library: Library = library(corpus)
        self.hops = hops
        self._chains = _split_chains(corpus, hops, uses)
        few = [split for split, chains in self._chains.items() if not chains]
        if few:
            raise ConfigurationError(
                f"environment.options.corpus: {corpus!r} has too little text for questions of {hops} hops "
                f"whose words {uses} passages hold ({few[0]} has none); give more text, fewer hops or "
                "environment.options.uses = 1"
            )
        self.task = lru_cache(maxsize=4096)(self._task)

    def count(self, split: Split) -> int:
        """Return how many different questions a split has; beyond them they come again."""
        return len(self._chains[split])

    def _task(self, split: Split, index: int) -> Task:
        """Return the task at `index`; what searches list is numbered otherwise in each."""
        chains = self._chains[split]
        chain = chains[index % len(chains)]
        draw = random.Random(f"deep research {split} {index}")
        data = {
            "answer": chain[-1].leads_to,
            "passages": [clue.passage for clue in chain],
            "clues": [[chain[0].first, chain[0].second], *([clue.second] for clue in chain[1:])],
            "numbering": [draw.randrange(1, NUMBERS), draw.randrange(NUMBERS)],
        }
        return Task(split=split, index=index, question=question_of(chain), data=data)


def question_of(chain: Chain) -> str:
    """Return what is asked; a gap is filled by one word, the same before and behind a "then"."""
    # A word before a gap keeps its blank, as in a passage: there it is the same token.
    phrases = [f'"{chain[0].first} {chain[0].second} _"', *(f'"_ {clue.second} _"' for clue in chain[1:])]
    return f"Find the last word: {', then '.join(phrases)}."


@lru_cache(maxsize=8)
def _split_chains(corpus: str, hops: int, uses: int) -> Mapping[Split, Sequence[Chain]]:
    shelf = library(corpus)
    clues = _clues(shelf, uses)
    chains: dict[Split, list[Chain]] = {split: [] for split in Split}
    for chain in _chains(clues, hops, shelf):
        chains[_split_of(shelf.passages[chain[-1].passage])].append(chain)
    return {split: _balanced(found, MOST_OF_A_WORD[split]) for split, found in chains.items()}


def _clues(shelf: Library, uses: int) -> list[Clue]:
    """Return clues in an order of their own, each checked with a real search."""
    counts: Counter[tuple[str, str]] = Counter()
    places: defaultdict[str, set[int]] = defaultdict(set)
    for number, text in enumerate(shelf.passages):
        counts.update(pairwise(words(text)))
        for word in words(text):
            places[word].add(number)
    order = list(range(len(shelf.passages)))
    random.Random("deep research clues").shuffle(order)
    found: list[Clue] = []
    for number in order:
        for match in _CLUE.finditer(shelf.passages[number]):
            first, second, after = match.groups()
            holding = [places[word.casefold()] for word in match.groups()]
            if counts[first.casefold(), second.casefold()] != 1:
                continue
            if len(holding[0] & holding[1]) > LISTED or min(map(len, holding)) < uses:
                continue
            listed = shelf.search(f"{first} {second}")
            if number in listed:
                found.append(
                    Clue(first=first, second=second, passage=number, leads_to=after, listed=len(listed))
                )
        if len(found) >= MOST_CLUES:
            break
    return found


def _chains(clues: Sequence[Clue], hops: int, shelf: Library) -> list[Chain]:
    """Return chains of clues over different passages."""
    by_first: defaultdict[str, list[Clue]] = defaultdict(list)
    for clue in clues:
        by_first[clue.first.casefold()].append(clue)
    draw = random.Random("deep research chains")
    chains: list[Chain] = [()]
    for hop in range(hops):
        last = hop == hops - 1
        longer: list[Chain] = []
        for chain in chains:
            known = {clue.passage for clue in chain}
            following = by_first[chain[-1].leads_to.casefold()] if chain else clues
            ways = [clue for clue in following if clue.passage not in known]
            if last:
                ways = [clue for clue in ways if _may_end(chain, clue, shelf)]
            most = min(len(ways), MOST_WAYS) if chain else len(ways)
            longer += [(*chain, clue) for clue in draw.sample(ways, most)]
        draw.shuffle(longer)
        chains = longer[:MOST_TASKS]
    return chains


def _may_end(chain: Chain, clue: Clue, shelf: Library) -> bool:
    """Tell whether a question may end so: the answer is not told, and evaluations are fair."""
    whole, answer = (*chain, clue), clue.leads_to.casefold()
    if answer in words(question_of(whole)):
        return False
    if _split_of(shelf.passages[clue.passage]) is Split.TRAIN:
        return True
    says_something = _ANSWER.fullmatch(answer) is not None and answer not in _COMMON
    return says_something and sum(each.listed - 1 for each in whole) >= len(whole)


def _split_of(passage: str) -> Split:
    place = zlib.crc32(passage.encode()) % 100
    return next(split for share, split in SHARES if place < share)


def _balanced(chains: Sequence[Chain], share: float) -> list[Chain]:
    """Return the chains in an order of their own, without those with a gap that one word fills too often."""
    kept = list(chains)
    for done in range(1, MOST_ROUNDS + 1):
        filled: Counter[tuple[int, str]] = Counter()
        most = max(2, int(share * len(kept)))
        before, kept = kept, []
        for chain in before:
            gaps = [(hop, clue.leads_to.casefold()) for hop, clue in enumerate(chain)]
            if all(filled[gap] < most for gap in gaps):
                filled.update(gaps)
                kept.append(chain)
        if done >= LEAST_ROUNDS and max(filled.values(), default=0) <= 2 * share * len(kept):
            break
    random.Random("deep research order").shuffle(kept)
    return kept
