"""Floor 4. Computations that are a few lines of Python and too long for the head.

Each kind draws its numbers, works its answer out here, and has two snippets for scripted players: one that
is right, and one with the mistake that is usual there. Answers are spread over hundreds of values and more.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from slipstream.environments.splits import first_of
from slipstream.types import Split

Numbers = dict[str, Any]
SLIPS: Final = 0.5
"""Share of questions at which a careless player makes the mistake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of computation."""

    text: str
    """The question, with a place for each number."""
    draw: Callable[[random.Random], Numbers]
    solve: Callable[[Numbers], int | str]
    code: str
    """Prints the answer."""
    careless: str
    """The same with the mistake that is usual."""


def arithmetic(about: Numbers) -> int:
    """Work out `first op second op third`, the first two in brackets where they are."""
    first, second, third = about["first"], about["second"], about["third"]
    match about["shape"]:
        case "({} + {}) * {}":
            return int((first + second) * third)
        case "({} - {}) * {}":
            return int((first - second) * third)
        case _:
            return int(first * (second + third))


def _drawn_arithmetic(draw: random.Random) -> Numbers:
    first, second, third = (draw.randint(11, 99) for _ in range(3))
    shape = draw.choice(("({} + {}) * {}", "({} - {}) * {}", "{} * ({} + {})"))
    expression = shape.format(first, second, third)
    bare = expression.replace("(", "").replace(")", "")
    numbers = {"first": first, "second": second, "third": third}
    return numbers | {"shape": shape, "expression": expression, "bare": bare}


def _primes(about: Numbers) -> int:
    low, high = about["low"], about["high"]
    sieve = bytearray([1]) * (high + 1)
    sieve[:2] = b"\0\0"
    for prime in range(2, int(high**0.5) + 1):
        if sieve[prime]:
            sieve[prime * prime :: prime] = bytes(len(range(prime * prime, high + 1, prime)))
    return sum(number for number in range(low, high + 1) if sieve[number])


def _divisible(about: Numbers) -> int:
    low, high, first, second = about["low"], about["high"], about["first"], about["second"]

    def multiples(of: int) -> int:
        return int(high // of - (low - 1) // of)

    return multiples(first) + multiples(second) - 2 * multiples(first * second)


def _recurrence(about: Numbers) -> int:
    before, last = about["first"], about["second"]
    for _ in range(about["place"] - 2):
        before, last = last, (about["factor"] * last + about["other"] * before) % about["modulus"]
    return int(last)


def _letters(about: Numbers) -> str:
    alphabet = string.ascii_lowercase
    shifted = alphabet[about["shift"] :] + alphabet[: about["shift"]]
    return str(about["word"].translate(str.maketrans(alphabet, shifted))[::-1])


def _in_base(about: Numbers) -> int:
    digits, rest = "", about["number"]
    while rest:
        rest, digit = divmod(rest, about["base"])
        digits = f"{digit}{digits}"
    return int(digits)


KINDS: Final[Mapping[str, Kind]] = {
    "arithmetic": Kind(
        text="What is {expression}?",
        draw=_drawn_arithmetic,
        solve=arithmetic,
        code="{expression}",
        careless="{bare}",
    ),
    "digits": Kind(
        text="What is the sum of the digits of {base} to the power of {power}?",
        draw=lambda draw: {"base": draw.randint(13, 999), "power": draw.randint(100, 999)},
        solve=lambda about: sum(map(int, str(about["base"] ** about["power"]))),
        code="sum(int(digit) for digit in str({base} ** {power}))",
        careless="sum(int(digit) for digit in str({base} * {power}))",
    ),
    "primes": Kind(
        text="What is the sum of all primes from {low} to {high}, both included?",
        draw=lambda draw: {"low": draw.randint(100, 500), "high": draw.randint(600, 1500)},
        solve=_primes,
        code="sum(n for n in range({low}, {high} + 1) if all(n % d for d in range(2, int(n ** 0.5) + 1)))",
        careless="sum(n for n in range({low}, {high} + 1) if all(n % d for d in range(2, 10)))",
    ),
    "divisible": Kind(
        text="How many whole numbers from {low} to {high}, both included, are divisible by {first} or by "
        "{second}, but not by both?",
        draw=lambda draw: {
            "low": draw.randint(100, 999),
            "high": draw.randint(3_000, 9_000),
            "first": draw.choice((7, 11, 13)),
            "second": draw.choice((17, 19, 23)),
        },
        solve=_divisible,
        code="sum((n % {first} == 0) != (n % {second} == 0) for n in range({low}, {high} + 1))",
        careless="sum((n % {first} == 0) or (n % {second} == 0) for n in range({low}, {high} + 1))",
    ),
    "remainder": Kind(
        text="What is the remainder when {base} to the power of {power} is divided by {modulus}?",
        draw=lambda draw: {
            "base": draw.randint(100, 9_999),
            "power": draw.randint(10_000, 999_999),
            "modulus": draw.randint(10_000, 99_999),
        },
        solve=lambda about: pow(about["base"], about["power"], about["modulus"]),
        code="pow({base}, {power}, {modulus})",
        careless="{base} * {power} % {modulus}",
    ),
    "recurrence": Kind(
        text="A sequence begins with {first}, {second}. Each further number is {factor} times the one before "
        "it plus {other} times the one before that, modulo {modulus}. What is number {place} of it?",
        draw=lambda draw: {
            "first": draw.randint(10, 99),
            "second": draw.randint(10, 99),
            "factor": draw.randint(2, 9),
            "other": draw.randint(2, 9),
            "modulus": draw.randint(10_000, 99_999),
            "place": draw.randint(50, 500),
        },
        solve=_recurrence,
        code="a, b = {first}, {second}\nfor _ in range({place} - 2):\n"
        "    a, b = b, ({factor} * b + {other} * a) % {modulus}\nb",
        careless="a, b = {first}, {second}\nfor _ in range({place}):\n"
        "    a, b = b, ({factor} * b + {other} * a) % {modulus}\nb",
    ),
    "weighted": Kind(
        text="Order {numbers} from small to large and add up each number times its place, counted from 1. "
        "What comes out?",
        draw=lambda draw: {"numbers": ", ".join(map(str, draw.sample(range(100, 1000), 9)))},
        solve=lambda about: sum(
            place * number
            for place, number in enumerate(sorted(map(int, about["numbers"].split(", "))), start=1)
        ),
        code="sum(i * n for i, n in enumerate(sorted([{numbers}]), 1))",
        careless="sum(i * n for i, n in enumerate(sorted([{numbers}])))",
    ),
    "letters": Kind(
        text="Move each letter of {word} {shift} places on in the alphabet, where a follows z, then write "
        "the word backwards. What is it?",
        draw=lambda draw: {
            "word": "".join(draw.choices(string.ascii_lowercase, k=9)), "shift": draw.randint(3, 20),
        },
        solve=_letters,
        code="''.join(chr((ord(c) - 97 + {shift}) % 26 + 97) for c in '{word}')[::-1]",
        careless="''.join(chr((ord(c) - 97 + {shift}) % 26 + 97) for c in '{word}')",
    ),
    "base": Kind(
        text="How is {number} written in base {base}?",
        draw=lambda draw: {"number": draw.randint(10_000, 999_999), "base": draw.randint(3, 8)},
        solve=_in_base,
        code="n, digits = {number}, ''\nwhile n:\n    n, digit = divmod(n, {base})\n"
        "    digits = str(digit) + digits\ndigits",
        careless="n, digits = {number}, ''\nwhile n:\n    n, digit = divmod(n, {base})\n"
        "    digits = digits + str(digit)\ndigits",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Puzzle:
    """The answer of a question, and the snippets of the scripted players."""

    answer: int | str
    code: str
    careless: str


def pose(split: Split, index: int, kinds: tuple[str, ...]) -> tuple[str, Puzzle]:
    """Return the question at `index` of a split; equal arguments give equal questions."""

    def drawn() -> Iterator[tuple[str, Puzzle]]:
        for attempt in count():
            draw = random.Random(f"puzzle {split} {index} {attempt}")
            kind = KINDS[draw.choice(kinds)]
            about = kind.draw(draw)
            answer, text = kind.solve(about), kind.text.format(**about)
            if str(answer) not in text:
                slips = draw.random() < SLIPS
                careless = kind.careless if slips else kind.code
                yield (
                    text,
                    Puzzle(answer=answer, code=kind.code.format(**about), careless=careless.format(**about)),
                )

    found = first_of(split, drawn())
    assert found is not None, "drawn without end"
    return found
