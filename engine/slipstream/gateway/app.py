"""Floor 5. The gateway's HTTP interface: OpenAI's for agents, whose API key is their rollout.

    POST /v1/chat/completions            the agent's own client
    GET  /v1/models
    POST /v1/rollouts                    {"key": optional} -> {"id", "api_key"}
    POST /v1/rollouts/{id}/reward        {"value": number}
    POST /v1/rollouts/{id}/finish

Errors have OpenAI's form, {"error": {"message", "type", "code"}}: 400 a request that is not what the
interface says, 401 an unknown key, 404 an unknown model or rollout, 409 a rollout that is finished or exists,
503 with Retry-After while weights change.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from slipstream.gateway import completions
from slipstream.gateway.messages import RequestError
from slipstream.gateway.rollouts import FinishedError, Rollout, Rollouts, TooLongError

KEEP_ALIVE_S: Final = 10.0
RETRY_AFTER_S: Final = 1
MOST_BYTES: Final = 64 << 20
Handler = Callable[[HttpRequest], Awaitable[Response]]


class Gateway:
    """The interface over a set of rollouts.

    Example: ``uvicorn.run(Gateway(rollouts, model="policy").app)``.
    """

    def __init__(self, rollouts: Rollouts, *, model: str) -> None:
        """Serve one model under its name."""
        self._rollouts, self._model = rollouts, model
        self.paused = False
        """While it is set calls are answered with 503: weights are changing."""
        routes = (
            ("/v1/chat/completions", self._chat, "POST"),
            ("/v1/models", self._models, "GET"),
            ("/v1/rollouts", self._open, "POST"),
            ("/v1/rollouts/{key}/reward", self._reward, "POST"),
            ("/v1/rollouts/{key}/finish", self._finish, "POST"),
        )
        self.app = Starlette(
            routes=[Route(path, _answering(handler), methods=[verb]) for path, handler, verb in routes]
        )

    async def _chat(self, http: HttpRequest) -> Response:
        rollout = self._rollout_of(http)
        if rollout is None:
            return _error(401, "invalid_api_key", "Authorization: expected a rollout's key as bearer token")
        request = completions.read_request(await _body(http))
        if request.model != self._model:
            return _error(404, "model_not_found", f"model: expected {self._model}, got {request.model}")
        if self.paused:
            return _error(503, "paused", "weights are changing; try again", retry_after_s=RETRY_AFTER_S)
        working = asyncio.create_task(
            self._completed(rollout, request, http.headers.get("idempotency-key", ""))
        )
        if not request.stream:
            return JSONResponse(await working)
        return StreamingResponse(_streamed(working, usage=request.usage), media_type="text/event-stream")

    async def _completed(
        self, rollout: Rollout, request: completions.Request, idempotency: str
    ) -> dict[str, Any]:
        if idempotency and idempotency in rollout.answered:
            again: dict[str, Any] = await asyncio.shield(rollout.answered[idempotency])
            return again
        asked = asyncio.ensure_future(
            self._rollouts.ask(rollout, request.messages, request.tools, max_tokens=request.max_tokens)
        )
        made: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        if idempotency:
            self._rollouts.remember(rollout, idempotency, made)
        try:
            body = completions.response(request, await asked, rollout.key)
        except BaseException as error:
            if isinstance(error, RequestError):
                made.set_exception(error)
                made.exception()
            else:
                made.cancel()
            rollout.answered.pop(idempotency, None)
            raise
        made.set_result(body)
        return body

    async def _models(self, http: HttpRequest) -> Response:
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "slipstream"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _open(self, http: HttpRequest) -> Response:
        given = await _body(http, default={})
        key = given.get("key", "") if isinstance(given, dict) else None
        if not isinstance(key, str):
            raise RequestError("key: expected text, or nothing")
        rollout = self._rollouts.open(key)
        return JSONResponse({"id": rollout.key, "api_key": rollout.key}, status_code=201)

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

    def _rollout_of(self, http: HttpRequest) -> Rollout | None:
        scheme, _, key = http.headers.get("authorization", "").partition(" ")
        return self._rollouts.find(key) if scheme.lower() == "bearer" else None

    def _named(self, http: HttpRequest) -> Rollout | None:
        return self._rollouts.find(http.path_params["key"])


async def _streamed(working: asyncio.Task[dict[str, Any]], *, usage: bool) -> AsyncIterator[str]:
    """Yield comments while the answer is being made, then its events; an error is the last event."""
    try:
        while not working.done():
            await asyncio.wait([working], timeout=KEEP_ALIVE_S)
            if not working.done():
                yield ": waiting\n\n"
        try:
            body = working.result()
        except RequestError as error:
            yield f"data: {json.dumps(_problem(*_status(error), str(error)))}\n\n"
            return
        for event in completions.events(body, usage=usage):
            yield event
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
            return _error(*_status(error), str(error))

    return handle


def _status(error: RequestError) -> tuple[int, str]:
    if isinstance(error, FinishedError):
        return 409, "rollout_finished"
    return 400, "context_length_exceeded" if isinstance(error, TooLongError) else "invalid_request"


def _problem(status: int, code: str, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": code, "param": None}}


def _error(status: int, code: str, message: str, *, retry_after_s: int = 0) -> JSONResponse:
    headers = {"Retry-After": str(retry_after_s)} if retry_after_s else None
    return JSONResponse(_problem(status, code, message), status_code=status, headers=headers)
