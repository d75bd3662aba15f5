"""Floor 4. Python for code one does not trust: pydantic-monty, a fresh session for each snippet.

Snippets run in worker processes of its pool: no files, no sockets, no clock that moves, seeded random
numbers; seconds, memory, depth and output are limited. Nothing is left of a snippet when it has ended, so
the same snippet always says the same, unless it runs out of time.
"""

from __future__ import annotations

import asyncio
import datetime
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from slipstream.errors import ToolError
from slipstream.extras import require

if TYPE_CHECKING:
    from pydantic_monty import AsyncMonty

MEMORY_BYTES: Final = 64 << 20
DEPTH: Final = 200
MOST_OUTPUT: Final = 1000
"""Characters of an answer."""
CLOSE_S: Final = 10.0
BEGINNING: Final = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
"""The only time that a snippet ever sees."""


class Interpreter:
    """Runs snippets in a pool of workers, as many at once as there are processes in it.

    Example: ``await Interpreter(seconds=1.0, wait_s=60.0).run("sum(range(10))")`` is ``45``.
    """

    def __init__(self, *, seconds: float, wait_s: float) -> None:
        """Start nothing yet: the pool belongs to the process that uses it first.

        seconds: of one snippet; wait_s: until a worker is free. Raises ConfigurationError when the package
        is missing.
        """
        require("python", "pydantic_monty", by="environment python")
        import pydantic_monty

        self._monty = pydantic_monty
        self._seconds, self._wait_s = seconds, wait_s
        self._pool: AsyncMonty | None = None

    async def run(self, code: str) -> str:
        """Return what a snippet prints, and its last value.

        Raises ToolError with Python's own words for what it raises, and TimeoutError when no worker becomes
        free.
        """
        said = self._monty.CollectString(max_bytes=16 * MOST_OUTPUT)
        session = (await self._started()).checkout(
            limits={
                "max_feed_duration_secs": self._seconds,
                "max_memory": MEMORY_BYTES,
                "max_recursion_depth": DEPTH,
            },
            os_policy={"datetime": BEGINNING, "sleep": "zero", "random_start": {"seed": 0}},
        )
        try:
            async with session:
                value = await session.feed_run(code, print_callback=said)
        except self._monty.MontyCrashedError as error:
            raise ToolError(self._late if error.timed_out else "the interpreter crashed") from None
        except (self._monty.MontySyntaxError, self._monty.MontyRuntimeError) as error:
            raise ToolError(self._told(error.display("type-msg"))) from None
        except self._monty.MontyError as error:
            raise ToolError(str(error)) from None
        return _shown(said.output, value)

    def close(self) -> None:
        """End the workers."""
        pool, self._pool = self._pool, None
        if pool is not None:
            # The caller's event loop, if it has one, cannot be waited for from here.
            with ThreadPoolExecutor(max_workers=1) as aside:
                aside.submit(asyncio.run, _left(pool)).result(timeout=CLOSE_S)

    async def _started(self) -> AsyncMonty:
        if self._pool is None:
            pool = self._monty.AsyncMonty(
                min_processes=0, checkout_timeout=self._wait_s, request_timeout=self._seconds + 2.0
            )
            await pool.__aenter__()
            # Of those that came here at once, one pool is kept; the others have started nothing.
            self._pool = self._pool or pool
        return self._pool

    @property
    def _late(self) -> str:
        return f"TimeoutError: more than {self._seconds:g} s"

    def _told(self, error: str) -> str:
        """Leave out what measures: a replay is told the same."""
        if error.startswith("TimeoutError: feed"):
            return self._late
        return "MemoryError: memory limit exceeded" if error.startswith("MemoryError: memory") else error


async def _left(pool: AsyncMonty) -> None:
    async with asyncio.timeout(CLOSE_S):
        await pool.__aexit__(None, None, None)


def _shown(output: str, value: Any) -> str:
    last = "" if value is None else value if isinstance(value, str) else repr(value)
    text = (output + last).rstrip("\n") or "no output"
    return text if len(text) <= MOST_OUTPUT else f"{text[:MOST_OUTPUT]}\n[cut at {MOST_OUTPUT} characters]"
