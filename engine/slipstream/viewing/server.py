"""Floor 5. A run over HTTP on the loopback.

loop        waits for                       released by
follow      a second, or nothing            the clock; it reads the log in slices between two requests
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import uvloop
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from slipstream.errors import RunFolderError, UserError
from slipstream.http_server import HttpServer
from slipstream.viewing.assets import HEADERS, SCRIPTS, STYLES, asset, served_page
from slipstream.viewing.run import RunView, to_json

HOSTS: Final = ["127.0.0.1", "localhost"]
"""Names under which the page is served: another one's owner could have it read by his own page."""
_SLICE_S: Final = 0.03
_IDLE_S: Final = 1.0


def serve(view: RunView, *, port: int) -> int:
    """Serve a run until SIGTERM or SIGINT; returns 0. Raises AddressError."""
    return uvloop.run(_serve(view, port))


async def _serve(view: RunView, port: int) -> int:
    server = HttpServer(view_app(view), who="view", port=port)
    url = await server.start()
    sys.stdout.write(f"{view.folder} at {url} (Ctrl-C ends)\n")
    sys.stdout.flush()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    while not stopping.is_set():
        more = view.advance(_SLICE_S)
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), 0.001 if more else _IDLE_S)
    await server.stop()
    return 0


def view_app(view: RunView) -> Starlette:
    """Return the application: page, files, and answers as JSON."""

    async def page(request: Request) -> Response:
        return Response(served_page(), media_type="text/html; charset=utf-8", headers=HEADERS)

    async def episode(request: Request) -> Response:
        place, start = request.query_params.get("id", ""), _number(request, "start", 0)
        return await _answered(lambda: view.episode(place, start))

    async def lanes(request: Request) -> Response:
        step, serial = _number(request, "step", -1), _number(request, "serial", -1)
        return await _answered(lambda: view.lanes(step, serial))

    async def groups(request: Request) -> Response:
        return await _answered(lambda: view.groups(dict(request.query_params)))

    async def about(request: Request) -> Response:
        return await _answered(view.about)

    routes = [
        Route("/", page),
        Route("/api/about", about),
        Route("/api/groups", groups),
        Route("/api/episode", episode),
        Route("/api/lanes", lanes),
        Route(f"/{STYLES}", _file(STYLES, "text/css")),
        *(Route(f"/{name}", _file(name, "text/javascript")) for name in SCRIPTS),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])


def _file(name: str, media_type: str) -> Callable[[Request], Any]:
    async def file(request: Request) -> Response:
        return Response(asset(name), media_type=f"{media_type}; charset=utf-8", headers=HEADERS)

    return file


async def _answered(answer: Callable[[], Any]) -> Response:
    """Return an answer as JSON; a user's mistake, or what is gone, as {"error": sentence}."""
    status = 200
    try:
        body = to_json(answer())
    except RunFolderError as error:
        status, body = 404, to_json({"error": str(error)})
    except UserError as error:
        status, body = 400, to_json({"error": str(error)})
    return Response(body, status_code=status, media_type="application/json", headers=HEADERS)


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else default
