"""A gateway over a real socket, and a policy that says what it is told to."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import openai
import uvicorn

from slipstream.chat import Chat
from slipstream.gateway.app import Gateway
from slipstream.gateway.rollouts import Rollout, Rollouts
from slipstream.inference.embedded import EmbeddedBackend
from slipstream.interfaces import InferenceBackend
from slipstream.types import Completion, Int32Array, Sampling

MAX_TOKENS = 256
MAX_CALLS = 6


class Scripted:
    """A policy that says given words, one after another, whatever it is asked."""

    def __init__(self, chat: Chat, *words: str) -> None:
        self._said = [chat.message(word) for word in words]
        self.prompts: list[Int32Array] = []
        self.bounds: list[int] = []
        """Most tokens of each answer, as they were asked for."""
        self.go = asyncio.Event()
        self.go.set()

    def say(self, token_ids: Int32Array) -> None:
        """Say these tokens then."""
        self._said.append(token_ids)

    async def generate(self, token_ids: Int32Array, sampling: Sampling, *, rollout_id: int) -> Completion:
        await self.go.wait()
        self.prompts.append(token_ids)
        self.bounds.append(sampling.max_tokens)
        said = self._said.pop(0)
        logprobs = np.linspace(-1.0, -0.1, len(said), dtype=np.float32)
        return Completion(
            token_ids=said, logprobs=logprobs, versions=np.full(len(said), 3, np.int32), stopped=True
        )

    def release(self, rollout_id: int) -> None:
        pass

    async def load(self, update: Any) -> Any:
        raise NotImplementedError


class Serving:
    """A gateway on a port of its own, in a thread with an event loop."""

    def __init__(
        self, gateway: Gateway, rollouts: Rollouts, loop: asyncio.AbstractEventLoop, url: str
    ) -> None:
        self.gateway, self.rollouts, self.loop, self.url = gateway, rollouts, loop, url

    def client(self, key: str = "", **options: Any) -> Any:
        """OpenAI's client, with a new rollout's key unless another is given."""
        key = key or self.post("/v1/rollouts")["api_key"]
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def post(self, path: str, status: int = 0, **body: Any) -> Any:
        response = httpx.post(self.url + path, json=body, timeout=30)
        if status:
            assert response.status_code == status, response.text
        return response.json()

    def graph(self, client: Any) -> Any:
        rollout = self.rollouts.find(client.api_key)
        assert rollout is not None
        return rollout.graph


@contextmanager
def serving(chat: Chat, backend: InferenceBackend) -> Iterator[Serving]:
    rollouts, numbers = Rollouts(chat, max_tokens=MAX_TOKENS, max_calls=MAX_CALLS), itertools.count()

    def opened(key: str) -> Rollout:
        sampling = Sampling(max_tokens=48)
        return rollouts.open(backend, sampling, number=next(numbers), key=key, task={"question": "q"})

    gateway = Gateway(rollouts, model="policy", opener=opened)
    server = uvicorn.Server(uvicorn.Config(gateway.app, port=0, log_level="warning", lifespan="off"))
    started = threading.Event()
    found: dict[str, Any] = {}

    async def run() -> None:
        beside = [asyncio.create_task(backend.run())] if isinstance(backend, EmbeddedBackend) else []
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        found.update(loop=asyncio.get_running_loop(), port=server.servers[0].sockets[0].getsockname()[1])
        started.set()
        await task
        for one in beside:
            one.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert started.wait(30)
        yield Serving(gateway, rollouts, found["loop"], f"http://127.0.0.1:{found['port']}")
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
