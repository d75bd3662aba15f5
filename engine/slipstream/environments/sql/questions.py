"""Floor 4. Questions over a shop's database, with answers that are checked by value.

Each answer is worked out from the shop itself, without SQL. A question is asked only where its answer is
one: the first of a ranking leads without a tie, and no answer stands in its own question.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from slipstream.environments.sql.worlds import CATEGORIES, Shop

Answer = str | int | float | tuple[str, ...]
Asked = tuple[dict[str, str], Answer | None]
"""What a question is about, and its answer; None where there is no single one."""
Question = tuple[str, str, dict[str, str], Answer]
"""Its kind, its words, what it is about, and its answer."""
TOP: Final = 3
CENT: Final = 0.01 + 1e-9
"""Tolerance of amounts that were rounded to two decimals."""
TRIES: Final = 64
_NUMBER: Final = re.compile(r"[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]{1,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of question."""

    text: str
    """With a place for each thing it is about."""
    ask: Callable[[Shop, random.Random], Asked]


def _residence(shop: Shop, draw: random.Random) -> Asked:
    person = draw.choice(shop.customers)
    return {"person": person.name}, person.city


def _price(shop: Shop, draw: random.Random) -> Asked:
    product = draw.choice(shop.products)
    return {"product": product.title}, product.price


def _average(shop: Shop, draw: random.Random) -> Asked:
    category = draw.choice(CATEGORIES)
    prices = [product.price for product in shop.products if product.category == category]
    return {"category": category}, round(sum(prices) / len(prices), 2) if len(prices) > 1 else None


def _spent(shop: Shop, draw: random.Random) -> Asked:
    person = draw.choice(shop.customers)
    spent = sum(o.quantity * o.product.price for o in shop.orders if o.customer is person)
    return {"person": person.name}, round(spent, 2) or None


def _sold(shop: Shop, draw: random.Random) -> Asked:
    product, city = draw.choice(shop.products), draw.choice(shop.cities)
    sold = sum(o.quantity for o in shop.orders if o.product is product and o.customer.city == city)
    return {"product": product.title, "city": city}, sold or None


def _favourite(shop: Shop, draw: random.Random) -> Asked:
    person = draw.choice(shop.customers)
    units: Counter[str] = Counter()
    for order in shop.orders:
        if order.customer is person:
            units[order.product.title] += order.quantity
    leading = _leading(units, 1)
    return {"person": person.name}, leading[0] if leading else None


def _top(shop: Shop, draw: random.Random) -> Asked:
    city = draw.choice(shop.cities)
    units: Counter[str] = Counter()
    for order in shop.orders:
        if order.customer.city == city:
            units[order.customer.name] += order.quantity
    return {"city": city}, _leading(units, TOP)


def _leading(units: Counter[str], count: int) -> tuple[str, ...] | None:
    """Return who leads, most first, or None when some are level or too few are there to leave one out."""
    ranked = units.most_common(count + 1)
    if len(ranked) <= count or len({amount for _, amount in ranked}) <= count:
        return None
    return tuple(name for name, _ in ranked[:count])


KINDS: Final[Mapping[str, Kind]] = {
    "residence": Kind(text="Where does {person} live?", ask=_residence),
    "price": Kind(text="What does one {product} cost today?", ask=_price),
    "average": Kind(
        text="What do things for the {category} cost today on average, rounded to two decimals?", ask=_average
    ),
    "spent": Kind(
        text="What is all that {person} has bought worth at today's prices, rounded to two decimals?",
        ask=_spent,
    ),
    "sold": Kind(text="How many units of the {product} have gone to people who live in {city}?", ask=_sold),
    "favourite": Kind(text="Of what has {person} bought the most units?", ask=_favourite),
    "top": Kind(
        text="Who are the three people living in {city} who have bought the most units of all things "
        "together? Name them, most first, separated by commas.",
        ask=_top,
    ),
}


def ask(shop: Shop, kinds: tuple[str, ...], draw: random.Random) -> Question:
    """Return a question that has one answer."""
    for _ in range(TRIES):
        kind = draw.choice(kinds)
        about, answer = KINDS[kind].ask(shop, draw)
        if answer is not None:
            return kind, KINDS[kind].text.format(**about), about, answer
    raise AssertionError(f"no shop answers none of {kinds} in {TRIES} tries")


def equals(given: str, expected: Answer) -> bool:
    """Tell whether a text is this answer: numbers by value, names without regard to case and quotes."""
    match expected:
        case tuple() | list():
            names = [_name(part) for part in re.split(r"[,\n|]", given.strip().strip("[]()"))]
            return names == [_name(name) for name in expected]
        case str():
            return _name(given) == _name(expected)
        case _:
            value = _number(given)
            tolerance = CENT if isinstance(expected, float) else 0.0
            return value is not None and math.isclose(value, expected, rel_tol=0.0, abs_tol=tolerance)


def _name(text: str) -> str:
    return text.strip().strip(".'\"").strip().casefold()


def _number(text: str) -> float | None:
    plain = text.strip().removesuffix(".").replace(",", "").lstrip("$€ ")
    return float(plain) if _NUMBER.fullmatch(plain) else None
