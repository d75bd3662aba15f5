"""The life of a real vLLM server: what its death looks like, and that nothing of it stays behind."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
from pathlib import Path

import psutil
import pytest

from slipstream.deadlines import Deadline
from slipstream.errors import InfrastructureError
from slipstream.inference.vllm.contract import VllmClient

SPEC = importlib.util.spec_from_file_location("vllm_conftest", Path(__file__).with_name("conftest.py"))
assert SPEC is not None and SPEC.loader is not None
shared = sys.modules["vllm_conftest"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(shared)


def test_a_dead_engine_is_noticed_and_nothing_is_left(tmp_path: Path) -> None:
    server = shared.server_of(tmp_path, shared.small_policy())
    asyncio.run(server.start())
    try:
        server.check()
        leader = psutil.Process(server.pid)
        family = [leader, *leader.children(recursive=True)]
        # The engine is a child of the API server, which the leash has started.
        engines = [
            one for one in family if "EngineCore" in one.name() or "EngineCore" in " ".join(one.cmdline())
        ]
        assert engines
        for engine in engines:
            engine.kill()

        async def ask() -> None:
            async with VllmClient(server.url) as client:
                await client.check_health()

        with pytest.raises(InfrastructureError):
            asyncio.run(ask())
        deadline = Deadline(60.0, "test", "the server's end")
        while server.pid is not None:
            deadline.check()
            time.sleep(0.05)
        with pytest.raises(InfrastructureError, match="ended with exit code"):
            server.check()
    finally:
        server.stop()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
