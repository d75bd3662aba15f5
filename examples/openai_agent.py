"""An agent written with OpenAI's client alone, on the research task; it is trained without knowing.

pip install 'slipstream[gateway]' openai
slipstream train research --output runs/agent agent.program=examples/openai_agent.py:run
"""

from __future__ import annotations

import functools
import json
import zlib
from typing import Any

import openai

from slipstream.config import load_config
from slipstream.environments import environment_factory
from slipstream.interfaces import AssistantMessage
from slipstream.rewards import reward
from slipstream.types import Task, TaskAttempt

CONFIG = load_config("research")
WORLD = environment_factory(CONFIG.environment, CONFIG.rewards)


@functools.cache
def client(base_url: str) -> openai.AsyncOpenAI:
    """Return one client for all episodes: making one takes longer than an answer."""
    return openai.AsyncOpenAI(base_url=base_url, api_key="one for each rollout", timeout=60.0)


async def run(task: Task, *, base_url: str, api_key: str) -> float:
    """Answer a question with the tools of the research world; return what the answer is worth."""
    world = WORLD.make()
    seed = zlib.crc32(api_key.encode())
    opening = await world.reset(task, TaskAttempt(task=task.index, seed=seed, group=0, attempt=0))
    tools = [
        {"type": "function", "function": {"name": tool.name, "description": tool.description,
                                          "parameters": tool.parameters}}
        for tool in world.tools
    ]  # fmt: skip
    policy = client(base_url).with_options(api_key=api_key).chat.completions
    messages: list[Any] = [{"role": "user", "content": opening.user}]
    while True:
        try:
            answered = await policy.create(model="policy", messages=messages, tools=tools)
        except openai.BadRequestError:  # no calls or no tokens are left
            break
        answer = answered.choices[0].message
        calls = answer.tool_calls or []
        transition = await world.step(_read(answer.content or "", calls))
        if transition.done:
            break
        messages.append(answer.model_dump(exclude_none=True))
        if calls:
            messages.append({"role": "tool", "tool_call_id": calls[0].id, "content": transition.observation})
        else:
            messages.append({"role": "user", "content": transition.observation})
    worth = reward(await world.score(), CONFIG.rewards)
    assert worth is not None, "the research world judges every episode"
    return worth


def _read(text: str, calls: list[Any]) -> AssistantMessage:
    if len(calls) != 1:
        return AssistantMessage(text=text, error=f"expected one tool call, got {len(calls)}")
    function = calls[0].function
    return AssistantMessage(text=text, name=function.name, arguments=json.loads(function.arguments))
