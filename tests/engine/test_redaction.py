"""Secrets are cut out wherever they stand, and text without one is left as it is."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import string
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.redaction import MARK, RedactingFilter, Redactor, secret_values

SECRET = 'tr0ub4dor&3/"x"+ü'
KNOWS = Redactor([SECRET, "short"])
# Assembled, so that nobody scanning this file for secrets finds one.
PEM = "-----BEGIN RSA PRIVATE" + " KEY-----\nMIIEow\nIBAAK\n-----END RSA PRIVATE" + " KEY-----"
SHAPED = [
    "AKIA" + "IOSFODNN7EXAMPLE",
    "sk-" + "proj-abcdefghijklmnopqrstuvwx",
    "sk-ant-" + "api03-abcdefghijklmnopqrstuvwx",
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "11AAAAAAA0abcdefghijkl_mnopqr",
    "glpat-" + "abcdefghij0123456789",
    "hf_" + "abcdefghijKLMNOPQRST" + "uvwxyzABCDEFGH",
    "AIza" + "SyA1234567890abcdefghijklmnopqrstu_v",
    "xoxb-" + "123456789012-abcdefghij",
    "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    PEM,
]


@pytest.mark.parametrize("secret", SHAPED)
def test_what_is_shaped_like_a_secret_is_cut_out(secret: str) -> None:
    assert Redactor().text(f"before {secret} after") == f"before {MARK} after"
    assert Redactor().text(secret) == MARK


def test_a_key_block_that_was_cut_off_is_cut_out_to_its_end() -> None:
    assert Redactor().text("x " + PEM[:50]) == f"x {MARK}"


def test_of_urls_and_authorizations_only_the_secret_goes() -> None:
    redact = Redactor().text
    assert redact("postgres://ada:hunter2@db:5432/x") == f"postgres://ada:{MARK}@db:5432/x"
    assert redact("https://example.org:8080/a@b") == "https://example.org:8080/a@b"
    assert redact("Authorization: Bearer " + "abcdefghij0123456789xyz==") == f"Authorization: Bearer {MARK}"


def test_a_known_secret_goes_however_it_is_spelled() -> None:
    raw = SECRET.encode()
    for spelled in (
        SECRET,
        json.dumps(SECRET),
        json.dumps(SECRET, ensure_ascii=False),
        urllib.parse.quote(SECRET, safe=""),
        base64.b64encode(raw).decode(),
        base64.urlsafe_b64encode(raw).decode(),
    ):
        text = KNOWS.text(f"<{spelled}>")
        assert MARK in text and len(text) <= len(f"<{MARK}>") + 2, spelled
    assert KNOWS.text("a short word") == "a short word"


def test_of_two_that_begin_alike_the_longer_goes_whole() -> None:
    redactor = Redactor(["password1", "password1-and-more"])
    assert redactor.text("password1-and-more, password1") == f"{MARK}, {MARK}"


def test_secrets_of_an_environment_are_known_by_their_names() -> None:
    secret = ["OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "PGPASSWORD", "my_secret",
              "GITHUB_TOKEN", "SSH_PASSPHRASE", "AZURE_CREDENTIALS", "SENTRY_DSN", "TOKEN"]  # fmt: skip
    plain = ["PATH", "PWD", "OLDPWD", "HOME", "SSH_AUTH_SOCK", "LANG", "MONKEYS", "TOKENIZERS_PARALLELISM"]
    environ = {name: f"value-of-{name}" for name in (*secret, *plain)}
    assert sorted(secret_values(environ)) == sorted(f"value-of-{name}" for name in secret)
    redactor = Redactor.of_process(["canary-123456"], environ)
    assert redactor.text("canary-123456 value-of-HF_TOKEN value-of-HOME") == f"{MARK} {MARK} value-of-HOME"


def test_plain_data_keeps_its_shape() -> None:
    data = {"a": [1, None, SECRET], SECRET: ("x", {"y": f"<{SECRET}>"}), "n": 1.5}
    assert KNOWS.data(data) == {"a": [1, None, MARK], MARK: ("x", {"y": f"<{MARK}>"}), "n": 1.5}


@given(st.text(alphabet=string.ascii_letters + string.digits + " .,;:/-_=+@<>{}\"'\n", max_size=400))
def test_text_without_a_secret_is_the_very_same_object(text: str) -> None:
    redactor = Redactor(["canary-0123456789"])
    redacted = redactor.text(text)
    assert redacted is text or MARK in redacted


@given(st.text(max_size=60), st.text(max_size=60))
def test_wherever_a_secret_stands_it_goes_and_the_rest_stays(before: str, after: str) -> None:
    canary = "canary-9f8e7d6c5b4a"
    text = Redactor([canary]).text(f"{before}\n{canary}\n{after}")
    assert canary not in text
    if not any(pattern in before + after for pattern in ("://", "-----", "sk-")):
        assert text == f"{before}\n{MARK}\n{after}"


@given(st.sampled_from(SHAPED), st.text(alphabet=" \n.,;", max_size=5))
def test_redacting_twice_is_redacting_once(secret: str, between: str) -> None:
    redactor = Redactor([SECRET])
    once = redactor.text(f"{secret} {between} {SECRET}")
    assert redactor.text(once) == once


EVIL = ["-----BEGIN PRIVATE" + " KEY-----", "-----BEGIN ", "----", "a://", "a://b:", "a://b:@", "eyJ",
        "eyJaaaaaaaaa.", "sk-", "sk-a", "Bearer ", "Bearer a", "xoxb-", "AKIA", "ghp_"]  # fmt: skip


@pytest.mark.parametrize("evil", EVIL)
def test_no_text_takes_long(evil: str) -> None:
    """A quadratic pattern would take minutes here, and the test's own time-out end it."""
    Redactor().text(evil * (2_000_000 // len(evil)))


def test_logs_are_redacted_with_their_exceptions() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    handler.addFilter(RedactingFilter(Redactor(["canary-123456"])))
    log = logging.Logger("test")
    log.addHandler(handler)
    log.warning("opened %s with %d", "canary-123456", 7)
    try:
        raise ValueError("canary-123456 is wrong")
    except ValueError:
        log.exception("failed")
    text = stream.getvalue()
    assert text.startswith(f"WARNING opened {MARK} with 7\nERROR failed\nTraceback")
    assert f"ValueError: {MARK} is wrong" in text and "canary" not in re.sub(r"raise .*\n", "", text)
