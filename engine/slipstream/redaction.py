"""Floor 2. Cuts secrets out of text before the policy, a record or a log gets it.

    known     values of this process's environment variables that are named like secrets, and canaries
    shaped    AWS key ids, keys that begin "sk-" or "xox?-", GitHub, GitLab, Hugging Face and Google tokens,
              JSON web tokens, PEM blocks, passwords in URLs, bearer tokens

What is cut out becomes `[redacted]`; of a URL only the password, of an authorization only the token. Text
without a secret is returned as it is, the same object. A known secret is also found as JSON, a URL or
base64 would spell it.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

MARK: Final = "[redacted]"
LEAST_CHARS: Final = 8
"""A shorter value is no secret to look for: it would cut words apart."""
SECRET_NAME: Final = re.compile(
    r"(?:^|_)(?:\w*KEY|\w*TOKEN|\w*SECRETS?|\w*PASSWORD|\w*PASSWD|PWD|PASSPHRASE|CREDENTIALS?|AUTH|DSN)(?:$|_)",
    re.IGNORECASE,
)
"""What environment variables with secrets are called."""
_NOT_SECRET: Final = frozenset({"PWD", "OLDPWD", "SSH_AUTH_SOCK", "XAUTHORITY"})
_PEM_END: Final = r"-----END [A-Z ]{0,30}PRIVATE KEY-----"


def _shape(literal: str, rest: str) -> tuple[str, re.Pattern[str]]:
    """Return what a secret begins with, and its pattern: no part of a longer word.

    The literal comes first, where the engine finds it fast, and what must not stand before it behind it.
    Every repetition is possessive or bounded: no text takes more than linear time.
    """
    return literal, re.compile(rf"(?P<kept>){literal}(?<!\w{literal}){rest}")


_SHAPES: Final = (
    _shape("AKIA", r"[0-9A-Z]{16}\b"),
    _shape("ASIA", r"[0-9A-Z]{16}\b"),
    _shape("sk-", r"[A-Za-z0-9_-]{20,}+"),
    _shape("xox", r"[abeoprs]-[A-Za-z0-9-]{10,}+"),
    *(_shape(f"gh{kind}_", r"[A-Za-z0-9]{36,}+") for kind in "opsur"),
    _shape("github_pat_", r"[A-Za-z0-9_]{22,}+"),
    _shape("glpat-", r"[A-Za-z0-9_-]{20,}+"),
    _shape("hf_", r"[A-Za-z0-9]{30,}+"),
    _shape("AIza", r"[0-9A-Za-z_-]{35,}+"),
    _shape("eyJ", r"[A-Za-z0-9_-]{8,}+\.eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]*+"),
    # A block whose end was cut off is one to the end of the text.
    _shape("-----BEGIN ", rf"[A-Z ]{{0,30}}PRIVATE KEY-----[^-]*+(?:-(?!----END )[^-]*+)*+(?:{_PEM_END})?"),
    ("earer ", re.compile(r"(?P<kept>earer )[A-Za-z0-9._~+/-]{20,}+=*+")),
    ("://", re.compile(r"(?P<kept>://[^\s/:@]{0,256}:)[^\s/@]{1,256}+(?=@)")),
)


class Redactor:
    """Knows this process's secrets.

    Example: ``Redactor(["hunter2hunter2"]).text("the password is hunter2hunter2")``.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        """Look for `known` and for everything that is shaped like a secret; short ones are left out."""
        spelled = {word for secret in known if len(secret) >= LEAST_CHARS for word in _spellings(secret)}
        # Longest first: of two that begin alike the whole of the longer is cut out.
        self._words = tuple(sorted(spelled, key=lambda word: (-len(word), word)))

    @classmethod
    def of_process(cls, canaries: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> Redactor:
        """Return one that knows the secrets of an environment, by the names of its variables."""
        return cls([*canaries, *secret_values(environ)])

    def text(self, text: str) -> str:
        """Return `text` without secrets; the very same object when it holds none."""
        for word in self._words:
            if word in text:
                text = text.replace(word, MARK)
        for literal, pattern in _SHAPES:
            if literal in text:
                text = pattern.sub(_mark, text)
        return text

    def data(self, value: Any) -> Any:
        """Return plain data (as JSON knows it) without secrets in its strings, keys included."""
        match value:
            case str():
                return self.text(value)
            case Mapping():
                return {self.data(key): self.data(item) for key, item in value.items()}
            case list() | tuple():
                return type(value)(self.data(item) for item in value)
            case _:
                return value


class RedactingFilter(logging.Filter):
    """Cuts secrets out of every record of the handler it is added to, its exception included.

    Example: ``for handler in logging.getLogger().handlers: handler.addFilter(RedactingFilter(redactor))``.
    """

    def __init__(self, redactor: Redactor) -> None:
        """Use `redactor` for every record."""
        super().__init__()
        self._redactor = redactor

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact a record; it is always let through."""
        record.msg, record.args = self._redactor.text(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = self._redactor.text(record.exc_text)
        if record.stack_info:
            record.stack_info = self._redactor.text(record.stack_info)
        return True


def guard_logs(redactor: Redactor) -> None:
    """Redact whatever this process logs from now on, by the handlers it has."""
    for handler in (*logging.getLogger().handlers, logging.lastResort):
        if handler is not None:
            handler.addFilter(RedactingFilter(redactor))


def secret_values(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the values of variables that are named like secrets."""
    for name, value in environ.items():
        if name not in _NOT_SECRET and SECRET_NAME.search(name):
            yield value


def _spellings(secret: str) -> Iterator[str]:
    yield secret
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield urllib.parse.quote(secret, safe="")
    data = secret.encode("utf-8", "surrogatepass")
    yield base64.b64encode(data).decode().rstrip("=")
    yield base64.urlsafe_b64encode(data).decode().rstrip("=")


def _mark(found: re.Match[str]) -> str:
    return found["kept"] + MARK
