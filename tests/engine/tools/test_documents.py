"""The document store: queries are data, failures are the infrastructure's."""

from __future__ import annotations

import sqlite3

import pytest

from slipstream.errors import InfrastructureError
from slipstream.tools.documents import Document, DocumentStore

PAGES = (
    Document(identifier="17", title="Ada Kline home", body="Ada Kline lives in Oslo."),
    Document(identifier="18", title="Ada Kline home", body="Ada Kline left Bern."),
    Document(identifier="19", title="Bela Kline home", body="Bela Kline lives in Ulm."),
)


@pytest.fixture
def store() -> DocumentStore:
    return DocumentStore(PAGES)


def test_all_words_must_be_in_the_title(store: DocumentStore) -> None:
    assert sorted(store.search("Ada Kline home")) == ["17", "18"]
    assert sorted(store.search("kline")) == ["17", "18", "19"]
    assert store.search("Kline", limit=2) == store.search("Kline")[:2]
    assert store.search("Ada Oslo") == []


@pytest.mark.parametrize(
    "query",
    [
        "",
        " ",
        '"',
        "Ada OR Bela",
        "NEAR(Ada Kline)",
        "title:Ada",
        "Ada*",
        "'; DROP TABLE titles; --",
        "_",
        "\0",
        "☃",
        "Ada " * 5000,
    ],
)
def test_queries_are_data(store: DocumentStore, query: str) -> None:
    assert store.search(query) in ([], ["17", "18"], ["18", "17"])
    assert len(store.search("Kline")) == 3


def test_documents_by_name(store: DocumentStore) -> None:
    assert store.open("17") == "Ada Kline lives in Oslo."
    assert store.open("16") is None
    assert store.open("' OR 1=1 --") is None


def test_the_store_is_read_only(store: DocumentStore) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store._connection.execute("DELETE FROM pages")


def test_a_broken_database_is_an_infrastructure_error(store: DocumentStore) -> None:
    store._connection.close()
    with pytest.raises(InfrastructureError, match="document store: Cannot operate on a closed database"):
        store.search("Ada")
    with pytest.raises(InfrastructureError, match="document store"):
        store.open("17")
