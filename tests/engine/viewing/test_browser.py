"""The page in a real browser: it is drawn, it is steered, and hostile text does nothing in it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chromium import ANSWER_S, Chromium, browser
from made_runs import RunMaker, call, episode, small_run

from slipstream import cli
from slipstream.chat import Chat
from slipstream.viewing.filters import ORDERS

pytestmark = pytest.mark.skipif(browser() is None, reason="needs a Chromium (Debian's package chromium)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, chat: Chat) -> Path:
    """A run, and its export beside it."""
    folder = tmp_path_factory.mktemp("view")
    small_run(folder / "run", chat)
    assert cli.main(["view", str(folder / "run"), "--export", str(folder / "out.html")]) == 0
    return folder


@contextmanager
def serving(run: Path) -> Iterator[str]:
    """The command on a run: the address at which it serves."""
    command = [sys.executable, "-m", "slipstream", "view", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split(" at ")[1].split()[0]
        finally:
            process.terminate()
            assert process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[str]:
    """The address of the run."""
    with serving(folder / "run") as address:
        yield address


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(params=["served", "exported"])
def address(request: pytest.FixtureRequest, folder: Path, served: str) -> str:
    """The page both ways."""
    return served if request.param == "served" else f"file://{folder / 'out.html'}"


def shown(page: Chromium, address: str, place: str, element: str) -> None:
    """Open a deep link and wait for an element; nothing fails, is refused, or comes from elsewhere."""
    page.open("about:blank")
    page.events.clear()
    page.open(f"{address}#/{place}")
    page.until(f"document.querySelector({element!r})")
    assert page.complaints() == []
    origin = address.split("/out.html")[0]
    assert [url for url in page.requests() if not url.startswith((origin, "about:", "data:"))] == []


FILTERED = (
    {}, {"kind": "train"}, {"kind": "evaluation"}, {"outcome": "success"}, {"outcome": "failure"},
    {"outcome": "truncated"}, {"fate": "trained"}, {"tool": "search"}, {"tool": "none"}, {"status": "error"},
    {"low": "0.2"}, {"high": "0"}, {"low": "-0.5", "high": "0.5"}, {"step": "1"}, {"serial": "0"},
    {"serial": "1", "kind": "evaluation"}, {"text": "oslo"},
    *({"sort": sort, "up": up} for sort in ORDERS for up in ("0", "1")),
)  # fmt: skip
"""Filters and orders, each kind of them."""


def test_a_file_filters_and_sorts_as_a_server_does(chromium: Chromium, served: str, folder: Path) -> None:
    """The rules stand in filters.py and in source.js: these are the cases on which both must agree."""
    asked = f"""Promise.all({json.dumps(FILTERED)}.map(async (given) => {{
      let told;
      do told = await source.groups(given); while (told.search && !told.search.over);
      return [told.total, told.episodes, told.groups.map((rows) => rows.map((row) => [row.id, row.fits]))];
    }}))"""
    answers = []
    for address in (served, f"file://{folder / 'out.html'}"):
        shown(chromium, address, "groups", ".group")
        answers.append(chromium.value(asked))
    for given, by_server, by_file in zip(FILTERED, *answers, strict=True):
        assert by_server == by_file, given
    assert len({repr(answer) for answer in answers[0]}) > 8, "the cases tell rules from each other"


def texts(page: Chromium, selector: str) -> list[str]:
    return [str(t) for t in page.value(f"[...document.querySelectorAll({selector!r})].map(n => n.innerText)")]


def test_groups_are_filtered_by_address_and_by_hand(chromium: Chromium, address: str) -> None:
    shown(chromium, address, "groups", ".group")
    assert [text.split("\n")[0] for text in texts(chromium, ".meta")] == ["task 7", "group 1", "group 0"]
    assert [text.split("\n")[0] for text in texts(chromium, ".cell")] == [
        "+1.00", "+0.50", "\u2013", "+1.00", "\u22121.00",
    ]  # fmt: skip
    shown(chromium, address, "groups?outcome=success&kind=train&sort=reward", ".group")
    assert texts(chromium, ".list-head b") == ["2 episodes"]
    assert chromium.value("document.querySelectorAll('.cell.unfit').length") == 2
    tool = "[...document.querySelectorAll('.rail label')].find(l => l.innerText.startsWith('Tool'))"
    for value in ("search", "answer"):
        chosen = f"s.value = {value!r}; s.dispatchEvent(new Event('change'))"
        chromium.value(f"(s => {{ {chosen} }})({tool}.querySelector('select'))")
        chromium.until(f"location.hash.includes('tool={value}')")
        assert chromium.value("location.hash").startswith("#/groups?outcome=success&kind=train")
        chromium.until("document.querySelectorAll('.cell:not(.unfit)').length === 1")
    chromium.value("[...document.querySelectorAll('button')].find(b => b.innerText === 'Clear all').click()")
    chromium.until("document.querySelectorAll('.group').length === 3")
    shown(chromium, address, "groups?text=oslo", ".group")
    assert len(texts(chromium, ".group")) == 1
    shown(chromium, address, "groups?low=5", ".empty")
    assert "No episode fits these filters." in texts(chromium, ".empty")[0]


def test_the_keyboard_goes_everywhere(chromium: Chromium, address: str) -> None:
    shown(chromium, address, "groups", ".group")
    for key in "jjl":
        chromium.key(key)
    assert chromium.value("document.activeElement.innerText").startswith("\u22121.00")
    chromium.key("Enter")
    chromium.until("document.querySelector('.message')")
    assert "attempt 1" in texts(chromium, ".episode-head")[0]
    chromium.key("[")
    chromium.until("document.querySelector('.episode-head').innerText.includes('attempt 0')")
    chromium.key("3")
    chromium.until("location.hash.endsWith('overlay=logprob')")
    chromium.key("]")
    chromium.until("document.querySelector('.episode-head').innerText.includes('attempt 1')")
    # The overlay stays from one episode to the next.
    assert chromium.value("document.querySelector('[aria-pressed=true]').innerText") == "Log-prob"
    chromium.key("Escape")
    chromium.until("document.querySelector('.group')")
    chromium.key("s")
    chromium.until("document.querySelector('.lanes')")
    chromium.key("?")
    chromium.until("document.getElementById('help').open")
    assert chromium.complaints() == []


def test_an_episode_is_read(chromium: Chromium, address: str) -> None:
    shown(chromium, address, "groups?tool=search", ".group")
    chromium.value("document.querySelector('.cell:not(.unfit)').click()")
    chromium.until("document.querySelector('.message')")
    assert [text.split("\n")[0] for text in texts(chromium, ".who")] == ["prompt", "policy", "tool", "policy"]
    said = texts(chromium, ".said")
    assert said[0] == "<|user|>Where does Ada live?<|end|><|assistant|>" and said[3] == "Oslo<|end|>"
    assert [text.split() for text in texts(chromium, ".call summary")] == [
        ["ok", "search", "{", '"query":', '"Ada"', "}", "500", "ms"],
        ["ok", "answer", "{", '"text":', '"Oslo"', "}", "500", "ms", "cached"],
    ]
    assert texts(chromium, ".big") == ["+1.00"] and "trained in step 3" in texts(chromium, ".verdict")[0]
    chromium.key("4")
    chromium.until("document.querySelector('[aria-pressed=true]').innerText === 'Version'")
    assert texts(chromium, ".overlays .legend") == ["serial 0: slip 2"]
    tinted = "[...document.querySelectorAll('.policy [data-i]')].filter(n => n.style.backgroundColor).length"
    assert (
        chromium.value(tinted) == chromium.value("document.querySelectorAll('.policy [data-i]').length") > 0
    )
    chromium.point(".policy [data-i]")
    chromium.until("!document.getElementById('tip').hidden")
    tip = texts(chromium, "#tip")[0]
    assert "-0.2500, p = 0.779" in tip and "weights of step 0" in tip and "slip\n2" in tip
    chromium.key("5")
    assert "--checkpoint DIR" in texts(chromium, ".overlays")[0]
    assert chromium.complaints() == []


def test_what_is_beside_the_reward_is_not_part_of_it(chromium: Chromium, address: str) -> None:
    shown(chromium, address, "groups?kind=evaluation", ".group")
    chromium.value("document.querySelector('.cell').click()")
    chromium.until("document.querySelector('.message')")
    reward, besides = texts(chromium, ".side table")
    assert reward.split() == ["answer", "outcome", "1", "\u00d7", "1", "+1.00", "reward", "+1.00"]
    assert besides.split() == [
        "pages",
        "metric",
        "7",
        "loops",
        "monitor",
        "fired",
        "the",
        "same",
        "call",
        "thrice",
    ]


def test_lanes_are_drawn_to_scale(chromium: Chromium, address: str) -> None:
    shown(chromium, address, "lanes?step=3", ".lanes")
    drawn = "[...document.querySelector('.lane').querySelectorAll('.KIND')]"
    widths = {
        kind: chromium.value(drawn.replace("KIND", kind) + ".map(r => Number(r.getAttribute('width')))")
        for kind in ("generate", "tools", "queue", "training")
    }
    # 0.75 s and 0.5 s of generation; 0.5 s and 0.1 s of tools; queued from 2 s to 7 s, trained to 10 s.
    unit = widths["training"][0] / 3.0
    assert [round(width / unit, 2) for width in widths["generate"]] == [0.75, 0.5]
    assert [round(width / unit, 2) for width in widths["tools"]] == [0.5, 0.1]
    assert [round(width / unit, 2) for width in widths["queue"]] == [5.0]
    assert chromium.value("document.querySelector('.lane-slip').textContent") == "slip 2"
    assert "generate 1.25 s each" in texts(chromium, ".sums")[0]


def test_hostile_text_is_shown_and_does_nothing(chromium: Chromium, address: str) -> None:
    shown(chromium, address, "groups?outcome=timed_out", ".group")
    chromium.value("document.querySelector('.cell:not(.unfit)').click()")
    chromium.until("document.querySelector('.message')")
    for key in "12345":
        chromium.key(key)
    chromium.point(".policy [data-i]", 3)
    title = chromium.value("document.title")
    assert title.endswith("slipstream view") and "owned" not in title
    assert (
        chromium.value("document.querySelectorAll('main script, main img, #tip script, #tip img').length")
        == 0
    )
    prompt = texts(chromium, ".said")[0]
    assert "<script>document.title = 'owned'</script>" in prompt
    # What cannot be seen, or turns text around, is spelled out; a spelled control token is ordinary text.
    for code in ("U+202E", "U+2066", "U+200B", "U+2028", "U+001B"):
        assert code in prompt
    assert "\u202e" not in chromium.value("document.querySelector('main').textContent")
    assert texts(chromium, ".note")[0].startswith("<script>")
    assert chromium.complaints() == []


def test_dark_and_light_differ_and_both_can_be_read(chromium: Chromium, folder: Path) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        chromium.ask("Emulation.setEmulatedMedia", features=[feature])
        shown(chromium, f"file://{folder / 'out.html'}", "groups", ".group")
        style = "getComputedStyle(document.documentElement)"
        mean = r".match(/\d+/g).reduce((a, b) => a + Number(b), 0) / 3"
        names = ("backgroundColor", "color")
        grounds[scheme] = [chromium.value(f"{style}.{name}{mean}") for name in names]
    chromium.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    assert grounds["light"][0] - grounds["light"][1] > 150 and grounds["dark"][1] - grounds["dark"][0] > 150


def test_a_page_fits_into_1280_pixels(chromium: Chromium, address: str) -> None:
    for place, element in (("groups", ".group"), ("lanes?step=3", ".lanes")):
        shown(chromium, address, place, element)
        assert chromium.value("document.documentElement.scrollWidth") <= 1280


def test_megabytes_come_in_windows(chromium: Chromium, tmp_path: Path, chat: Chat) -> None:
    run = RunMaker(tmp_path / "run", chat)
    said = ["Ada " * 200, "5 " * 3000] * 3
    made = episode(chat, "Where?", *said, "Oslo", seq=0, calls=[call("search", query="x" * 200_000)])
    run.receive(made)
    run.close()
    with serving(tmp_path / "run") as address:
        shown(chromium, address, "groups", ".group")
        chromium.value("document.querySelector('.cell').click()")
        chromium.until("document.querySelector('.segment button')")
        window = chromium.value("document.querySelectorAll('[data-i]').length")
        assert window == 4096 < len(made.token_ids)
        chromium.value("document.querySelector('.segment button').click()")
        chromium.until(f"document.querySelectorAll('[data-i]').length === {2 * 4096}")
        assert len(texts(chromium, ".call pre")[0]) < 30_000


def test_an_empty_run_says_what_is_missing_and_fills_by_itself(
    chromium: Chromium, tmp_path: Path, chat: Chat
) -> None:
    (tmp_path / "run").mkdir()
    with serving(tmp_path / "run") as address:
        shown(chromium, address, "groups", ".empty")
        assert "trajectories/ is missing" in texts(chromium, ".empty")[0]
        assert texts(chromium, ".missing summary") == ["4 things missing"]
        shown(chromium, address, "lanes", ".empty")
        chromium.value("location.hash = '#/groups'")
        run = RunMaker(tmp_path / "run")
        run.receive(episode(chat, "a?", "b", seq=0))
        run.close()
        deadline = time.monotonic() + ANSWER_S
        while not chromium.value("document.querySelectorAll('.cell').length") and time.monotonic() < deadline:
            chromium.value("new Promise(r => setTimeout(r, 200))")
        assert len(texts(chromium, ".cell")) == 1
