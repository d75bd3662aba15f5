"""The tool cache: equal results with and without it, and nothing that happens to its file costs a call."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from slipstream.config import EnvironmentConfig, RewardConfig, load_config
from slipstream.environments.research import factory as research
from slipstream.errors import ConfigurationError, InfrastructureError, ToolError
from slipstream.interfaces import AssistantMessage, Transition
from slipstream.tools.cache import FILE, ToolCache, cache_of, in_folder
from slipstream.types import Split, TaskAttempt, ToolStatus

RESULTS: list[Any] = [
    "",
    "no résults ☃",
    None,
    0,
    -(1 << 63),
    1.5,
    True,
    b"\0\xff",
    [1, "a", [None]],
    {"a": {}},
]


class Strange:
    """No plain data; each process calls it alike."""

    def __repr__(self) -> str:
        return "strange"


STRANGE = Strange()


class Tool:
    """Counts how often it is really called."""

    def __init__(self, *results: Any) -> None:
        self.calls = 0
        self._results = list(results)

    async def __call__(self) -> Any:
        self.calls += 1
        result = self._results[min(self.calls, len(self._results)) - 1]
        if isinstance(result, BaseException):
            raise result
        return result


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ToolCache]:
    kept = ToolCache("world", tmp_path / FILE)
    yield kept
    kept.close()


def called(cache: ToolCache, tool: Callable[[], Awaitable[Any]], *, name: str = "look", version: str = "1",
           arguments: Any = "Ada", state: Any = 7) -> tuple[Any, bool]:  # fmt: skip
    return asyncio.run(cache.call(name, version, arguments, state, tool))


@pytest.mark.parametrize("result", RESULTS, ids=repr)
def test_a_result_comes_back_as_it_was(cache: ToolCache, result: Any) -> None:
    tool = Tool(result)
    assert called(cache, tool) == (result, False)
    again, cached = called(cache, tool)
    assert (again, type(again), cached, tool.calls) == (result, type(result), True, 1)
    assert (cache.hits, cache.misses) == (1, 1)


@pytest.mark.parametrize(
    "result", [(1, 2), {1: 2}, {"a": {1}}, ToolStatus.OK, 1 << 63, "\ud800", STRANGE, [("a",)]], ids=repr
)
def test_what_would_come_back_changed_is_not_kept(cache: ToolCache, result: Any) -> None:
    tool = Tool(result)
    assert [called(cache, tool) for _ in range(2)] == [(result, False)] * 2
    assert tool.calls == 2


@pytest.mark.parametrize(
    "other",
    [
        {"name": "open"},
        {"version": "2"},
        {"arguments": "ada"},
        {"arguments": {"query": "Ada"}},
        {"state": 8},
        {"state": 7.0},
        {"state": "7"},
        {"state": None},
    ],
    ids=str,
)
def test_whatever_a_result_depends_on_is_in_the_key(cache: ToolCache, other: dict[str, Any]) -> None:
    assert called(cache, Tool("one")) == ("one", False)
    assert called(cache, Tool("other"), **other) == ("other", False)
    assert called(cache, Tool("never")) == ("one", True)


def test_environments_do_not_share_results(cache: ToolCache, tmp_path: Path) -> None:
    called(cache, Tool("one"))
    with closing(ToolCache("another", tmp_path / FILE)) as other:
        assert called(other, Tool("other")) == ("other", False)


def test_arguments_have_one_spelling(cache: ToolCache) -> None:
    called(cache, Tool("one"), arguments={"a": 1, "b": [2]})
    assert called(cache, Tool("never"), arguments={"b": [2], "a": 1}) == ("one", True)
    assert called(cache, Tool("two"), arguments={"a": float("nan"), "b": [2]}) == ("two", False)
    assert called(cache, Tool("three"), arguments={"a": None, "b": [2]}) == ("three", False)


@pytest.mark.parametrize("arguments", [STRANGE, 1 << 70, "\ud800", {"a": STRANGE}], ids=repr)
def test_without_a_spelling_the_tool_is_called(cache: ToolCache, arguments: Any) -> None:
    tool = Tool("one")
    assert [called(cache, tool, arguments=arguments) for _ in range(2)] == [("one", False)] * 2
    assert tool.calls == 2


@pytest.mark.parametrize("error", [InfrastructureError("gone"), ToolError("refused"), OSError("reset")])
def test_failures_are_never_kept(cache: ToolCache, error: Exception) -> None:
    tool = Tool(error, "one")
    with pytest.raises(type(error)):
        called(cache, tool)
    assert called(cache, tool) == ("one", False)
    assert called(cache, tool) == ("one", True)


def test_equal_calls_at_one_time_are_one(cache: ToolCache) -> None:
    """The first one works; the others get results of their own, which they may change."""

    async def all_at_once() -> list[tuple[Any, bool]]:
        open_gate = asyncio.Event()
        calls = 0

        async def slow() -> list[int]:
            nonlocal calls
            calls += 1
            await open_gate.wait()
            return [calls]

        waiting = [asyncio.create_task(cache.call("look", "1", "Ada", 7, slow)) for _ in range(5)]
        await asyncio.sleep(0)
        open_gate.set()
        return await asyncio.gather(*waiting)

    results = asyncio.run(all_at_once())
    assert results == [([1], False)] + [([1], True)] * 4
    results[1][0].append(2)
    assert results[2][0] == [1]


@pytest.mark.parametrize("end", ["fails", "is cancelled", "cannot be kept"])
def test_when_the_first_call_ends_without_a_result_the_next_one_works(cache: ToolCache, end: str) -> None:
    async def all_at_once() -> list[Any]:
        gates = [asyncio.Event(), asyncio.Event()]
        calls = 0

        async def slow() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                return "one"
            await gates[0].wait()
            if end == "fails":
                raise InfrastructureError("gone")
            return STRANGE

        waiting = [asyncio.create_task(cache.call("look", "1", "Ada", 7, slow)) for _ in range(3)]
        await asyncio.sleep(0)
        if end == "is cancelled":
            waiting[0].cancel()
        gates[0].set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert calls == 2
        return results

    results = asyncio.run(all_at_once())
    assert [type(results[0])] == [{"fails": InfrastructureError, "is cancelled": asyncio.CancelledError}.get(
        end, tuple
    )]  # fmt: skip
    assert sorted(cached for _, cached in results[1:]) == [False, True]
    assert {value for value, _ in results[1:]} == {"one"}


def test_who_waits_for_an_equal_call_goes_on_one_round_of_the_loop_after_it(cache: ToolCache) -> None:
    """In each round the policy may have a pass."""

    async def rounds_of_each() -> list[int]:
        gate, rounds, ended = asyncio.Event(), 0, []

        async def slow() -> str:
            await gate.wait()
            return "one"

        async def call() -> None:
            await cache.call("look", "1", "Ada", 7, slow)
            ended.append(rounds)

        async with asyncio.TaskGroup() as calls:
            for _ in range(4):
                calls.create_task(call())
            for _ in range(8):
                await asyncio.sleep(0)
            gate.set()
            for _ in range(8):
                rounds += 1
                await asyncio.sleep(0)
        return ended

    first, *others = asyncio.run(rounds_of_each())
    assert others == [first + 1] * 3


@pytest.mark.parametrize("fails", [False, True])
def test_equal_calls_of_two_processes_are_one(cache: ToolCache, tmp_path: Path, fails: bool) -> None:
    """Two open files stand for two processes; when the first call fails the other one works."""

    async def both() -> list[Any]:
        gate, calls = asyncio.Event(), 0

        async def slow() -> str:
            nonlocal calls
            calls += 1
            if calls == 1:
                await gate.wait()
                if fails:
                    raise InfrastructureError("gone")
            return f"call {calls}"

        with closing(ToolCache("world", tmp_path / FILE)) as other:
            waiting = [
                asyncio.create_task(one.call("look", "1", "Ada", 7, slow)) for one in (cache, other, other)
            ]
            for _ in range(8):
                await asyncio.sleep(0)
            assert calls == 1
            gate.set()
            return await asyncio.gather(*waiting, return_exceptions=True)

    first, *others = asyncio.run(both())
    if fails:
        assert isinstance(first, InfrastructureError)
        assert others == [("call 2", False), ("call 2", True)]
    else:
        assert [first, *others] == [("call 1", False), ("call 1", True), ("call 1", True)]


HOLDER = """
import asyncio, sys
from pathlib import Path
from slipstream.tools.cache import ToolCache
cache = ToolCache("world", Path(sys.argv[1]))
async def compute():
    print("called", flush=True)
    await asyncio.Event().wait()
asyncio.run(cache.call("look", "1", "Ada", 7, compute))
"""


def test_a_process_that_is_killed_in_a_call_leaves_it_to_the_next(cache: ToolCache, tmp_path: Path) -> None:
    async def followed(holder: subprocess.Popen[bytes]) -> tuple[Any, bool]:
        waiting = asyncio.create_task(cache.call("look", "1", "Ada", 7, Tool("mine")))
        done, _ = await asyncio.wait({waiting}, timeout=0.05)
        assert not done, "the other process is at it"
        holder.send_signal(signal.SIGKILL)
        return await waiting

    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / FILE)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"called\n"
        assert asyncio.run(followed(holder)) == ("mine", False)


def test_without_claims_each_process_calls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f"{FILE}-calls").mkdir()
    with closing(ToolCache("world", tmp_path / FILE)) as cache:
        assert called(cache, Tool("one")) == ("one", False)
        assert called(cache, Tool("never")) == ("one", True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_processes_share_the_file(cache: ToolCache, tmp_path: Path) -> None:
    called(cache, Tool("one"))
    with closing(ToolCache("world", tmp_path / FILE)) as other:
        assert called(other, Tool("never")) == ("one", True)


def test_off_calls_every_time(tmp_path: Path) -> None:
    tool = Tool((1, 2))
    for given in ("off", "run"):
        cache = cache_of(EnvironmentConfig(tool_cache=given))
        assert [called(cache, tool) for _ in range(2)] == [((1, 2), False)] * 2
    assert tool.calls == 4
    assert in_folder(EnvironmentConfig(tool_cache="run"), tmp_path).tool_cache == str(tmp_path / FILE)
    assert in_folder(EnvironmentConfig(), tmp_path).tool_cache == "off"


def test_a_path_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"environment\.tool_cache: .*file/cache cannot be used"):
        cache_of(EnvironmentConfig(tool_cache=str(tmp_path / "file" / "cache")))
    with pytest.raises(ConfigurationError, match=r"environment\.tool_cache must be \"off\" in a sandbox"):
        load_config("research", ["environment.tool_cache=run", "environment.sandbox=process"])


def damage(path: Path, how: str) -> None:
    """Change a closed file."""
    if how == "no database":
        path.write_bytes(b"not a database, and long enough to be looked at" * 100)
    elif how == "torn":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "another table":
        with closing(sqlite3.connect(path)) as file, file:
            file.executescript("DROP TABLE results; CREATE TABLE results (number INTEGER)")
    else:
        with closing(sqlite3.connect(path)) as file, file:
            changed = {"value": b"\xa3two", "mark": 3}[how]
            file.execute(f"UPDATE results SET {how} = ?", (changed,))


@pytest.mark.parametrize("how", ["no database", "torn", "another table", "value", "mark"])
def test_a_damaged_file_costs_nothing_but_its_use(tmp_path: Path, how: str) -> None:
    path = tmp_path / FILE
    with closing(ToolCache("world", path)) as cache:
        for number in range(50):
            called(cache, Tool("one"), state=number)
    damage(path, how)
    tool = Tool("true")
    with closing(ToolCache("world", path)) as cache:
        assert called(cache, tool) == ("true", False)
        if how in {"value", "mark"}:  # mended by the next call
            assert called(cache, tool) == ("true", True)


def test_damage_in_mid_run_ends_the_use_with_one_warning(
    cache: ToolCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    called(cache, Tool("one"))
    with closing(sqlite3.connect(tmp_path / FILE)) as file, file:
        file.execute("DROP TABLE results")
    tool = Tool("two")
    assert [called(cache, tool) for _ in range(3)] == [("two", False)] * 3
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        f"tool cache {tmp_path / FILE} is not used any more"
    ]


def test_while_another_process_writes_results_wait_in_memory(cache: ToolCache, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        tool = Tool("one")
        assert [called(cache, tool) for _ in range(2)] == [("one", False), ("one", True)]
        assert not other.execute("SELECT count(*) FROM results").fetchone()[0]
        other.execute("ROLLBACK")
        called(cache, Tool("two"), state=8)
        assert other.execute("SELECT count(*) FROM results").fetchone()[0] == 2


def test_the_oldest_results_make_room(tmp_path: Path) -> None:
    limit = 1 << 20
    with closing(ToolCache("world", tmp_path / FILE, limit_bytes=limit)) as cache:
        for number in range(1024):
            called(cache, Tool("x" * 4000), state=number)
        assert called(cache, Tool("again"), state=1023)[1]
        assert not called(cache, Tool("again"), state=0)[1]
        assert called(cache, Tool("y" * (limit // 32)), state="large") == ("y" * (limit // 32), False)
        assert not called(cache, Tool("again"), state="large")[1], "one result may not displace many"
    with closing(sqlite3.connect(tmp_path / FILE)) as file:
        pages = file.execute("PRAGMA page_count").fetchone()[0]
    assert pages * 4096 < 2.5 * limit, "between two looks it grows by 256 results"


WRITER = """
import asyncio, sys
from pathlib import Path
from slipstream.tools.cache import ToolCache
cache, begin = ToolCache("world", Path(sys.argv[1])), int(sys.argv[2])
async def work():
    for number in range(begin, 1 << 60):
        async def compute(): return f"result {number % 500}"
        value, _ = await cache.call("look", "1", number % 500, None, compute)
        assert value == f"result {number % 500}", value
        if number == begin + 200: print("busy", flush=True)
asyncio.run(work())
"""


def test_killed_writers_leave_a_whole_file(tmp_path: Path) -> None:
    """Three processes share a file and are killed in the midst of their writing, twice."""
    for _ in range(2):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path / FILE), str(start)], stdout=subprocess.PIPE
            )
            for start in (0, 100, 200)
        ]
        for writer in writers:
            with writer:
                assert writer.stdout is not None and writer.stdout.readline() == b"busy\n"
                writer.send_signal(signal.SIGKILL)
    with closing(sqlite3.connect(tmp_path / FILE)) as file:
        assert file.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    with closing(ToolCache("world", tmp_path / FILE)) as cache:
        values = [called(cache, Tool("true"), arguments=number, state=None) for number in range(500)]
    assert {value for value, cached in values if cached} <= {f"result {number}" for number in range(500)}
    assert sum(cached for _, cached in values) > 200


def test_research_looks_the_same_through_the_cache(tmp_path: Path) -> None:
    """Search and open are answered once for all attempts; seeded failures stay each attempt's own."""

    def episodes(cache: str) -> list[Transition]:
        config = EnvironmentConfig(tool_failure_rate=0.3, tool_cache=cache)
        factory = research(config, RewardConfig())
        task = factory.tasks.task(Split.TRAIN, 3)

        async def play(attempt: int) -> list[Transition]:
            environment = factory.make()
            await environment.reset(task, TaskAttempt(task=3, seed=1, group=3, attempt=attempt))
            calls = [("search", {"query": task.data["person"]})] * 3
            calls += [("open", {"document": number}) for number in ("10", *task.data["facts"], "nothing")] * 2
            return [
                await environment.step(AssistantMessage(text="", name=name, arguments=arguments))
                for name, arguments in calls
            ]

        shown = [transition for attempt in range(4) for transition in asyncio.run(play(attempt))]
        factory.close()
        return shown

    plain, kept, again = episodes("off"), episodes(str(tmp_path / FILE)), episodes(str(tmp_path / FILE))
    assert [each.observation for each in plain] == [each.observation for each in kept]
    assert [each.observation for each in plain] == [each.observation for each in again]
    assert {each.observation for each in plain} > {"error: no such document", "error: timeout"}
    calls = [[each.call for each in shown] for shown in (plain, kept, again)]
    assert not any(call.cached for call in calls[0] if call)
    fault = [
        each.observation in {"error: timeout", "error: unavailable", "error: rate limit"} for each in plain
    ]
    assert [call.cached for call in calls[2] if call] == [not failed for failed in fault]
    assert sum(not call.cached for call in calls[1] if call) == sum(fault) + 4
