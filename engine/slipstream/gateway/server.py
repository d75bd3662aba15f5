"""Floor 4. The gateway on a port of its own."""

from __future__ import annotations

from starlette.types import ASGIApp

from slipstream.http_server import HttpServer


class GatewayServer(HttpServer):
    """Serves a gateway until it is stopped.

    Example: ``server = GatewayServer(gateway.app); url = await server.start(); ...; await server.stop()``.
    """

    def __init__(self, app: ASGIApp, *, host: str = "127.0.0.1", port: int = 0) -> None:
        """Bind; port 0 takes a free one. Raises AddressError."""
        super().__init__(app, who="gateway", host=host, port=port)
        self.url += "/v1"
        """What a client takes for its base_url."""
