"""Floor 4. What actors see of vLLM servers: sampling, proofs, load. Both ends of that are here.

    POST /servers/N/inference/v1/generate        handed on as it is; x-slipstream-server names the life
    GET  /servers/N/v1/models                    handed on
    GET  /servers/N/proofs/SERIAL?life=&seconds= the proof of a serial; waits for it
    GET  /servers/N/load                         key-value cache used, requests waiting
    POST /servers/N/check                        has the server prove its weights again
    GET  /servers                                all of them, with their states

Nothing else is handed on. vLLM's own control routes, which ask for no key, load weights and run methods in
its workers, stay on the loopback behind it. Every request needs the front's key: `Authorization: Bearer KEY`.

Errors are {"error": {"message"}}: 401 a wrong key, 404 an unknown server or route, 410 a life that is over
without the proof, 503 with Retry-After while a server is down, 504 a proof that did not come in time.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import httpx2
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from slipstream.errors import ProtocolError, SlipstreamError
from slipstream.inference.vllm.contract import GENERATE, SERVER_HEADER, VllmClient
from slipstream.inference.vllm.keeper import Keeper
from slipstream.types import WeightProof

MOST_BYTES: Final = 64 << 20
LONGEST_PROOF_S: Final = 60.0
RETRY_AFTER_S: Final = 1
CONTROL_S: Final = 10.0
_GATEWAY_TIMEOUT: Final = 504
_GONE: Final = 410


class ServerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A look at a server."""

    life: str
    serial: int
    state: str
    kv_cache: float = 0.0
    """Share of its key-value cache in use."""
    running: int = 0
    waiting: int = 0


class ServedProof(msgspec.Struct, frozen=True, kw_only=True):
    """A `WeightProof` as JSON, whose numbers end at 53 bits in many a reader."""

    serial: int
    checksum64: str
    """Hexadecimal."""
    canary_logprobs: tuple[float, ...]
    life: str

    @classmethod
    def of(cls, proof: WeightProof) -> ServedProof:
        """Return a proof in this form."""
        return cls(
            serial=proof.serial,
            checksum64=f"{proof.checksum64:016x}",
            canary_logprobs=proof.canary_logprobs,
            life=proof.server,
        )

    def proof(self) -> WeightProof:
        """Return it as it was; raises ProtocolError for a checksum that is none."""
        try:
            checksum = int(self.checksum64, 16)
        except ValueError:
            raise ProtocolError(f"proof: expected a hexadecimal checksum, got {self.checksum64!r}") from None
        return WeightProof(
            serial=self.serial,
            checksum64=checksum,
            canary_logprobs=self.canary_logprobs,
            server=self.life,
        )


class FrontClient(VllmClient):
    """An actor's end of one server: `generate` of its base, and what a front adds.

    Example: ``FrontClient("http://10.0.0.2:8000/servers/0", key=key)``.
    """

    async def proof(self, serial: int, *, life: str = "", seconds: float = LONGEST_PROOF_S) -> WeightProof:
        """Return the proof of a serial by a life, or by the present one of that or a newer serial.

        Raises InfrastructureError when there is none within `seconds`, ProtocolError once there can be none.
        """
        path = f"/proofs/{serial}"
        params = {"life": life, "seconds": f"{seconds:g}"}
        response = await self._send("GET", path, seconds + CONTROL_S, params=params)
        return self._decoded(response, path, ServedProof).proof()

    async def load(self) -> ServerLoad:
        """Return a look at the server; raises InfrastructureError."""
        return await self._call("GET", "/load", CONTROL_S, ServerLoad)

    async def recheck(self) -> WeightProof:
        """Have the server prove its weights again; raises InfrastructureError."""
        answer = await self._call("POST", "/check", self.deadlines.control_s, ServedProof)
        return answer.proof()


Handler = Callable[[Request, Keeper], Awaitable[Response]]


class Front:
    """The app over a set of servers.

    Example: ``HttpServer(Front(keepers, key=key).app, who="serve")``.
    """

    def __init__(self, keepers: Sequence[Keeper], *, key: str) -> None:
        """Serve `keepers` by their place to whoever has the key."""
        self._keepers, self._key = keepers, key.encode()
        self._working: set[asyncio.Task[Any]] = set()
        # Its own deadline is the client's, which hangs up: the request is given up then.
        self._http = httpx2.AsyncClient(
            timeout=None,
            trust_env=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        )
        one = "/servers/{index:int}"
        routes: list[tuple[str, Handler, str]] = [
            (one + GENERATE, self._handed_on, "POST"),
            (one + "/v1/models", self._handed_on, "GET"),
            (one + "/proofs/{serial:int}", self._proof, "GET"),
            (one + "/load", self._load, "GET"),
            (one + "/check", self._check, "POST"),
        ]
        self.app = Starlette(
            routes=[
                Route("/servers", self._all, methods=["GET"]),
                *(Route(path, self._answering(handler), methods=[verb]) for path, handler, verb in routes),
            ],
            exception_handlers={404: _unknown, 405: _unknown},
        )

    async def close(self) -> None:
        """Give up what is being answered, and close all connections to servers."""
        for task in self._working:
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)
        await self._http.aclose()

    def _answering(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            if refusal := self._refusal(request):
                return refusal
            index = request.path_params["index"]
            if index >= len(self._keepers):
                return _error(404, f"server {index}: there are {len(self._keepers)}, counted from 0")
            task = asyncio.current_task()
            assert task is not None
            self._working.add(task)
            try:
                return await handler(request, self._keepers[index])
            except asyncio.CancelledError:
                return _error(503, "this front ends")
            finally:
                self._working.discard(task)

        return answer

    def _refusal(self, request: Request) -> Response | None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if hmac.compare_digest(given, self._key):
            return None
        return _error(401, "Authorization: expected the key of this front; it stands in the run's folder")

    async def _all(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        looks = [_look(keeper) for keeper in self._keepers]
        return JSONResponse(msgspec.to_builtins(looks))

    async def _handed_on(self, request: Request, keeper: Keeper) -> Response:
        """Hand a request on, and give it up when its client does."""
        life = keeper.life
        if not life:
            return _down(keeper)
        body = await _bounded_body(request)
        if body is None:
            return _error(413, f"request: expected at most {MOST_BYTES} bytes")
        path = request.url.path.split("/", 3)[3]
        headers = {"content-type": request.headers.get("content-type", "application/json")}
        asking = asyncio.create_task(
            self._http.request(request.method, f"{keeper.url}/{path}", content=body, headers=headers)
        )
        gone = asyncio.create_task(_hung_up(request))
        try:
            await asyncio.wait({asking, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                return Response(status_code=499)
            answer = asking.result()
        except httpx2.HTTPError as error:
            return _error(503, f"{life}: {type(error).__name__}: {error or 'the connection broke'}")
        finally:
            asking.cancel()
            gone.cancel()
            await asyncio.gather(asking, gone, return_exceptions=True)
        kind = answer.headers.get("content-type", "application/json")
        return Response(answer.content, answer.status_code, {SERVER_HEADER: life}, media_type=kind)

    async def _proof(self, request: Request, keeper: Keeper) -> Response:
        serial, life = request.path_params["serial"], request.query_params.get("life", "")
        try:
            seconds = min(LONGEST_PROOF_S, float(request.query_params.get("seconds", LONGEST_PROOF_S)))
        except ValueError:
            return _error(400, "seconds: expected a number")
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                proof = await keeper.proof(serial, life=life)
        except TimeoutError:
            return _error(
                _GATEWAY_TIMEOUT, f"serial {serial}: not proven within {seconds:g} s; {keeper.state}"
            )
        if proof is None:
            return _error(_GONE, f"{life}: it is over and has not proven serial {serial}")
        return JSONResponse(msgspec.to_builtins(ServedProof.of(proof)))

    async def _load(self, _: Request, keeper: Keeper) -> Response:
        look = _look(keeper)
        if not look.life:
            return JSONResponse(msgspec.to_builtins(look))
        try:
            async with asyncio.timeout(CONTROL_S):
                text = (await self._http.get(f"{keeper.url}/metrics")).text
        except (httpx2.HTTPError, TimeoutError) as error:
            return _error(503, f"{look.life}: its /metrics do not answer: {type(error).__name__}")
        numbers = _metrics(text, "kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
        kv_cache, running, waiting = numbers
        look = msgspec.structs.replace(look, kv_cache=kv_cache, running=int(running), waiting=int(waiting))
        return JSONResponse(msgspec.to_builtins(look))

    async def _check(self, _: Request, keeper: Keeper) -> Response:
        life = keeper.life
        try:
            proof = await keeper.check()
        except SlipstreamError as error:
            return _error(503, str(error))
        return JSONResponse(msgspec.to_builtins(msgspec.structs.replace(ServedProof.of(proof), life=life)))


async def _bounded_body(request: Request) -> bytes | None:
    """Return the body, or None for one that is too long."""
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > MOST_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


async def _hung_up(request: Request) -> None:
    """Wait until the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _look(keeper: Keeper) -> ServerLoad:
    return ServerLoad(life=keeper.life, serial=keeper.serial, state=keeper.state)


def _metrics(text: str, *names: str) -> list[float]:
    """Return the largest value of each of vLLM's gauges in Prometheus' text form, 0 where there is none."""
    found = dict.fromkeys(names, 0.0)
    for line in text.splitlines():
        name = line.partition("{")[0].removeprefix("vllm:")
        if name in found:
            found[name] = max(found[name], float(line.rpartition(" ")[2]))
    return list(found.values())


def _down(keeper: Keeper) -> Response:
    answer = _error(503, keeper.state)
    answer.headers["retry-after"] = str(RETRY_AFTER_S)
    return answer


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status)


async def _unknown(request: Request, _: Any) -> Response:
    return _error(404, f"{request.method} {request.url.path}: not a route of this front")
