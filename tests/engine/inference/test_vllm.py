"""The vLLM backend over a stand-in's HTTP: deadlines, refusals, answers cut off or malformed, the fence."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest

from slipstream.deadlines import Deadline
from slipstream.errors import (
    ConfigurationError,
    DeadlineError,
    InfrastructureError,
    ProtocolError,
    SlipstreamError,
)
from slipstream.inference.vllm.answers import MAX_ABORTS
from slipstream.inference.vllm.backend import VllmBackend
from slipstream.inference.vllm.contract import VllmClient, VllmDeadlines
from slipstream.inference.vllm.identity import vocabulary_digest
from slipstream.inference.vllm.server import ServerOptions, VllmServer
from slipstream.inference.vllm.transports import FilesystemTransport, Held, Offer, WeightTransport
from slipstream.synthetic import update
from slipstream.types import Sampling, WeightUpdate

SPEC = importlib.util.spec_from_file_location("vllm_stand_in", Path(__file__).with_name("vllm_stand_in.py"))
assert SPEC is not None and SPEC.loader is not None
vllm_stand_in = sys.modules["vllm_stand_in"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(vllm_stand_in)

PROMPT = np.array([1, 2, 3], np.int32)
GENERATE = "/inference/v1/generate"
T = TypeVar("T")


class Tokenizer:
    """That of the stand-in."""

    def get_vocab(self) -> dict[str, int]:
        return dict(vllm_stand_in.VOCABULARY)


@pytest.fixture
def server() -> Iterator[Any]:
    with vllm_stand_in.stand_in() as state:
        state.vocabulary = vocabulary_digest(Tokenizer().get_vocab())
        yield state


def run(
    server: Any,
    work: Callable[[VllmBackend], Awaitable[T]],
    *,
    generate_s: float = 20.0,
    attach: bool = True,
    transport: WeightTransport | None = None,
) -> T:
    async def attached() -> T:
        deadlines = VllmDeadlines(generate_s=generate_s, control_s=20.0, update_s=20.0)
        async with VllmClient(server.url, deadlines=deadlines) as client, asyncio.timeout(30):
            backend = VllmBackend(client, stop_token=63, transport=transport)
            if attach:
                await backend.attach(Tokenizer())
            return await work(backend)

    return asyncio.run(attached())


def announced(serial: int) -> WeightUpdate:
    return replace(update(serial, step=serial), canary_logprobs=(-1.0, -1.0))


async def loaded(backend: VllmBackend, serial: int = 7) -> VllmBackend:
    await backend.load(announced(serial))
    return backend


def test_a_message_is_asked_for_and_answered(server: Any) -> None:
    async def work(backend: VllmBackend) -> Any:
        await loaded(backend)
        sampling = Sampling(temperature=0.5, top_p=0.9, max_tokens=3)
        return await backend.generate(PROMPT, sampling, rollout_id=11)

    completion = run(server, work)
    assert completion.token_ids.tolist() == [4, 5, 6]
    assert completion.versions.tolist() == [7, 7, 7]
    assert completion.logprobs.tolist() == [-1.0, -1.0, -1.0]
    assert not completion.stopped
    asked = server.bodies[GENERATE][-1]
    assert asked["token_ids"] == [1, 2, 3]
    expected = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 3, "stop_token_ids": [63], "ignore_eos": True}
    assert expected.items() <= asked["sampling_params"].items()


def test_an_update_goes_in_order_and_never_keeps_what_was_cached(server: Any) -> None:
    run(server, loaded)
    first = server.calls.index("/pause?mode=keep&clear_cache=true")
    assert server.calls[first : first + 7] == [
        "/pause?mode=keep&clear_cache=true",
        "/collective_rpc",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/resume",
    ]
    assert server.bodies["/finish_weight_update"] == [{"weight_version": "7"}]


def test_weights_that_nobody_proved_are_not_sampled_from(server: Any) -> None:
    with pytest.raises(InfrastructureError, match='version "default", which nobody has proven'):
        run(server, lambda backend: backend.generate(PROMPT, Sampling(), rollout_id=1))


def test_an_answer_cut_off_is_gone_on_with(server: Any) -> None:
    """Its tokens are kept, whatever version they are of, and the rest is drawn by numbers of its own."""

    async def work(backend: VllmBackend) -> Any:
        await loaded(backend)
        server.aborts_after = [2, 0]
        return await backend.generate(PROMPT, Sampling(max_tokens=5), rollout_id=11)

    completion = run(server, work)
    assert completion.token_ids.tolist() == [4, 5, 6, 7, 8]
    asked = server.bodies[GENERATE][-3:]
    assert [body["token_ids"] for body in asked] == [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
    assert [body["sampling_params"]["max_tokens"] for body in asked] == [5, 3, 3]
    seeds = [body["sampling_params"]["seed"] for body in asked]
    assert seeds[0] != seeds[1] == seeds[2]


def test_an_answer_cut_off_again_and_again_is_given_up(server: Any) -> None:
    async def work(backend: VllmBackend) -> None:
        await loaded(backend)
        server.aborts_after = [0] * 100
        await backend.generate(PROMPT, Sampling(max_tokens=5), rollout_id=11)

    with pytest.raises(InfrastructureError, match=f"cut one answer off {MAX_ABORTS} times"):
        run(server, work)


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        (503, InfrastructureError, "HTTP 503: .*planted"),
        (429, InfrastructureError, "HTTP 429"),
        (400, ProtocolError, "HTTP 400: .*planted"),
        (403, ProtocolError, "HTTP 403"),
        ("cut", InfrastructureError, "RemoteProtocolError|ReadError"),
        ("hang", DeadlineError, r"waited 0.5 s for /inference/v1/generate of http"),
        (b"", ProtocolError, "an answer of /inference/v1/generate as documented"),
        (b"[]", ProtocolError, "an answer of /inference/v1/generate as documented"),
        (b"\xff\xfe", ProtocolError, "an answer of /inference/v1/generate as documented"),
        (b'{"choices": []}', ProtocolError, "expected one choice, got 0"),
    ],
)
def test_each_failure_of_an_answer_has_its_error(
    server: Any, fault: Any, error: type[SlipstreamError], said: str
) -> None:
    server.faults[GENERATE] = [fault]
    with pytest.raises(error, match=said):
        run(server, lambda backend: backend.generate(PROMPT, Sampling(), rollout_id=1), generate_s=0.5)


SOUND = {
    "finish_reason": "length",
    "token_ids": [4, 5],
    "logprobs": {"content": [{"token_id": 4, "logprob": -1.0}, {"token_id": 5, "logprob": -1.0}]},
    "weight_versions": [{"version": "7", "start": 0, "end": 2}],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token_ids": [4]}, "log-probability of each of 1 tokens, got 2"),
        ({"token_ids": [5, 4]}, "log-probability of each of 2 tokens"),
        ({"logprobs": None}, "log-probability of each of 2 tokens, got 0"),
        ({"weight_versions": None}, "versions of all 2 tokens"),
        ({"weight_versions": [{"version": "7", "start": 0, "end": 1}]}, "versions of all 2 tokens"),
        ({"weight_versions": [{"version": "7", "start": 1, "end": 2}]}, "versions of all 2 tokens"),
        ({"weight_versions": [{"version": "7", "start": 0, "end": 3}]}, "versions of all 2 tokens"),
        (
            {
                "weight_versions": [
                    {"version": "7", "start": 0, "end": 2},
                    {"version": "8", "start": 2, "end": 2},
                ]
            },
            "versions of all 2 tokens",
        ),
        ({"finish_reason": "tired"}, "expected stop, length or abort, got 'tired'"),
    ],
)
def test_an_answer_at_odds_with_itself_is_refused(server: Any, change: dict[str, Any], said: str) -> None:
    server.faults[GENERATE] = [json.dumps({"choices": [SOUND | change]}).encode()]
    with pytest.raises(ProtocolError, match=said):
        run(server, lambda backend: backend.generate(PROMPT, Sampling(), rollout_id=1))


def test_an_answer_whose_logprobs_are_not_numbers_is_refused(server: Any) -> None:
    text = json.dumps({"choices": [SOUND]}).replace("-1.0", "-1e999")
    server.faults[GENERATE] = [text.encode()]
    with pytest.raises(SlipstreamError):
        run(server, lambda backend: backend.generate(PROMPT, Sampling(), rollout_id=1))


@pytest.mark.parametrize(
    "path",
    ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"],
)
def test_an_update_is_made_again_whole_and_then_fences(server: Any, path: str) -> None:
    async def once(backend: VllmBackend) -> None:
        server.faults[path] = [500]
        await loaded(backend, 8)
        assert not backend.fenced
        assert sum(call.startswith("/pause") for call in server.calls) == 2

    async def twice(backend: VllmBackend) -> None:
        server.faults[path] = [500, 503]
        with pytest.raises(InfrastructureError, match=f"fenced and must be restarted: .*{path}: HTTP 503"):
            await loaded(backend, 9)
        asked = len(server.calls)
        for call in (backend.load(announced(10)), backend.generate(PROMPT, Sampling(), rollout_id=1)):
            with pytest.raises(InfrastructureError, match="fenced and must be restarted"):
                await call
        assert len(server.calls) == asked

    run(server, once)
    run(server, twice)


class Asked(FilesystemTransport):
    """Remembers what it was told that the workers hold."""

    def __init__(self) -> None:
        self.told: list[Held | None] = []

    def offer(self, update: WeightUpdate, *, workers: int, held: Held | None = None) -> Offer:
        self.told.append(held)
        return super().offer(update, workers=workers, held=held)


HELD = {"serial": 3, "checksum64": f"{2**63 + 1:016x}"}


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([HELD], Held(serial=3, checksum64=2**63 + 1)),
        ([HELD, HELD], Held(serial=3, checksum64=2**63 + 1)),
        ([HELD, HELD | {"serial": 4}], None),
        ([HELD, None], None),
        ([None], None),
        ([], None),
    ],
)
def test_a_transport_is_told_what_all_workers_hold_but_at_the_second_try(
    server: Any, answers: list[Any], told: Held | None
) -> None:
    transport = Asked()

    async def work(backend: VllmBackend) -> None:
        server.faults["/update_weights"] = [500]
        server.results = {"slipstream_held": answers}
        await loaded(backend)

    run(server, work, transport=transport)
    assert transport.told == [told, None]


def test_workers_that_hold_nonsense_get_the_whole(server: Any) -> None:
    transport = Asked()

    async def work(backend: VllmBackend) -> None:
        server.results = {"slipstream_held": [{"serial": "three"}]}
        await loaded(backend)

    run(server, work, transport=transport)
    assert transport.told == [None]


class Waits(FilesystemTransport):
    """Sends until it is withdrawn."""

    def __init__(self) -> None:
        self.withdrawn = threading.Event()

    def offer(self, update: WeightUpdate, *, workers: int, held: Held | None = None) -> Offer:
        offer = super().offer(update, workers=workers, held=held)
        return replace(offer, send=lambda: self.withdrawn.wait(20) and None, withdraw=self.withdrawn.set)


def test_an_offer_that_the_server_refused_is_withdrawn(server: Any) -> None:
    """Else its thread would wait for workers that do not come, and hold up the process's end."""
    transport = Waits()

    async def work(backend: VllmBackend) -> None:
        server.faults["/update_weights"] = [500]
        await loaded(backend)

    run(server, work, transport=transport)
    assert transport.withdrawn.is_set()


def test_a_server_that_went_on_sampling_gets_no_second_try(server: Any) -> None:
    """Else tokens of a first, wrong load would pass under the serial that the second proves."""

    async def work(backend: VllmBackend) -> None:
        server.faults["/resume"] = [500]
        with pytest.raises(InfrastructureError, match="fenced"):
            await loaded(backend)
        assert server.calls.count("/update_weights") == 1

    run(server, work)


def test_a_fence_ends_what_waits_for_the_server(server: Any) -> None:
    async def work(backend: VllmBackend) -> None:
        await loaded(backend)
        server.faults[GENERATE] = ["hang"]
        waiting = asyncio.create_task(backend.generate(PROMPT, Sampling(), rollout_id=1))
        asked = len(server.bodies[GENERATE])
        while len(server.bodies[GENERATE]) == asked:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        server.faults["/update_weights"] = [500, 500]
        with pytest.raises(InfrastructureError, match="fenced"):
            await loaded(backend, 8)
        with pytest.raises(InfrastructureError, match="fenced"):
            await waiting

    run(server, work)


def test_a_prefix_cache_in_use_fails_the_update(server: Any) -> None:
    async def work(backend: VllmBackend) -> None:
        server.faults["/reset_prefix_cache"] = [b'{"success": false}'] * 2
        with pytest.raises(InfrastructureError, match="prefix cache is in use and was not reset"):
            await loaded(backend)

    run(server, work)


@pytest.mark.parametrize(
    ("proof", "said"),
    [
        ({"serial": 6, "checksum64": f"{1007:016x}"}, "expected serial 7, it holds 6"),
        ({"serial": 7, "checksum64": f"{1:016x}"}, "expected checksum"),
        ({"serial": 7}, "expected a proof"),
        ({"serial": 7, "checksum64": "x"}, "expected a proof"),
        (None, "expected a proof"),
    ],
)
def test_a_proof_that_is_none_fences(server: Any, proof: Any, said: str) -> None:
    async def work(backend: VllmBackend) -> None:
        sound = server.called
        server.called = lambda method: proof if method == "slipstream_proof" else sound(method)
        with pytest.raises(InfrastructureError, match=f"fenced.*{said}"):
            await loaded(backend)

    run(server, work)


def test_a_canary_off_by_more_than_the_tolerance_fences(server: Any) -> None:
    async def work(backend: VllmBackend) -> None:
        wrong = replace(announced(7), canary_logprobs=(-1.0, -1.1))
        with pytest.raises(InfrastructureError, match=r"fenced.*canary log-probabilities within"):
            await backend.load(wrong)

    run(server, work)


def test_a_stranger_is_refused_at_attach(server: Any) -> None:
    server.vocabulary = vocabulary_digest({"other": 0})
    with pytest.raises(ConfigurationError, match="expected the run's vocabulary"):
        run(server, lambda backend: backend.prove(announced(1)))


def test_nobody_there_is_an_infrastructure_failure(server: Any) -> None:
    server.url = "http://127.0.0.1:1"
    with pytest.raises(InfrastructureError, match="ConnectError"):
        run(server, lambda backend: backend.prove(announced(1)))


def fake_program(folder: Path, source: str) -> Path:
    """Return a program that stands for `vllm`."""
    path = folder / "vllm"
    path.write_text(f"#!{sys.executable}\n{source}")
    path.chmod(0o755)
    return path


def test_a_program_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    server = VllmServer(ServerOptions(program="no-such-vllm", model="m"), folder=tmp_path)
    with pytest.raises(ConfigurationError, match='got "no-such-vllm"'):
        asyncio.run(server.start())


def test_a_server_that_ends_at_once_says_its_last_lines(tmp_path: Path) -> None:
    program = fake_program(tmp_path, "import sys; print('no such model'); sys.exit(3)")
    server = VllmServer(ServerOptions(program=str(program), model="m"), folder=tmp_path / "server")
    with pytest.raises(InfrastructureError, match=r"ended with exit code 3(.|\n)*no such model"):
        asyncio.run(server.start())
    assert server.pid is None


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    program = fake_program(tmp_path, "import time; time.sleep(600)")
    options = ServerOptions(program=str(program), model="m", start_s=0.3)
    server = VllmServer(options, folder=tmp_path / "server")
    with pytest.raises(DeadlineError, match="a first token of http"):
        asyncio.run(server.start())
    assert server.pid is None


def test_a_start_that_is_given_up_ends_all_it_started(tmp_path: Path) -> None:
    source = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path / 'new')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'pids')!r})\n"
        "time.sleep(600)\n"
    )
    options = ServerOptions(program=str(fake_program(tmp_path, source)), model="m", stop_s=0.5)
    server = VllmServer(options, folder=tmp_path / "server")

    async def give_up() -> None:
        starting = asyncio.create_task(server.start())
        async with asyncio.timeout(60):
            while not (tmp_path / "pids").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        starting.cancel()
        await asyncio.wait([starting], timeout=20)

    asyncio.run(give_up())
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    # SIGKILL was sent to all; only the group's leader was waited for.
    deadline = Deadline(20, "test", "the end of what the server started")
    while any(alive(pid) for pid in pids):
        deadline.check()
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_server_ends_with_the_process_that_wanted_it(tmp_path: Path) -> None:
    program = fake_program(
        tmp_path,
        "import os, pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"path = pathlib.Path({str(tmp_path / 'pids')!r})\n"
        "path.with_suffix('.new').write_text(f'{os.getpid()} {child.pid} {os.getppid()}')\n"
        "path.with_suffix('.new').rename(path)\n"
        "time.sleep(600)\n",
    )
    wants = (
        "import asyncio, pathlib\n"
        "from slipstream.inference.vllm.server import ServerOptions, VllmServer\n"
        f"options = ServerOptions(program={str(program)!r}, model='m')\n"
        f"asyncio.run(VllmServer(options, folder=pathlib.Path({str(tmp_path / 'server')!r})).start())\n"
    )
    wanting = subprocess.Popen([sys.executable, "-c", wants])
    deadline = Deadline(60.0, "test", "the program's start and its end")
    while not (tmp_path / "pids").exists():
        deadline.check()
        time.sleep(0.02)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(alive(pid) for pid in pids)
    wanting.kill()
    wanting.wait(timeout=10)
    while any(alive(pid) for pid in pids):
        deadline.check()
        time.sleep(0.02)


def test_a_server_sees_only_the_two_packages_of_this_process(tmp_path: Path) -> None:
    source = (
        "import os; print('PATH=' + os.environ['PYTHONPATH']); print(os.listdir(os.environ['PYTHONPATH']))"
    )
    program = fake_program(tmp_path, source)
    server = VllmServer(ServerOptions(program=str(program), model="m"), folder=tmp_path / "server")
    with pytest.raises(InfrastructureError, match="ended"):
        asyncio.run(server.start())
    log = server.log.read_text()
    assert f"PATH={tmp_path / 'server' / 'path'}" in log
    assert "slipstream" in log and "slipstream_kernels" in log and os.pathsep not in log.split("\n")[0]
