"""Runs whose episodes other programs play: trained on exactly what their gateways sampled."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from books import check_books, read_books
from runs import ROOT, Process, Run, until

from slipstream.metrics import read_rows, rows_of

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

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


@pytest.mark.parametrize("agent", ["openai", "pydantic-ai", "forgetful"])
def test_an_agent_is_trained_on_what_was_sampled_for_it(
    new_run: Callable[..., Run], tmp_path: Path, agent: str
) -> None:
    """At slip 0 the learner finds each token as likely as its sampler did, whatever the agent forgot."""
    if agent == "pydantic-ai":
        pytest.importorskip("pydantic_ai", reason="needs pip install 'pydantic-ai-slim[openai]'")
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    programs = {
        "openai": f"{ROOT}/examples/openai_agent.py:run",
        "pydantic-ai": f"{ROOT}/examples/pydantic_ai_agent.py:run",
        "forgetful": f"{tmp_path}/forgetful.py:run",
    }
    run = new_run("run", "max_slip=0", "optim.minibatches=1", f"agent.program={programs[agent]}")
    run.train()
    rows = rows_of(read_rows(run.folder), "train")
    assert [row["step"] for row in rows] == list(range(1, run.config.steps + 1))
    assert all(abs(row["mismatch/k3"]) < 1e-6 for row in rows), [row["mismatch/k3"] for row in rows]
    books = read_books(run.folder)
    check_books(books, run.config)
    trained = [books.trajectory(identity) for identity in books.trained]
    assert {len(made.segments) for made in trained} == ({1} if agent == "forgetful" else {0})
    assert all(made.loss_mask.sum() for made in trained)
    assert not any(books.received[identity].verdict == "failed_infrastructure" for identity in books.received)


def test_a_policy_is_served_to_agents_outside(new_run: Callable[..., Run]) -> None:
    """The README's requests, and the line that a finished rollout leaves; greedy, it says the same again."""
    run = new_run("run")
    gateway = run.command("gateway", "--port", "0", "--greedy")
    said = run.folder.with_name("run-1.out")
    until(
        lambda: "/rollouts gives a task" in said.read_text() or gateway.popen.poll() is not None,
        "its address",
    )
    found = re.search(r"as policy at (\S+);", said.read_text())
    assert found is not None, run.story(gateway.end())
    assert "checkpoints/warmup as policy" in said.read_text()
    with httpx.Client(base_url=found[1], timeout=60) as client:
        opened = client.post("/rollouts").json()
        question = [{"role": "user", "content": opened["task"]["question"]}]
        answered, again = (
            client.post(
                "/chat/completions", json={"model": "policy", "messages": question},
                headers={"authorization": f"Bearer {one['api_key']}"},
            ) for one in (opened, client.post("/rollouts").json())
        )  # fmt: skip
        assert (answered.status_code, again.status_code) == (200, 200), answered.text
        told = [response.json()["choices"][0]["token_ids"] for response in (answered, again)]
        assert told[0] == told[1]
        assert client.post(f"/rollouts/{opened['id']}/reward", json={"value": 1}).status_code == 200
        assert client.post(f"/rollouts/{opened['id']}/finish").status_code == 200
        until(lambda: (run.folder / "rollouts.jsonl").exists(), "the rollout's line")
    gateway.signal(signal.SIGTERM)
    ended = gateway.end()
    assert ended.code == 0, run.story(ended)
    (row,) = map(json.loads, (run.folder / "rollouts.jsonl").read_text().splitlines())
    assert (row["outcome"], row["reward"], row["calls"], row["task"]) == ("completed", 1.0, 1, 0)
    sampled = answered.json()["choices"][0]["token_ids"]
    assert row["sampled"] == len(sampled)
    assert opened["task"]["question"] in row["segments"][0]


def test_a_gateway_without_a_policy_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    ended = Process("gateway", "research", "--output", str(folder), log=tmp_path / "gateway.log").end()
    assert ended.code == 2
    assert ended.sentence == (
        f"{folder} holds no policy; train one (slipstream train --output {folder}), or give --checkpoint"
    )
