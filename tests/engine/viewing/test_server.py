"""The page over HTTP, and as one file: what it admits, what it refuses, and that hostile text stays data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import HOSTILE, RunMaker, episode, small_run
from starlette.testclient import TestClient

from slipstream import cli
from slipstream.chat import Chat
from slipstream.viewing.assets import HTML, SCRIPTS, STYLES, asset, inert_json
from slipstream.viewing.run import RunView
from slipstream.viewing.server import view_app


@pytest.fixture
def client(tmp_path: Path, chat: Chat) -> TestClient:
    small_run(tmp_path, chat)
    view = RunView(tmp_path)
    view.read_all()
    return TestClient(view_app(view), base_url="http://127.0.0.1:8080")


def test_every_answer_forbids_what_is_not_its_own(client: TestClient) -> None:
    paths = [
        "/",
        f"/{STYLES}",
        *(f"/{name}" for name in SCRIPTS),
        "/api/about",
        "/api/groups",
        "/api/lanes?step=3",
    ]
    for path in paths:
        answer = client.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
    assert client.get("/api/groups").headers["content-type"] == "application/json"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example"])
def test_another_name_for_the_loopback_is_refused(client: TestClient, host: str) -> None:
    """A page of that name, resolved to 127.0.0.1, would otherwise read the run."""
    assert client.get("/api/about", headers={"host": host}).status_code == 400


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/api/groups?outcome=fine", 400, "filter outcome: expected one of"),
        ("/api/groups?nonsense=1", 400, 'unknown filter "nonsense"'),
        ("/api/episode?id=0.1", 404, "000000.log"),
        ("/api/episode?id=../../config.toml", 404, "expected SEGMENT.OFFSET"),
        ("/api/episode", 404, "expected SEGMENT.OFFSET"),
    ],
)
def test_a_mistake_is_a_sentence(client: TestClient, path: str, status: int, sentence: str) -> None:
    answer = client.get(path)
    assert answer.status_code == status and sentence in answer.json()["error"]


def test_only_the_pages_own_files_are_served(client: TestClient) -> None:
    for path in ("/config.toml", "/../config.toml", "/view.html", "/__init__.py", "/trajectories/000000.log"):
        assert client.get(path).status_code == 404


def test_scripts_never_make_markup_of_text() -> None:
    for name in SCRIPTS:
        made = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|parseFromString"
        found = re.findall(made, asset(name))
        assert not found, (name, found)
    assert not re.findall(r"\son\w+=|javascript:|https?://", asset(HTML))
    assert "http" not in asset(STYLES) and "url(" not in asset(STYLES)


def exported(path: Path) -> tuple[str, dict[str, Any]]:
    """Return an exported page and the data in it."""
    page = path.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return page, json.loads(data)


def test_an_exported_page_holds_its_data_as_data(
    tmp_path: Path, chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    small_run(tmp_path / "run", chat)
    target = tmp_path / "out.html"
    assert cli.main(["view", str(tmp_path / "run"), "--export", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}: 5 of 5 episodes\n"
    page, data = exported(target)
    # Two elements of script, the data and the code; what the episodes say opens and closes none.
    assert page.count("<script") == page.count("</script>") == 2
    assert "owned'</script>" not in page and "<!-- " not in page.replace("<!-- U", "")
    hostile = next(e for e in data["episodes"].values() if e["outcome"] == "timed_out")
    assert hostile["note"] == HOSTILE and HOSTILE.split("<|")[0] in "".join(hostile["tokens"]["text"])
    policy = re.search(r'content="(default-src[^"]*)"', page)
    assert policy is not None and "self" not in policy[1] and "unsafe" not in policy[1]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy[1]


def test_json_in_a_page_has_no_sign_of_markup() -> None:
    text = inert_json({"a": HOSTILE, "b": float("nan"), "c": [float("inf"), 1.5]})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a": HOSTILE, "b": None, "c": [None, 1.5]}


def test_export_takes_whole_groups_that_fit(tmp_path: Path, chat: Chat) -> None:
    run = RunMaker(tmp_path / "run", chat)
    for seq in range(12):
        reward = 1.0 if seq in (0, 7) else -1.0
        run.receive(episode(chat, "a?", "b", seq=seq, group=seq // 4, attempt=seq % 4, reward=reward))
    run.close()
    target = str(tmp_path / "out.html")
    command = ["view", str(tmp_path / "run"), "--export", target]
    assert cli.main([*command, "--limit", "11"]) == 0
    assert [row["order"] for row in exported(Path(target))[1]["rows"]] == [8, 9, 10, 11, 4, 5, 6, 7]
    assert cli.main([*command, "--limit", "4", "--filter", "outcome=success", "--filter", "up=1"]) == 0
    _, data = exported(Path(target))
    assert [row["order"] for row in data["rows"]] == [0, 1, 2, 3]
    assert (data["about"]["episodes"], data["about"]["episodes_there"]) == (4, 12)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--limit", "0", "--export", "x.html"], "--limit must be at least 1, got 0"),
        (["--filter", "outcome", "--export", "x.html"], '--filter: expected key=value, got "outcome"'),
        (["--filter", "outcome=fine", "--export", "x.html"], "filter outcome: expected one of"),
        (["--filter", "outcome=success"], "--filter goes with --export"),
        (["--export", "nowhere/at/all.html"], "nowhere/at/all.html cannot be written: No such file"),
        (["--checkpoint", "nowhere", "--export", "x.html"], "nowhere"),
    ],
)
def test_a_users_mistake_is_one_sentence(
    tmp_path: Path, chat: Chat, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    small_run(tmp_path / "run", chat)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["view", "run", *arguments]) == 2
    told = capsys.readouterr().err
    assert sentence in told and told.count("\n") == 1


def test_a_folder_that_is_none_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["view", str(tmp_path / "nowhere"), "--export", "x.html"]) == 2
    assert capsys.readouterr().err.endswith("nowhere is no run folder: it does not exist\n")


def test_an_empty_run_is_exported_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert cli.main(["view", str(tmp_path / "run"), "--export", str(tmp_path / "out.html")]) == 0
    _, data = exported(tmp_path / "out.html")
    assert data["rows"] == [] and len(data["about"]["missing"]) == 4
