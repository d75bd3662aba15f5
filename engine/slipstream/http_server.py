"""Floor 4. An HTTP app on a port of its own, in the event loop of whoever needs it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from slipstream.deadlines import within
from slipstream.errors import AddressError

START_S: Final = 30.0
STOP_S: Final = 10.0


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the role whose loop this is."""
        yield


class HttpServer:
    """Serves an app until it is stopped.

    Example: ``server = HttpServer(gateway.app, who="gateway"); url = await server.start(); ...;
    await server.stop()``.
    """

    def __init__(self, app: ASGIApp, *, who: str, host: str = "127.0.0.1", port: int = 0) -> None:
        """Bind; port 0 takes a free one. `who` is named in errors. Raises AddressError."""
        self._who = who
        try:
            self._socket = socket.create_server((host, port))
        except OSError as error:
            raise AddressError(
                f"{who}: cannot listen on {host}:{port} ({error.strerror}); give another port, or 0 for a "
                f"free one"
            ) from error
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Serve in this loop and return the URL."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        await within(self._started(), START_S, self._who, f"its own start on {self.url}")
        return self.url

    async def stop(self) -> None:
        """Answer nothing more."""
        if self._serving is None:
            self._socket.close()
            return
        self._server.should_exit = self._server.force_exit = True
        await within(self._serving, STOP_S, self._who, "its own end")

    async def _started(self) -> None:
        while not self._server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
