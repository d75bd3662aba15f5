"""Floor 4. Scripted analysts: they look at the schema, write a query, and answer with what it returns."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from typing import Final

from slipstream.environments.factory import Play
from slipstream.environments.scripted import GaveUp, Habits, insist
from slipstream.environments.sql.questions import TOP
from slipstream.environments.sql.worlds import (
    COLUMN_NAMES,
    CUSTOMERS,
    NEAR_MISS,
    ORDERS,
    PRODUCTS,
    TABLE_NAMES,
)
from slipstream.environments.tool_episode import NO_ANSWER
from slipstream.tools.hermes import format_call
from slipstream.types import Task

_BOUGHT: Final = "FROM {order} JOIN {customer} ON {customer_key} = {customer}.id"
_WITH_PRODUCT: Final = f"{_BOUGHT} JOIN {{product}} ON {{product_key}} = {{product}}.id"
QUERIES: Final[Mapping[str, str]] = {
    "residence": "SELECT {city} FROM {customer} WHERE {person} = '{about_person}'",
    "price": "SELECT {price} FROM {product} WHERE {title} = '{about_product}'",
    "average": "SELECT round(avg({price}), 2) FROM {product} WHERE {category} = '{about_category}'",
    "spent": f"SELECT round(sum({{quantity}} * {{price}}), 2) {_WITH_PRODUCT} "
    "WHERE {person} = '{about_person}'",
    "sold": f"SELECT sum({{quantity}}) {_WITH_PRODUCT} "
    "WHERE {title} = '{about_product}' AND {city} = '{about_city}'",
    "favourite": f"SELECT {{title}} {_WITH_PRODUCT} WHERE {{person}} = '{{about_person}}' "
    "GROUP BY {title} ORDER BY sum({quantity}) DESC LIMIT 1",
    "top": f"SELECT {{person}} {_BOUGHT} WHERE {{city}} = '{{about_city}}' "
    f"GROUP BY {{person}} ORDER BY sum({{quantity}}) DESC LIMIT {TOP}",
}
"""By kind of question, in terms of what tables and columns mean."""
_NAMED: Final = re.compile(r"\{(\w+)\}")


def analyse(task: Task, habits: Habits) -> Play:
    """Play one episode: list the tables, describe those that are needed, query, answer.

    Whoever does not read on takes the first column that looks right, be it the former city.
    """
    try:
        if not habits.acts:
            raise GaveUp
        query = QUERIES[task.data["kind"]]
        meant = yield from _schema(set(_NAMED.findall(query)), habits)
        sql = query.format(**meant, **{f"about_{key}": value for key, value in task.data["about"].items()})
        found = yield from insist(format_call("query", {"sql": sql}), habits)
    except GaveUp:
        yield NO_ANSWER
        return
    yield format_call("answer", {"text": found.replace("\n", ", ")})


def _schema(needed: set[str], habits: Habits) -> Generator[str, str, dict[str, str]]:
    """Look at the tables of a query; return what they and their columns are called, by what they mean."""
    if {"customer_key", "product_key"} & needed:
        needed |= {ORDERS}
    listed = (yield from insist(format_call("tables", {}), habits)).split("\n")
    meant: dict[str, str] = {}
    for about in sorted(needed & {CUSTOMERS, PRODUCTS, ORDERS}):
        table = next((name for name in listed if name in TABLE_NAMES[about]), None)
        if table is None:
            raise GaveUp
        meant[about] = table
    for table in sorted(meant.values()):
        described = yield from insist(format_call("describe", {"table": table}), habits)
        for line in described.split("\n"):
            _understand(line, table, meant, habits, qualified=ORDERS in needed)
    return meant


def _understand(line: str, table: str, meant: dict[str, str], habits: Habits, *, qualified: bool) -> None:
    """Note what a column of a description is for."""
    column = line.split(" ")[0]
    named = f"{table}.{column}" if qualified else column
    for about in (CUSTOMERS, PRODUCTS):
        if line.endswith(f"-> {meant.get(about)}.id"):
            meant[f"{about}_key"] = named
    for meaning, names in COLUMN_NAMES.items():
        fits = {*names} | ({f"{NEAR_MISS.get(meaning, '')}{name}" for name in names} - {*names})
        if column in (names if habits.reads_on() else fits):
            meant.setdefault(meaning, named)
