"""A judge's server over a real socket, which says what it is told to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from slipstream.judging.rubric import Rubric

POLITE = Rubric(name="polite", criterion="No insults.", choices={"fails": 0, "partly": 0.5, "meets": 1})
Body = dict[str, Any]
Answer = Callable[[Body], "str | int | Response | None"]
"""Words, an HTTP status, a whole response, or None: nothing, until the client hangs up."""


def said(verdict: str, reason: str = "So it is.") -> str:
    return json.dumps({"reason": reason, "verdict": verdict})


class JudgeServer:
    """What was asked of it, and how it answers."""

    def __init__(self) -> None:
        self.asked: list[Body] = []
        self.keys: list[str] = []
        self.url = ""
        self.together = 0
        """Requests that must be there at once before any is answered."""
        self._answers: list[Answer] = []

    def says(self, *answers: str | int | Response | Answer | None) -> None:
        """Answer so, one after another, the last of them for ever."""
        self._arrived = asyncio.Event()
        self._answers = [given if callable(given) and not isinstance(given, Response)
                         else (lambda body, given=given: given) for given in answers]  # fmt: skip

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.keys.append(request.headers.get("authorization", ""))
        if len(self.asked) >= self.together:
            self._arrived.set()
        await asyncio.wait_for(self._arrived.wait(), 20)
        answer = (self._answers.pop(0) if len(self._answers) > 1 else self._answers[0])(body)
        if answer is None:
            while not await request.is_disconnected():  # noqa: ASYNC110 - starlette has no event for it
                await asyncio.sleep(0.01)
            return Response(status_code=499)
        if isinstance(answer, int):
            return JSONResponse({"error": {"message": "out of order"}}, status_code=answer)
        if isinstance(answer, Response):
            return answer
        message = {"role": "assistant", "content": answer}
        return JSONResponse({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    made = JudgeServer()
    made.says(said("meets"))
    app = Starlette(routes=[Route("/v1/chat/completions", made.answer, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    started = threading.Event()

    async def run() -> None:
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        made.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert started.wait(30)
        yield made
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
