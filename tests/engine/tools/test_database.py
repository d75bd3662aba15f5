"""A database for those one does not trust: it tells, and nothing else can be had from it."""

from __future__ import annotations

import pytest

from slipstream.errors import ToolError
from slipstream.tools.database import Column, Database, Table

PEOPLE = Table(
    name="people",
    columns=[Column(name="id", type="INTEGER"), Column(name="name", type="TEXT")],
    rows=[(1, "Ada"), (2, None), (3, "Cleo")],
)
HOMES = Table(
    name="homes",
    columns=[
        Column(name="id", type="INTEGER"),
        Column(name="people_id", type="INTEGER", refers_to="people"),
        Column(name="rent", type="REAL"),
    ],
    rows=[(number, 1 + number % 3, number / 8) for number in range(1, 31)],
)


@pytest.fixture
def database() -> Database:
    return Database([PEOPLE, HOMES], max_rows=4, max_chars=60)


def refusal(database: Database, sql: str) -> str:
    with pytest.raises(ToolError) as caught:
        database.query(sql)
    return str(caught.value)


def test_it_tells_its_schema(database: Database) -> None:
    assert database.tables == ("people", "homes")
    assert database.describe("homes") == "id INTEGER\npeople_id INTEGER -> people.id\nrent REAL"
    with pytest.raises(ToolError, match=r"^no such table: flats$"):
        database.describe("flats")


@pytest.mark.parametrize(
    ("sql", "shown"),
    [
        ("SELECT name FROM people WHERE id = 1", "Ada"),
        ("SELECT * FROM people", "1 | Ada\n2 | NULL\n3 | Cleo"),
        ("SELECT name FROM people WHERE id = 9", "no rows"),
        ("SELECT 0.1 + 0.2, x'00ff', 'a' || 'b'", "0.3 | x'00ff' | ab"),
        ("SELECT id FROM homes ORDER BY rent DESC", "30\n29\n28\n27\n[cut at 4 rows]"),
        ("SELECT printf('%.200c', 'x')", "x" * 60 + "\n[cut at 60 characters]"),
        ("SELECT name, sum(rent) FROM homes JOIN people ON people_id = people.id GROUP BY 1 LIMIT 1",
         "NULL | 18.125"),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 4) SELECT sum(i) FROM n",
         "10"),
        ("SELECT name FROM pragma_table_info('people') -- columns", "id\nname"),
        ("SELECT count(*) FROM sqlite_schema", "2"),
        ("", "no rows"),
    ],
)  # fmt: skip
def test_queries(database: Database, sql: str, shown: str) -> None:
    assert database.query(sql) == shown


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELECT age FROM people", "no such column: age"),
        ("SELEC 1", 'near "SELEC": syntax error'),
        ("SELECT 1; SELECT 2", "You can only execute one statement at a time."),
        ("DELETE FROM people", "not authorized"),
        ("UPDATE people SET name = 'x'", "not authorized"),
        ("CREATE TABLE t (i)", "not authorized"),
        ("CREATE TEMP TABLE t (i)", "not authorized"),
        ("DROP TABLE people", "not authorized"),
        ("BEGIN", "not authorized"),
        ("ATTACH '/tmp/x' AS x", "not authorized"),
        ("VACUUM INTO '/tmp/x'", "authorization denied"),
        ("PRAGMA query_only = 0", "not authorized"),
        ("PRAGMA writable_schema = 1", "not authorized"),
        ("SELECT load_extension('x')", "not authorized to use function: load_extension"),
        ("SELECT random()", "not authorized to use function: random"),
        ("SELECT date('now')", "not authorized to use function: date"),
        ("SELECT CURRENT_TIMESTAMP", "not authorized to use function: CURRENT_TIMESTAMP"),
        ("SELECT zeroblob(1000000000)", "string or blob too big"),
        ("SELECT 'a\0b'", "the query contains a null character"),
        (f"SELECT '{'x' * 5000}'", "query string is too large"),
    ],
)
def test_what_is_refused(database: Database, sql: str, said: str) -> None:
    assert refusal(database, sql) == said
    assert database.query("SELECT count(*) FROM people") == "3"


def test_a_query_ends_after_so_many_steps_whatever_the_clock_says(database: Database) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    crossed = "SELECT count(*) FROM homes a, homes b, homes c, homes d, homes e"
    assert [refusal(database, sql) for sql in (endless, crossed)] == ["query takes too long"] * 2
    # Each query has its own steps.
    assert all(database.query("SELECT count(*) FROM homes a, homes b") == "900" for _ in range(200))
