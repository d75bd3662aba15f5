"""`slipstream env audit` as a user meets it: real processes, exit codes, one sentence each, a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slipstream import cli
from slipstream.config import RunConfig, configured
from slipstream.environment_audit.page import QUESTIONS, page
from slipstream.environment_audit.supervision import audited
from slipstream.environment_audit.verdicts import Findings, Level, Line, PolicyRow, Transcript, Verdict
from slipstream.environment_audit.worker import NAMES

PLANTED = Path(__file__).parent / "planted.py"
VOID = {"meta", "rect", "line", "br"}


class Balance(HTMLParser):
    """Ends with an empty stack when every element that must be closed is, and notes what is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for key, value in attrs if key in {"src", "href", "srcset", "data"}]
        if tag not in VOID and tag not in {"td", "th"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    assert all(link.startswith("#") for link in parser.fetched)
    assert "@import" not in html and "url(" not in html
    return parser


def config_of(attribute: str) -> RunConfig:
    return configured([f"environment.name={PLANTED}:{attribute}"])


def verdicts_on(attribute: str, **options: float) -> dict[str, Verdict]:
    given: dict[str, object] = {"episodes": 4, "seed": 1, "threshold": 0.1, **options}
    heard: list[Verdict] = []
    findings = audited(config_of(attribute), heard.append, **given)  # type: ignore[arg-type]
    assert heard == findings.verdicts
    return {verdict.check: verdict for verdict in findings.verdicts}


def failing(verdicts: dict[str, Verdict]) -> dict[str, str]:
    return {name: verdict.sentence for name, verdict in verdicts.items() if verdict.level is Level.FAIL}


def test_an_exploit_is_said_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "out.html"
    name = f"{PLANTED}:pays_nonsense"
    assert cli.main(["env", "audit", name, "--episodes", "6", "--report", str(report)]) == 1
    told = capsys.readouterr().out
    assert [line.split()[1] for line in told.splitlines()[: len(NAMES)]] == list(NAMES)
    sentence = "exploitable: always answer('zzz') earns success 6 of 6 (1.00)"
    assert re.search(rf"^FAIL  constants +{re.escape(sentence)}", told, flags=re.MULTILINE)
    assert "18 checks, 1 failed" in told and told.endswith(f"{report}\n")
    seen = read(report.read_text(encoding="utf-8")).text
    assert sentence in seen and "not fit to be trained on" in seen
    assert '<tool_call>{"name": "answer", "arguments": {"code": "zzz"}}</tool_call>' in seen


@pytest.mark.slow
def test_research_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "audit", "research", "--episodes", "8"]) == 0
    told = capsys.readouterr().out
    assert "research: 18 checks, 0 failed, 0 to look at" in told


@pytest.mark.slow
def test_what_depends_on_hashes_differs_in_another_process() -> None:
    found = failing(verdicts_on("hash_order"))
    assert list(found) == ["processes"]
    assert "episodes differ in another process (oracle, train task" in found["processes"]


@pytest.mark.slow
def test_a_crash_costs_the_check_it_happened_in() -> None:
    verdicts = verdicts_on("aborts")
    assert failing(verdicts) == {"oracle": verdicts["oracle"].sentence}
    assert verdicts["oracle"].sentence.startswith("its process ended by signal SIGABRT, in oracle")
    assert verdicts["tasks"].level is Level.PASS
    assert verdicts["rewards"].sentence == "not reached"


@pytest.mark.slow
def test_what_does_not_even_start_is_ended_in_time() -> None:
    found = failing(verdicts_on("stuck", longest_s=6.0))
    assert found == {"schemas": "its process did not end in time and was killed, in its start"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit"], "env audit needs the NAME of an environment (`slipstream env list`) or a recipe"),
        (["audit", "seed=2"], "env audit needs the NAME of an environment"),
        (["audit", "reserch"], "there is no environment reserch; did you mean research?"),
        (["audit", "research", "environment.options.hop=2"], "has no option hop; did you mean hops?"),
        (["audit", "research", "sed=2"], "unknown key sed; did you mean seed?"),
        (["audit", "research", "--episodes", "0"], "--episodes must be at least 1, got 0"),
        (["audit", "research", "--threshold", "0"], "--threshold must lie between 0 and 1, got 0.0"),
        (["audit", "research", "--report", "none/a.html"], "--report: there is no folder none"),
        (["list", "research"], 'env list takes no name, got "research"'),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["env", *arguments]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and not told.out


def test_the_page_holds_whatever_was_said() -> None:
    hostile = '</pre><script>alert("x")</script>&'
    episode = Transcript(title=hostile, lines=(Line(who="policy", text=hostile),), ending=hostile)
    row = PolicyRow(policy=hostile, episodes=4, successes=1, reward=None, endings={"fault": 4})
    verdict = Verdict(
        check="crash", level=Level.FAIL, sentence=hostile, early=hostile, rows=(row,), evidence=(episode,)
    )
    html = page(hostile, Findings(verdicts=[verdict], versions={"x": hostile}, seconds=1.0), {"a": hostile})
    assert "<script" not in html
    # Title, heading, summary of what fails, sentence, remark, row, three of the episode, fact, version.
    assert read(html).text.count(hostile) == 11


def test_the_page_knows_all_checks() -> None:
    assert set(QUESTIONS) == set(NAMES)
