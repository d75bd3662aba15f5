"""Floor 4. The gateway's HTTP interface: OpenAI's for agents, whose API key is their rollout.

    POST /v1/chat/completions            the agent's own client, OpenAI's or, below, Anthropic's
    POST /v1/completions, /v1/responses
    POST /v1/messages, /v1/messages/count_tokens
    GET  /v1/models
    POST /v1/rollouts                    {"key": optional} -> {"id", "api_key", "task"}
    POST /v1/rollouts/{id}/reward        {"value": number}
    POST /v1/rollouts/{id}/finish

Errors have OpenAI's form, {"error": {"message", "type", "code"}}: 400 a request that is not what the
interface says, 401 an unknown key, 404 an unknown model or rollout, 409 a rollout that is finished or exists,
503 with Retry-After while weights change or no task is free.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from slipstream.gateway.anthropic import AnthropicMessages
from slipstream.gateway.completions import ChatCompletions
from slipstream.gateway.dialect import Asked, Dialect, event
from slipstream.gateway.messages import RequestError
from slipstream.gateway.responses import Responses
from slipstream.gateway.rollouts import (
    FinishedError,
    NoTaskError,
    Rollout,
    Rollouts,
    TooLongError,
    TooManyCallsError,
)
from slipstream.gateway.text_completions import TextCompletions

KEEP_ALIVE_S: Final = 10.0
RETRY_AFTER_S: Final = 1
MOST_BYTES: Final = 64 << 20
UNKNOWN_KEY: Final = "API key: expected a rollout's key; POST /v1/rollouts gives one"
Handler = Callable[[HttpRequest], Awaitable[Response]]
Opener = Callable[[str], Rollout]
"""Begins a rollout for an agent outside, under a key of its own if it gave one."""


DIALECTS: Final[tuple[Dialect, ...]] = (
    ChatCompletions(),
    TextCompletions(),
    Responses(),
    AnthropicMessages(),
)


class Gateway:
    """The interface over a set of rollouts.

    Example: ``uvicorn.run(Gateway(rollouts, model="policy", opener=opener).app)``.
    """

    def __init__(self, rollouts: Rollouts, *, model: str, opener: Opener) -> None:
        """Serve one model under its name; agents outside begin rollouts with `opener`."""
        self._rollouts, self._model, self._opener = rollouts, model, opener
        self.paused = False
        """While it is set calls are answered with 503: weights are changing."""
        routes: list[tuple[str, Handler, str]] = [
            (dialect.path, partial(self._call, dialect), "POST") for dialect in DIALECTS
        ]
        routes += [
            ("/v1/messages/count_tokens", self._count, "POST"),
            ("/v1/models", self._models, "GET"),
            ("/v1/rollouts", self._open, "POST"),
            ("/v1/rollouts/{key}/reward", self._reward, "POST"),
            ("/v1/rollouts/{key}/finish", self._finish, "POST"),
        ]
        self.app = Starlette(
            routes=[Route(path, _answering(handler), methods=[verb]) for path, handler, verb in routes]
        )

    async def _call(self, dialect: Dialect, http: HttpRequest) -> Response:
        """Let the policy answer, in the dialect it was asked in."""
        try:
            rollout, asked = await self._asked(dialect, http)
            if self.paused:
                raise _Refusal(503, "paused", "weights are changing; try again")
        except (_Refusal, RequestError) as error:
            return _refused(dialect, error)
        again = http.headers.get("idempotency-key", "")
        working = asyncio.create_task(self._completed(dialect, rollout, asked, again))
        if asked.stream:
            return StreamingResponse(_streamed(dialect, asked, working), media_type="text/event-stream")
        try:
            return JSONResponse(await working)
        except RequestError as error:
            return _refused(dialect, error)

    async def _asked(self, dialect: Dialect, http: HttpRequest) -> tuple[Rollout, Asked]:
        rollout = self._rollouts.find(dialect.key(http.headers))
        if rollout is None:
            raise _Refusal(401, "invalid_api_key", UNKNOWN_KEY)
        asked = dialect.read(await _body(http), rollout)
        if asked.model != self._model:
            raise _Refusal(404, "model_not_found", f"model: expected {self._model}, got {asked.model}")
        return rollout, asked

    async def _count(self, http: HttpRequest) -> Response:
        """Count a prompt's tokens; nothing is recorded."""
        dialect = AnthropicMessages()
        try:
            rollout = self._rollouts.find(dialect.key(http.headers))
            if rollout is None:
                raise _Refusal(401, "invalid_api_key", UNKNOWN_KEY)
            given = await _body(http)
            asked = dialect.read({"max_tokens": 1, **given} if isinstance(given, dict) else given, rollout)
        except (_Refusal, RequestError) as error:
            return _refused(dialect, error)
        return JSONResponse({"input_tokens": self._rollouts.count(rollout, asked.messages, asked.tools)})

    async def _completed(
        self, dialect: Dialect, rollout: Rollout, asked: Asked, idempotency: str
    ) -> dict[str, Any]:
        """Return the answer, that of the first of several equal requests.

        An agent that hangs up changes nothing: what is being sampled for it is sampled and recorded.
        """
        task = rollout.answered.get(idempotency) if idempotency else None
        if task is None:
            task = asyncio.create_task(self._answer(dialect, rollout, asked))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._rollouts.remember(rollout, idempotency or f"call {id(task)}", task)
        body: dict[str, Any] = await asyncio.shield(task)
        return body

    async def _answer(self, dialect: Dialect, rollout: Rollout, asked: Asked) -> dict[str, Any]:
        most, stops = asked.max_tokens, asked.stops
        if asked.prompt is None:
            answered = await self._rollouts.ask(
                rollout, asked.messages, asked.tools, max_tokens=most, stops=stops
            )
        else:
            answered = await self._rollouts.complete(rollout, asked.prompt, max_tokens=most, stops=stops)
        return dialect.body(asked, answered, rollout.key)

    async def _models(self, http: HttpRequest) -> Response:
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "slipstream"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _open(self, http: HttpRequest) -> Response:
        given = await _body(http, default={})
        key = given.get("key", "") if isinstance(given, dict) else None
        if not isinstance(key, str):
            raise RequestError("key: expected text, or nothing")
        try:
            rollout = self._opener(key)
        except NoTaskError as error:
            return _error(503, "no_task", str(error))
        told = {"id": rollout.key, "api_key": rollout.key, "task": rollout.task}
        return JSONResponse(told, status_code=201)

    async def _reward(self, http: HttpRequest) -> Response:
        rollout, given = self._named(http), await _body(http)
        if rollout is None:
            return _error(404, "rollout_not_found", "no rollout has this id")
        value = given.get("value") if isinstance(given, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise RequestError(f"value: expected a finite number, got {value!r}")
        if rollout.finished:
            raise FinishedError(f"rollout {rollout.key}: it is finished; rewards come before")
        rollout.rewards.append(float(value))
        return JSONResponse({"id": rollout.key, "rewards": rollout.rewards})

    async def _finish(self, http: HttpRequest) -> Response:
        rollout = self._named(http)
        if rollout is None:
            return _error(404, "rollout_not_found", "no rollout has this id")
        if rollout.finished:
            raise FinishedError(f"rollout {rollout.key}: it is finished already")
        self._rollouts.finish(rollout)
        calls = len(rollout.graph.turns)
        return JSONResponse(
            {"id": rollout.key, "calls": calls, "samples": len(list(rollout.graph.samples()))}
        )

    def _named(self, http: HttpRequest) -> Rollout | None:
        return self._rollouts.find(http.path_params["key"])


class _Refusal(Exception):
    """A request that is refused for another reason than what it holds."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


async def _streamed(
    dialect: Dialect, asked: Asked, working: asyncio.Task[dict[str, Any]]
) -> AsyncIterator[str]:
    """Yield signs of life while the answer is being made, then its events; an error is the last event."""
    try:
        while not working.done():
            await asyncio.wait([working], timeout=KEEP_ALIVE_S)
            if not working.done():
                yield dialect.keep_alive
        try:
            body = working.result()
        except RequestError as error:
            yield event(dialect.problem(*_status(error), str(error)), "error")
            return
        for told in dialect.events(asked, body):
            yield told
    finally:
        working.cancel()


async def _body(http: HttpRequest, default: Any = None) -> Any:
    """Return a request's JSON; raises RequestError."""
    data = bytearray()
    async for chunk in http.stream():
        data += chunk
        if len(data) > MOST_BYTES:
            raise RequestError(f"body: expected at most {MOST_BYTES >> 20} MB")
    if not data and default is not None:
        return default
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError("body: expected JSON") from error


def _answering(handler: Handler) -> Handler:
    """Return a handler whose user errors are answers."""

    async def handle(http: HttpRequest) -> Response:
        try:
            return await handler(http)
        except RequestError as error:
            return _refused(ChatCompletions(), error)

    return handle


def _refused(dialect: Dialect, error: _Refusal | RequestError) -> JSONResponse:
    status, code = (error.status, error.code) if isinstance(error, _Refusal) else _status(error)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    return JSONResponse(dialect.problem(status, code, str(error)), status_code=status, headers=headers)


def _status(error: RequestError) -> tuple[int, str]:
    if isinstance(error, FinishedError):
        return 409, "rollout_finished"
    if isinstance(error, TooManyCallsError):
        return 400, "too_many_calls"
    return 400, "context_length_exceeded" if isinstance(error, TooLongError) else "invalid_request"


def _error(status: int, code: str, message: str) -> JSONResponse:
    return _refused(ChatCompletions(), _Refusal(status, code, message))
