"""Floor 5. The report of an audit: one HTML file that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from html import escape
from typing import Final

from slipstream.environment_audit.trials import rate
from slipstream.environment_audit.verdicts import Findings, Level, PolicyRow, Transcript, Verdict
from slipstream.metrics import wilson_interval

QUESTIONS: Final = {
    "schemas": "Can a policy, a parser and a server read the tools?",
    "tasks": "Do tasks repeat, and do splits keep apart?",
    "oracle": "Can the tasks be solved?",
    "failures": "How much is left while tools fail?",
    "do_nothing": "Is silence paid?",
    "constants": "Is there an answer that is paid whatever was asked?",
    "random": "Is luck paid?",
    "crash": "Does it bear whatever a policy may say?",
    "slow": "What becomes of an episode without an end?",
    "determinism": "Does one attempt go the same way twice?",
    "attempts": "Do failures differ between attempts?",
    "processes": "Does another process play the same?",
    "resumable": "Can an episode go on somewhere else?",
    "leaks": "Is the answer told before it was found?",
    "speed": "How fast is it without a policy?",
    "rewards": "Does every success beat every failure?",
    "observations": "Is what the policy sees bounded text?",
    "errors": "Does anything end an actor?",
}
"""What each check asks, in the order of the report."""
_STYLE: Final = """
:root { --ink: #1c2024; --dim: #667077; --paper: #fbfaf8; --card: #fff; --line: #e4e1db;
  --PASS: #1d7a4c; --WARN: #a86400; --FAIL: #b3261e; --bar: #7d9cc0; --policy: #eef3fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e4df; --dim: #9aa2a8; --paper: #16181a;
  --card: #1e2124; --line: #32363a; --PASS: #5fc48f; --WARN: #e2a84b; --FAIL: #f2857c; --bar: #56779c;
  --policy: #232b35; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem; }
.lead { margin: .5rem 0 0; font-size: 1.1rem; } .lead b.PASS, .lead b.FAIL { color: var(--PASS); }
.lead b.FAIL { color: var(--FAIL); } .dim { color: var(--dim); font-size: .9rem; }
.check { display: grid; grid-template-columns: 4rem 1fr auto; gap: 0 1rem; padding: .8rem 0;
  border-top: 1px solid var(--line); }
.check:last-child { border-bottom: 1px solid var(--line); }
.check .name { font-weight: 600; } .check .asks { color: var(--dim); }
.check p { grid-column: 2; margin: .15rem 0 0; overflow-wrap: anywhere; }
.check details { grid-column: 2 / 4; margin-top: .5rem; }
.level { font-weight: 700; font-size: .8rem; letter-spacing: .06em; padding-top: .2rem; }
.level.PASS { color: var(--PASS); } .level.WARN { color: var(--WARN); } .level.FAIL { color: var(--FAIL); }
.check.FAIL {
  background: linear-gradient(90deg, color-mix(in srgb, var(--FAIL) 9%, transparent), transparent);
  box-shadow: -3px 0 0 var(--FAIL); padding-left: .75rem; margin-left: -.75rem; }
.seconds { color: var(--dim); font-size: .85rem; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; color: var(--dim); font-size: .9rem; }
.episode { margin: .75rem 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  overflow: hidden; }
.episode h3 { margin: 0; padding: .45rem .75rem; font-size: .85rem; border-bottom: 1px solid var(--line); }
.said { display: grid; grid-template-columns: 4.5rem 1fr; font-size: .85rem; }
.said span { color: var(--dim); padding: .3rem .75rem; }
.said pre { margin: 0; padding: .3rem .75rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .82rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; max-height: 16rem; overflow: auto; }
.said.policy { background: var(--policy); }
.ending { padding: .45rem .75rem; border-top: 1px solid var(--line); font-size: .85rem;
  overflow-wrap: anywhere; }
.first { margin: 0; padding-left: 1.1rem; } .first li { margin: .3rem 0; overflow-wrap: anywhere; }
a { color: var(--FAIL); font-weight: 600; text-decoration: none; } a:hover { text-decoration: underline; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--dim); font-size: .8rem; }
th, td { padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
td.number, th.number { text-align: right; } td.policy { overflow-wrap: anywhere; }
svg { display: block; } .rail { fill: var(--line); } .fill { fill: var(--bar); }
.whisker { stroke: var(--ink); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 0; font-size: .9rem; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(name: str, findings: Findings, facts: dict[str, str]) -> str:
    """Return the report on the environment `name`; `facts` are told at its end."""
    passed = findings.passed
    failed, warned = findings.count(Level.FAIL), findings.count(Level.WARN)
    verdict = "fit to be trained on" if passed else "not fit to be trained on"
    order = list(QUESTIONS)
    verdicts = sorted(
        findings.verdicts, key=lambda v: order.index(v.check) if v.check in order else len(order)
    )
    rows = [row for verdict_ in verdicts for row in verdict_.rows]
    facts = {**facts, **{f"version of {key}": value for key, value in findings.versions.items()}}
    return "".join(
        [
            "<!doctype html>\n<html lang=en><head><meta charset=utf-8>",
            '<meta name=viewport content="width=device-width, initial-scale=1">',
            f"<title>Audit of {escape(name)}</title><style>{_STYLE}</style></head><body><main>",
            f"<header><div class=dim>Audit of an environment</div><h1>{escape(name)}</h1><p class=lead>",
            f"<b class={'PASS' if passed else 'FAIL'}>{verdict}</b>: {len(verdicts)} checks, ",
            f"{failed} failed, {warned} {'warning' if warned == 1 else 'warnings'}</p></header>",
            *_first(verdicts),
            "<h2>Checks</h2><section>",
            *map(_check, verdicts),
            "</section>",
            *_policies(rows),
            "<h2>How it was made</h2><dl>",
            *(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items()),
            f"<dt>made</dt><dd>{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, in {findings.seconds:.1f} s</dd>",
            "</dl>",
            "</main></body></html>\n",
        ]
    )


def _first(verdicts: list[Verdict]) -> Iterator[str]:
    """Yield what fails, before everything else."""
    failed = [verdict for verdict in verdicts if verdict.level is Level.FAIL]
    if failed:
        yield "<h2>What fails</h2><ul class=first>"
        for verdict in failed:
            link = f'<a href="#{escape(verdict.check)}">{escape(verdict.check)}</a>'
            yield f"<li>{link} {escape(verdict.sentence)}</li>"
        yield "</ul>"


def _check(verdict: Verdict) -> str:
    level, asks = verdict.level.value, QUESTIONS.get(verdict.check, "")
    early = f" <span class=dim>({escape(verdict.early)})</span>" if verdict.early else ""
    return "".join(
        [
            f'<article class="check {level}" id="{escape(verdict.check)}">',
            f'<div class="level {level}">{level}</div>',
            f"<div><span class=name>{escape(verdict.check)}</span> <span class=asks>{asks}</span></div>",
            f"<div class=seconds>{verdict.seconds:.2f} s</div>",
            f"<p>{escape(verdict.sentence)}{early}</p>",
            *_evidence(verdict),
            "</article>",
        ]
    )


def _evidence(verdict: Verdict) -> Iterator[str]:
    if not verdict.evidence:
        return
    count = len(verdict.evidence)
    yield f"<details><summary>{count} {'episode' if count == 1 else 'episodes'} to read</summary>"
    yield from map(_episode, verdict.evidence)
    yield "</details>"


def _episode(transcript: Transcript) -> str:
    lines = "".join(
        f'<div class="said {escape(line.who)}"><span>{escape(line.who)}</span>'
        f"<pre>{escape(line.text)}</pre></div>"
        for line in transcript.lines
    )
    ending = f"<div class=ending>{escape(transcript.ending)}</div>" if transcript.ending else ""
    return f"<div class=episode><h3>{escape(transcript.title)}</h3>{lines}{ending}</div>"


def _policies(rows: list[PolicyRow]) -> Iterator[str]:
    if not rows:
        return
    yield "<h2>What policies earn</h2><div class=wide><table><thead><tr><th>policy<th class=number>episodes"
    yield "<th class=number>success<th>95 % interval<th class=number>mean reward<th>endings"
    yield "</tr></thead><tbody>"
    for row in rows:
        reward = "none" if row.reward is None else f"{row.reward:+.2f}"
        endings = ", ".join(f"{name} {count}" for name, count in row.endings.items())
        yield (
            f"<tr><td class=policy>{escape(row.policy)}<td class=number>{row.episodes}<td class=number>"
            f"{rate(row):.2f}<td>{_bar(row)}<td class=number>{reward}<td class=dim>{escape(endings)}</tr>"
        )
    yield "</tbody></table></div>"


def _bar(row: PolicyRow) -> str:
    """Return the share of successes as a bar, with its 95 % Wilson interval."""
    low, high = wilson_interval(row.successes, row.episodes) if row.episodes else (0.0, 1.0)
    return (
        f'<svg width=120 height=12 role=img aria-label="{low:.2f} to {high:.2f}"><rect class=rail width=120 '
        f"height=12 rx=3 /><rect class=fill width={120 * rate(row):.1f} height=12 rx=3 /><line class=whisker "
        f"x1={120 * low:.1f} x2={120 * high:.1f} y1=6 y2=6 /></svg>"
    )
