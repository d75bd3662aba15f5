"""A frozen policy behind the real gateway as judge: what it says that is no verdict is invalid."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "httpx", "httpx2", "openai"):
    pytest.importorskip(needed)
sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))

import served  # noqa: E402
from judge_server import POLITE, said  # noqa: E402

from slipstream.chat import Chat  # noqa: E402
from slipstream.inference.embedded import EmbeddedBackend  # noqa: E402
from slipstream.judging.answers import Fault, Unjudged, Verdict  # noqa: E402
from slipstream.judging.judge import Judge  # noqa: E402

MAX_TOKENS = 4096
"""Of prompt and answer: the small tokenizer spells a rubric in many tokens."""


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "MAX_TOKENS", MAX_TOKENS)


async def judged(judge: Judge, count: int) -> list[Verdict | BaseException]:
    return await asyncio.gather(*(judge.verdict(f"{n}") for n in range(count)), return_exceptions=True)


def test_each_verdict_has_a_rollout_of_its_own(chat: Chat) -> None:
    """More verdicts than a rollout has calls."""
    count = served.MAX_CALLS + 2
    backend = served.Scripted(chat, *[said("meets")] * count)
    with served.serving(chat, backend) as running:
        judge = Judge(f"{running.url}/v1", "policy", POLITE, gateway=True, retries=0)
        found = asyncio.run(judged(judge, count))
        other = Judge(f"{running.url}/v1", "another", POLITE, gateway=True, retries=0)
        keyless = Judge(f"{running.url}/v1", "policy", POLITE, retries=0)
        refused = [asyncio.run(judged(one, 1))[0] for one in (other, keyless)]
    assert found == [Verdict(choice="meets", value=1.0, reason="So it is.")] * count
    assert [one.fault for one in refused if isinstance(one, Unjudged)] == [Fault.REFUSED] * 2


def test_a_policy_that_never_learnt_to_judge_says_nonsense(
    chat: Chat, make_model: Callable[..., Any]
) -> None:
    model = make_model(vocabulary=768, max_tokens=MAX_TOKENS)
    backend = EmbeddedBackend(model, stop_token=chat.stop_token, rows=4, max_tokens=MAX_TOKENS)
    with served.serving(chat, backend) as running:
        judge = Judge(f"{running.url}/v1", "policy", POLITE, gateway=True, retries=0, timeout_s=60)
        found = asyncio.run(judged(judge, 3))
    assert [one.fault for one in found if isinstance(one, Unjudged)] == [Fault.NONSENSE] * 3
