"""Floor 4. Real text as passages: sentences of Python's own documentation, or of a folder, in SQLite FTS5.

    "python-topics"    the topics that `help()` shows; they come with every Python
    "python-help"      these, and the docstrings of the standard library, eight times as many sentences
    PATH               .txt, .rst and .md files of a folder, and WordNet's data files, whose glosses are read

Debian's python3-doc and wordnet-base install such folders.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Final

from slipstream.errors import ConfigurationError
from slipstream.tools.documents import Document, DocumentStore

TOPICS: Final = "python-topics"
HELP: Final = "python-help"
LISTED: Final = 4
"""Most passages that a search lists."""
SHORTEST, LONGEST = 20, 160
"""Characters of a passage."""
MOST_BYTES: Final = 64 << 20
"""A folder of more text is cut, files in the order of their names."""
WORD: Final = re.compile(r"\w+")
_NOT_DOCUMENTED: Final = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages"}
"""Folders of the standard library that hold tests, programs, or what others installed."""
_SUFFIXES: Final = {".txt", ".rst", ".md"}
_WORDNET: Final = re.compile(r"data\.(noun|verb|adj|adv)")
_SENTENCE_END: Final = re.compile(r'(?<=[.!?])\s+(?=[A-Z"*(])')
_UNDERLINE: Final = re.compile(r"\s*([*=\-^~\"'`#+.])\1{2,}\s*")
_NO_PROSE: Final = ("::=", ">>>", "...  ")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Library:
    """Passages, numbered by their place, and a full-text index over them."""

    passages: Sequence[str]
    store: DocumentStore
    digest: str
    """Of all passages: the version of the data."""

    def search(self, query: str) -> list[int]:
        """Return the numbers of the best passages that hold every word of `query`, best first.

        Raises InfrastructureError.
        """
        return [int(identifier) for identifier in self.store.search(query, limit=LISTED)]


@lru_cache(maxsize=4)
def library(corpus: str) -> Library:
    """Return the library of a corpus, read and indexed once per process; raises ConfigurationError."""
    passages = tuple(dict.fromkeys(_sentences(corpus)))
    if not passages:
        raise ConfigurationError(
            f"environment.options.corpus: expected {TOPICS!r}, {HELP!r} or a folder with text "
            f"(.txt, .rst, .md), got {corpus!r}, which holds no sentence"
        )
    documents = (
        Document(identifier=str(number), title=text, body=text) for number, text in enumerate(passages)
    )
    digest = hashlib.sha256("\n".join(passages).encode()).hexdigest()[:16]
    return Library(passages=passages, store=DocumentStore(documents), digest=digest)


def words(text: str) -> list[str]:
    """Return the words of a text in order, in small letters."""
    return [word.casefold() for word in WORD.findall(text)]


def _sentences(corpus: str) -> Iterator[str]:
    """Yield sentences of readable length from paragraphs of prose; headings, grammar, code are left out."""
    for text in _corpus(corpus):
        for paragraph in re.split(r"\n\s*\n", text):
            lines = paragraph.strip("\n").split("\n")
            indent = len(lines[0]) - len(lines[0].lstrip())
            if indent > 3 or any(mark in paragraph for mark in _NO_PROSE):
                continue
            if any(_UNDERLINE.fullmatch(line) for line in lines):
                continue
            prose = " ".join(paragraph.split()).lstrip("* ")
            for sentence in _SENTENCE_END.split(prose):
                whole = sentence[-1:] in ".!?:;" and sentence.isprintable()
                if whole and SHORTEST <= len(sentence) <= LONGEST:
                    yield sentence


def _corpus(corpus: str) -> Iterator[str]:
    if corpus == TOPICS:
        return _topics()
    return chain(_topics(), _docstrings()) if corpus == HELP else _texts(Path(corpus))


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _docstrings() -> Iterator[str]:
    """Yield the docstrings of the standard library, whose files are read and never run, in their order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not _NOT_DOCUMENTED.isdisjoint(path.relative_to(root).parts):
            continue
        with suppress(OSError, SyntaxError, ValueError):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield ast.get_docstring(node) or ""


def _texts(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        raise ConfigurationError(
            f"environment.options.corpus: expected {TOPICS!r}, {HELP!r} or an existing folder, "
            f"got {str(folder)!r}"
        )
    left = MOST_BYTES
    for path in sorted(folder.rglob("*")):
        glosses = _WORDNET.fullmatch(path.name) is not None
        if left <= 0 or not path.is_file() or not (glosses or path.suffix in _SUFFIXES):
            continue
        try:
            text = path.read_text(encoding="utf-8", errors="replace")[:left]
        except OSError as error:
            raise ConfigurationError(
                f"environment.options.corpus: {path} cannot be read: {error.strerror}"
            ) from None
        left -= len(text)
        yield "\n\n".join(_glosses(text)) if glosses else text


def _glosses(text: str) -> Iterator[str]:
    """Yield what WordNet says of each word, without its examples, as sentences."""
    for line in text.splitlines():
        _, bar, gloss = line.partition("|")
        if bar:
            yield f"{gloss.split(';')[0].strip()}."
