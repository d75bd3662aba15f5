"""A service for trying workers out; forked by the tests of the sandbox."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import struct
from collections.abc import Callable
from typing import Any

from slipstream.errors import InfrastructureError, ToolError


class Bench:
    """Remembers, and does what tools do."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    async def keep(self, value: Any) -> list[Any]:
        """Return all values so far."""
        self.kept.append(value)
        return self.kept

    async def echo(self, **values: Any) -> Any:
        """Return the arguments."""
        return values

    async def refuse(self) -> None:
        """Say what the policy is to read."""
        raise ToolError("no such document")

    async def fail(self) -> None:
        """Fail for the host's reasons."""
        raise InfrastructureError("database down")

    async def blunder(self) -> None:
        """Make a mistake."""
        raise KeyError("x")

    async def leave(self) -> None:
        """End the process."""
        os._exit(1)

    async def spin(self) -> None:
        """Never come back, not even to the event loop."""
        while True:
            pass

    async def declare(self, length: int) -> None:
        """Announce a frame of so many bytes on every socket, and send none of them."""
        for file in range(3, 64):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(file).st_mode):
                    os.write(file, struct.pack(">I", length))
        await self.spin()

    async def multiply(self) -> None:
        """Leave processes that forget where they came from."""
        for _ in range(4):
            if os.fork() == 0:
                os.setsid()
                os.fork()
                signal.pause()

    async def say(self, count: int) -> str:
        """Return so many characters."""
        return "x" * count


def bench(options: dict[str, Any]) -> Callable[[], Bench]:
    """Return the maker of benches; fails when told to."""
    if options.get("broken"):
        raise ValueError("this service cannot be made")
    return Bench
