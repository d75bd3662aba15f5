"""Floor 4. Who comes in at the hub: answers for keys (ZAP), and a guard over connections, in one thread.

ZAP is ZeroMQ's RFC 27: libzmq asks over inproc://zeromq.zap.01 whether a key may come in, and hangs the
answer's User-Id on every frame that the connection sends. Here that is "role/name" from the allow-list.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from slipstream.keys import AllowList
from slipstream.transport.guard import ConnectionGuard
from slipstream.transport.sockets import ZAP_DOMAIN

_ZAP_ADDRESS: Final = "inproc://zeromq.zap.01"
_EVENTS: Final = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_REQUEST_FRAMES: Final = 7


class Door:
    """Runs from its making to `close`; made before the hub's socket is bound, so that nobody is missed.

    Example: ``door = Door(context, router_socket, guard, AllowList(folder)); ...; door.close()``.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        router: zmq.Socket[Any],
        guard: ConnectionGuard,
        allowed: AllowList | None,
    ) -> None:
        """Watch a socket; with an allow-list also answer for the keys that come to it."""
        self._guard, self._allowed = guard, allowed
        self._monitor: zmq.Socket[bytes] = router.get_monitor_socket(int(_EVENTS))
        self._zap: zmq.Socket[bytes] | None = None
        if allowed is not None:
            self._zap = context.socket(zmq.REP)
            self._zap.setsockopt(zmq.LINGER, 0)
            self._zap.bind(_ZAP_ADDRESS)
        self.refused_keys = 0
        """Handshakes that proved a key which is not on the list."""
        self._named: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and release its sockets."""
        self._closing.set()
        self._thread.join()
        self._monitor.close(linger=0)
        if self._zap is not None:
            self._zap.close(linger=0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._monitor, zmq.POLLIN)
        if self._zap is not None:
            poller.register(self._zap, zmq.POLLIN)
        while not self._closing.is_set():
            poller.poll(int(1000 * self._guard.look_every_s))
            while self._zap is not None and self._zap.poll(0):
                self._zap.send_multipart(self._judge(self._zap.recv_multipart()))
            while self._monitor.poll(0):
                self._follow(parse_monitor_message(self._monitor.recv_multipart()))
            self._guard.look()

    def _follow(self, event: Mapping[str, Any]) -> None:
        descriptor = int(event["value"])
        if event["event"] == zmq.EVENT_ACCEPTED:
            self._guard.accepted(descriptor)
        else:
            self._guard.gone(descriptor)

    def _judge(self, request: Sequence[bytes]) -> list[bytes]:
        """Return the answer to one question of libzmq's."""
        assert self._allowed is not None
        if len(request) != _REQUEST_FRAMES:
            return [b"1.0", b"", b"500", b"malformed request", b"", b""]
        version, number, domain, address, _, mechanism, key = request
        user = None
        if (version, domain, mechanism) == (b"1.0", ZAP_DOMAIN.encode(), b"CURVE"):
            public_key = z85.encode(key)
            user = self._allowed.user_of(public_key)
        if user is not None:
            return [b"1.0", number, b"200", b"OK", user.encode(), b""]
        self.refused_keys += 1
        host = address.decode(errors="replace")
        if host not in self._named and len(self._named) < 1024:
            self._named.add(host)
            self._guard.notes.append(f"refused a key from {host} that is not in the allow-list")
        return [b"1.0", number, b"400", b"this key is not in the hub's allow-list", b"", b""]
