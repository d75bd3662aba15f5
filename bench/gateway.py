"""What the capturing gateway costs an agent, beside a plain server that answers likewise and records nothing.

    slipstream bench gateway [-- --rounds N --agents N --turns N --json FILE]

Agents hold conversations of --turns turns, --agents at once, each over a connection of its own, from another
process than the server's. The policy is a stub: it says the same sentence after 100 ms, or at once. Agents
begin spread over these 100 ms: in step with one another, each would wait for all others, not for the gateway.

    overhead   median time of a call above the stub's 100 ms
    rate       calls a second with the instant stub

Both servers are starlette under uvicorn. The rounds alternate; figures are medians over them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from slipstream.chat import Chat
from slipstream.environments.research import TOOLS, ResearchOptions, corpus
from slipstream.gateway.app import Gateway
from slipstream.gateway.rollouts import Rollout, Rollouts
from slipstream.gateway.server import GatewayServer
from slipstream.tokenizer import train_tokenizer
from slipstream.types import Completion, Int32Array, Sampling

DELAY_S: Final = 0.1
WANTED: Final = {"overhead_ms": 6.0, "calls_per_s": 250.0}
SENTENCE: Final = "Oslo is the answer"
WAYS: Final = ("plain", "gateway")


class Stub:
    """A policy that says one sentence after a while."""

    def __init__(self, chat: Chat, delay_s: float) -> None:
        """Prepare the answer."""
        said = chat.message(SENTENCE)
        self._delay_s = delay_s
        self._answer = Completion(
            token_ids=said,
            logprobs=np.full(len(said), -1.0, np.float32),
            versions=np.zeros(len(said), np.int32),
            stopped=True,
        )

    async def generate(self, token_ids: Int32Array, sampling: Sampling, *, rollout_id: int) -> Completion:
        """Answer."""
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        return self._answer

    def release(self, rollout_id: int) -> None:
        """Hold nothing."""

    async def load(self, update: Any) -> Any:
        """Have no weights."""
        raise NotImplementedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both servers in turn, print the figures and write them where asked."""
    parser = argparse.ArgumentParser(prog="gateway.py", description="The capturing gateway's cost.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--json", type=Path, help="file for the figures")
    chosen = parser.parse_args(arguments)
    overhead: dict[str, list[float]] = {way: [] for way in WAYS}
    rate: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(chosen.rounds):
        for way in WAYS:
            slow, _ = measured(way, DELAY_S, chosen.agents, chosen.turns)
            overhead[way].append(1e3 * (slow - DELAY_S))
            rate[way].append(measured(way, 0.0, chosen.agents, chosen.turns)[1])
    figures = {
        way: {
            "overhead_ms": statistics.median(overhead[way]),
            "calls_per_s": statistics.median(rate[way]),
        }
        for way in WAYS
    }
    for way, row in figures.items():
        sys.stdout.write(
            f"{way:<8} {row['overhead_ms']:6.1f} ms above {1e3 * DELAY_S:.0f} ms, "
            f"{row['calls_per_s']:6.0f} calls/s\n"
        )
    sys.stdout.write(
        f"wanted of the gateway: at most {WANTED['overhead_ms']:g} ms, at least "
        f"{WANTED['calls_per_s']:g} calls/s; {chosen.agents} agents at once\n"
    )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({**figures, "wanted": WANTED}, indent=1) + "\n", encoding="utf-8")
    return 0


def measured(way: str, delay_s: float, agents: int, turns: int) -> tuple[float, float]:
    """Return the median seconds of a call, and calls a second, of one server with a policy of this delay."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(way, delay_s, theirs), daemon=True
    )
    server.start()
    try:
        port = int(ours.recv())
        return uvloop.run(agents_at_work(port, agents, turns))
    finally:
        server.kill()
        server.join()


async def agents_at_work(port: int, agents: int, turns: int) -> tuple[float, float]:
    """Let agents talk once to warm the server up, and once for the clock."""
    await asyncio.gather(*(agent(port, turns, [], 0.0) for _ in range(agents)))
    seconds: list[float] = []
    began = time.perf_counter()
    waits = [DELAY_S * index / agents for index in range(agents)]
    await asyncio.gather(*(agent(port, turns, seconds, wait_s) for wait_s in waits))
    return statistics.median(seconds), len(seconds) / (time.perf_counter() - began)


async def agent(port: int, turns: int, seconds: list[float], wait_s: float) -> None:
    """Hold one conversation with tools in each request."""
    await asyncio.sleep(wait_s)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    key = (await post(reader, writer, "/v1/rollouts", {}, ""))["api_key"]
    tools = [
        {"type": "function", "function": {"name": tool.name, "description": tool.description,
                                          "parameters": tool.parameters}}
        for tool in TOOLS
    ]  # fmt: skip
    messages: list[Any] = [{"role": "user", "content": "Where does Ada Kline live?"}]
    for _ in range(turns):
        began = time.perf_counter()
        body = {"model": "policy", "messages": messages, "tools": tools}
        answered = await post(reader, writer, "/v1/chat/completions", body, key)
        seconds.append(time.perf_counter() - began)
        messages += [answered["choices"][0]["message"], {"role": "user", "content": "Are you sure?"}]
    writer.close()


async def post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: Any, key: str
) -> Any:
    """Send one request over a kept connection: any client library would cost more than what is measured."""
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "host: x",
        f"authorization: Bearer {key}",
        f"content-length: {len(data)}",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode() + data)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(answer.partition("content-length:")[2].split()[0])
    return json.loads(await reader.readexactly(length))


def serve(way: str, delay_s: float, ready: Connection) -> None:
    """Serve until killed."""
    chat = Chat(train_tokenizer(corpus(ResearchOptions(), worlds=16), vocabulary=768))
    apps: dict[str, Callable[[Stub], Starlette]] = {
        "plain": plain,
        "gateway": lambda stub: captured(chat, stub),
    }
    uvloop.run(_serve(apps[way](Stub(chat, delay_s)), ready))


async def _serve(app: Starlette, ready: Connection) -> None:
    server = GatewayServer(app)
    url = await server.start()
    ready.send(url.removesuffix("/v1").rpartition(":")[2])
    await asyncio.Event().wait()


def captured(chat: Chat, stub: Stub) -> Starlette:
    """Return the gateway."""
    rollouts, numbers = Rollouts(chat, max_tokens=4096, max_calls=1000), itertools.count()

    def opened(key: str) -> Rollout:
        return rollouts.open(stub, Sampling(max_tokens=48), number=next(numbers), key=key)

    return Gateway(rollouts, model="policy", opener=opened).app


def plain(stub: Stub) -> Starlette:
    """Return a server that reads the request, waits for the policy, and answers."""
    nothing = np.zeros(1, np.int32)

    async def opened(_request: Request) -> JSONResponse:
        return JSONResponse({"api_key": "any"})

    async def answered(request: Request) -> JSONResponse:
        given = await request.json()
        await stub.generate(nothing, Sampling(), rollout_id=0)
        message = {"role": "assistant", "content": SENTENCE}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return JSONResponse({"model": given["model"], "choices": choices})

    routes: list[tuple[str, Callable[[Request], Awaitable[JSONResponse]]]] = [
        ("/v1/rollouts", opened),
        ("/v1/chat/completions", answered),
    ]
    return Starlette(routes=[Route(path, handler, methods=["POST"]) for path, handler in routes])


if __name__ == "__main__":
    sys.exit(main())
