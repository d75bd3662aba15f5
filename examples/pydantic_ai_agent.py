"""An agent written with Pydantic AI, on the research task; it is trained without knowing.

pip install 'slipstream[gateway]' 'pydantic-ai-slim[openai]'
slipstream train research --output runs/agent agent.program=examples/pydantic_ai_agent.py:run
"""

from __future__ import annotations

import functools
import zlib
from contextlib import suppress

import openai
from pydantic_ai import Agent, RunContext, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError, UnexpectedModelBehavior
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from slipstream.config import load_config
from slipstream.environments import environment_factory
from slipstream.interfaces import AssistantMessage, Environment
from slipstream.rewards import reward
from slipstream.types import Task, TaskAttempt

CONFIG = load_config("research")
WORLD = environment_factory(CONFIG.environment, CONFIG.rewards)


async def answer(context: RunContext[Environment], text: str) -> str:
    """Give the final answer."""
    return await _use(context.deps, "answer", text=text)


AGENT = Agent(
    deps_type=Environment,
    output_type=ToolOutput(answer, name="answer"),
    retries=CONFIG.environment.max_turns,  # the gateway bounds how often the policy may err
)


@AGENT.tool
async def search(context: RunContext[Environment], query: str) -> str:
    """List documents whose title holds all words."""
    return await _use(context.deps, "search", query=query)


@AGENT.tool(name="open")
async def open_document(context: RunContext[Environment], document: str) -> str:
    """Read a document."""
    return await _use(context.deps, "open", document=document)


@functools.cache
def client(base_url: str) -> openai.AsyncOpenAI:
    """Return one client for all episodes: making one takes longer than an answer."""
    return openai.AsyncOpenAI(base_url=base_url, api_key="one for each rollout", timeout=60.0)


async def run(task: Task, *, base_url: str, api_key: str) -> float:
    """Answer a question with the tools of the research world; return what the answer is worth."""
    world = WORLD.make()
    seed = zlib.crc32(api_key.encode())
    opening = await world.reset(task, TaskAttempt(task=task.index, seed=seed, group=0, attempt=0))
    provider = OpenAIProvider(openai_client=client(base_url).with_options(api_key=api_key))
    with suppress(ModelHTTPError, UnexpectedModelBehavior):  # no calls or no tokens are left
        await AGENT.run(opening.user, deps=world, model=OpenAIChatModel("policy", provider=provider))
    worth = reward(await world.score(), CONFIG.rewards)
    assert worth is not None, "the research world judges every episode"
    return worth


async def _use(world: Environment, name: str, **arguments: str) -> str:
    return (await world.step(AssistantMessage(text="", name=name, arguments=arguments))).observation
