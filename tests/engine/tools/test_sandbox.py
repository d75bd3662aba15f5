"""Calls to a sandbox's worker: values, typed errors, deadlines, and an end that leaves nothing."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import uvloop

from slipstream.config import SandboxConfig
from slipstream.errors import ConfigurationError, InfrastructureError, ToolError
from slipstream.tools.sandbox import Sandbox, Worker, WorkerError, WorkerTimeout, choose, why_not_bubblewrap

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
CONFIG = SandboxConfig(answer_bytes=1 << 16)


def made(backend: str, **options: Any) -> Sandbox:
    if backend == "bubblewrap" and (reason := why_not_bubblewrap()):
        pytest.skip(f"bubblewrap does not work here: {reason}")
    return Sandbox(
        "bubblewrap" if backend == "bubblewrap" else "process",
        service="bench_service:bench",
        options=options,
        config=CONFIG,
        namespaces=backend != "plain",
    )


@pytest.fixture(scope="module", params=["bubblewrap", "process"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    box = made(request.param)
    yield box
    box.close()


def with_worker(sandbox: Sandbox, work: Callable[[Worker], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        worker = await sandbox.worker()
        try:
            return await work(worker)
        finally:
            await worker.close()

    return asyncio.run(run())


async def value(worker: Worker, method: str, seconds: float = 20.0, **arguments: Any) -> Any:
    return msgspec.msgpack.decode(await worker.call(method, seconds, **arguments))


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def test_values_come_back_and_a_worker_remembers(sandbox: Sandbox) -> None:
    async def work(worker: Worker) -> None:
        sent = {
            "text": "ünïcode",
            "number": -(2**40),
            "float": 0.1,
            "list": [1, None, True],
            "map": {"a": b"b"},
        }
        assert await value(worker, "echo", **sent) == sent
        assert await value(worker, "keep", value=1) == [1]
        assert await value(worker, "keep", value="two") == [1, "two"]

    with_worker(sandbox, work)


def test_workers_know_nothing_of_each_other(sandbox: Sandbox) -> None:
    for number in range(3):
        assert with_worker(sandbox, lambda w, n=number: value(w, "keep", value=n)) == [number]  # type: ignore[misc]


def test_many_workers_at_once_under_uvloop(sandbox: Sandbox) -> None:
    """As the actor runs them."""

    async def one(number: int) -> Any:
        worker = await sandbox.worker()
        try:
            return await value(worker, "keep", value=number)
        finally:
            await worker.close()

    async def many() -> list[Any]:
        return await asyncio.gather(*map(one, range(16)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(many()) == [[number] for number in range(16)]


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        ("refuse", ToolError, "no such document"),
        ("fail", InfrastructureError, "database down"),
        ("blunder", WorkerError, "tool failed with KeyError"),
        ("leave", WorkerError, "tool crashed"),
        ("no_such_method", WorkerError, "tool"),
    ],
)
def test_errors_keep_their_kind(sandbox: Sandbox, method: str, error: type[Exception], text: str) -> None:
    async def work(worker: Worker) -> None:
        with pytest.raises(error, match=text) as caught:
            await worker.call(method, 20.0)
        assert type(caught.value) is error

    with_worker(sandbox, work)


def test_a_refusal_and_a_mistake_leave_the_worker_alive(sandbox: Sandbox) -> None:
    async def work(worker: Worker) -> None:
        await value(worker, "keep", value=1)
        for method in ("refuse", "fail", "blunder"):
            with pytest.raises((ToolError, InfrastructureError, WorkerError)):
                await worker.call(method, 20.0)
        assert await value(worker, "keep", value=2) == [1, 2]

    with_worker(sandbox, work)


def test_what_never_returns_blocks_neither_the_loop_nor_anybody_else(sandbox: Sandbox) -> None:
    async def work(worker: Worker) -> None:
        other = await sandbox.worker()
        hanging = asyncio.create_task(worker.call("spin", 0.5))
        for number in range(5):
            assert len(await value(other, "keep", value=number)) == number + 1
        assert not hanging.done() or number == 4
        with pytest.raises(WorkerTimeout, match=r"tool did not answer within 0\.5 s"):
            await hanging
        await other.close()

    with_worker(sandbox, work)


@pytest.mark.parametrize("count", [1 << 16, 1 << 22])
def test_an_answer_beyond_the_limit_is_refused(sandbox: Sandbox, count: int) -> None:
    async def work(worker: Worker) -> None:
        assert len(await value(worker, "say", count=(1 << 16) - 100)) == (1 << 16) - 100
        with pytest.raises(WorkerError, match="tool answered too much"):
            await worker.call("say", 20.0, count=count)

    with_worker(sandbox, work)


def test_a_frame_that_declares_too_much_is_not_waited_for(sandbox: Sandbox) -> None:
    async def work(worker: Worker) -> None:
        with pytest.raises(WorkerError, match="tool answered too much"):
            await worker.call("declare", 60.0, length=(1 << 16) + 1)

    with_worker(sandbox, work)


@pytest.mark.parametrize("backend", ["bubblewrap", "process", "plain"])
def test_once_closed_nothing_of_a_worker_is_there_any_more(backend: str) -> None:
    """Not a moment later: the next thing to happen may be its judgement."""
    box = made(backend)

    async def closed() -> list[psutil.Process]:
        server = psutil.Process(box.pid)
        before = server.children(recursive=True)
        worker = await box.worker()
        await worker.call("multiply", 20.0)
        below = [process for process in server.children(recursive=True) if process not in before]
        await worker.close()
        return below

    try:
        below = asyncio.run(closed())
        # Who let go of the leash may not have ended itself yet: the keeper, alone.
        left = [process for process in below if process.is_running()]
        assert len(below) >= 6 and len(left) <= 1, left
    finally:
        box.close()


def test_a_request_beyond_the_limit_is_refused(sandbox: Sandbox) -> None:
    async def work(worker: Worker) -> None:
        with pytest.raises(WorkerError, match="tool call too large"):
            await worker.call("keep", 20.0, value="x" * (9 << 20))
        assert len(await value(worker, "say", count=5)) == 5

    with_worker(sandbox, work)


def test_another_fork_server_is_started_when_one_has_died() -> None:
    box = made("process")
    try:
        assert with_worker(box, lambda worker: value(worker, "keep", value=1)) == [1]
        first = box.pid
        box._server.kill()
        box._server.wait()
        assert with_worker(box, lambda worker: value(worker, "keep", value=2)) == [2]
        assert box.pid != first
    finally:
        box.close()


def test_a_service_that_cannot_be_made_is_named() -> None:
    with pytest.raises(
        InfrastructureError, match=r"sandbox process: .*ValueError: this service cannot be made"
    ):
        made("process", broken=True)


@pytest.mark.parametrize("backend", ["bubblewrap", "process", "plain"])
def test_nothing_outlives_an_actor_that_is_killed(backend: str, tmp_path: Path) -> None:
    if backend == "bubblewrap" and (reason := why_not_bubblewrap()):
        pytest.skip(f"bubblewrap does not work here: {reason}")
    code = f"""
import asyncio, sys
sys.path.insert(0, {str(FOLDER)!r})
from slipstream.config import SandboxConfig
from slipstream.tools.sandbox import Sandbox
async def main():
    box = Sandbox({"process" if backend == "plain" else backend!r},
                  service="bench_service:bench", options={{}}, config=SandboxConfig(),
                  namespaces={backend != "plain"})
    worker = await box.worker()
    print(box._scratch if box.backend == "process" else "", flush=True)
    await worker.call("spin", 600.0)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as actor:
        assert actor.stdout is not None
        scratch = actor.stdout.readline().strip()
        below = psutil.Process(actor.pid).children(recursive=True)
        assert len(below) >= 3
        actor.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(process.is_running() for process in below), "processes left over")
    if scratch:
        wait_until(lambda: not Path(scratch).exists(), "a scratch folder is left over")


def test_bubblewrap_asked_for_in_vain_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not_bubblewrap.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    try:
        with pytest.raises(
            ConfigurationError, match=r'environment\.sandbox = "bubblewrap".*expected it on PATH'
        ):
            choose("bubblewrap")
        assert choose("process") == "process"
        assert choose("auto") == "process"
    finally:
        why_not_bubblewrap.cache_clear()


def test_auto_takes_bubblewrap_where_it_works() -> None:
    assert choose("auto") == ("process" if why_not_bubblewrap() else "bubblewrap")


def test_a_closed_sandbox_leaves_no_folder() -> None:
    box = made("process")
    scratch = Path(box._scratch)
    assert scratch.is_dir()
    box.close()
    assert not scratch.exists()
