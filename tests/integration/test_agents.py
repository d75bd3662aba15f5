"""Runs whose episodes other programs play: trained on exactly what their gateways sampled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from books import check_books, read_books
from runs import ROOT, Run

from slipstream.metrics import read_rows, rows_of

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

FORGETFUL = '''
import httpx

async def run(task, *, base_url, api_key):
    """Ask twice with nothing in common, then go on from the first answer."""
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {api_key}"}, timeout=60) as client:
        async def ask(*messages):
            body = {"model": "policy", "messages": list(messages), "max_tokens": 12}
            answered = await client.post(f"{base_url}/chat/completions", json=body)
            answered.raise_for_status()
            return answered.json()["choices"][0]["message"]

        question = {"role": "user", "content": task.question}
        first = await ask(question)
        await ask({"role": "user", "content": "So far nothing is known."})
        last = await ask(question, first, {"role": "user", "content": "Go on."})
    return float(len(last["content"] or "") % 2)
'''


@pytest.mark.parametrize("agent", ["openai", "forgetful"])
def test_an_agent_is_trained_on_what_was_sampled_for_it(
    new_run: Callable[..., Run], tmp_path: Path, agent: str
) -> None:
    """At slip 0 the learner finds each token as likely as its sampler did, whatever the agent forgot."""
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    programs = {"openai": f"{ROOT}/examples/openai_agent.py:run", "forgetful": f"{tmp_path}/forgetful.py:run"}
    run = new_run("run", "max_slip=0", "optim.minibatches=1", f"agent.program={programs[agent]}")
    run.train()
    rows = rows_of(read_rows(run.folder), "train")
    assert [row["step"] for row in rows] == list(range(1, run.config.steps + 1))
    assert all(abs(row["mismatch/k3"]) < 1e-6 for row in rows), [row["mismatch/k3"] for row in rows]
    books = read_books(run.folder)
    check_books(books, run.config)
    trained = [books.trajectory(identity) for identity in books.trained]
    assert {len(made.segments) for made in trained} == ({0} if agent == "openai" else {1})
    assert all(made.loss_mask.sum() for made in trained)
    assert not any(books.received[identity].verdict == "failed_infrastructure" for identity in books.received)
