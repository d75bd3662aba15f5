"""Actors over several servers, through fronts: real sockets, servers whose answers and faults are planned."""

from __future__ import annotations

import asyncio
import importlib.util
import stat
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from slipstream.deadlines import within
from slipstream.errors import ConfigurationError, InfrastructureError, ProtocolError
from slipstream.http_server import HttpServer
from slipstream.inference.vllm import fleet as fleet_module
from slipstream.inference.vllm import serving
from slipstream.inference.vllm.backend import VllmBackend
from slipstream.inference.vllm.contract import VllmDeadlines
from slipstream.inference.vllm.fleet import Fleet
from slipstream.inference.vllm.front import Front, FrontClient
from slipstream.inference.vllm.identity import vocabulary_digest
from slipstream.inference.vllm.keeper import STARTS, Keeper, RunningServer
from slipstream.retries import Backoff
from slipstream.synthetic import update
from slipstream.types import Completion, Sampling, WeightProof, WeightUpdate

SPEC = importlib.util.spec_from_file_location("vllm_stand_in", Path(__file__).with_name("vllm_stand_in.py"))
assert SPEC is not None and SPEC.loader is not None
vllm_stand_in = sys.modules.setdefault("vllm_stand_in", importlib.util.module_from_spec(SPEC))
SPEC.loader.exec_module(vllm_stand_in)

PROMPT = np.array([1, 2, 3], np.int32)
GENERATE = "/inference/v1/generate"
SHORT = Sampling(max_tokens=4)
KEY = "open-sesame"


class Tokenizer:
    """That of the stand-in."""

    def get_vocab(self) -> dict[str, int]:
        return dict(vllm_stand_in.VOCABULARY)


def announced(serial: int) -> WeightUpdate:
    return replace(update(serial, step=serial), canary_logprobs=(-1.0, -1.0))


@dataclass(kw_only=True)
class World:
    """Servers behind one front, and an actor's fleet over them."""

    servers: list[Any]
    keepers: list[Keeper]
    fleet: Fleet
    url: str
    shown: list[WeightProof] = field(default_factory=list)

    def publish(self, serial: int) -> WeightUpdate:
        made = announced(serial)
        for keeper in self.keepers:
            keeper.offer(made)
        self.fleet.announce(made)
        return made

    async def loaded(self, serial: int) -> None:
        """Publish, and wait until every server has proven it."""
        self.publish(serial)
        for keeper in self.keepers:
            await within(keeper.proof(serial), 20.0, "test", f"a proof of {serial}")

    async def say(self, rollout: int = 1, sampling: Sampling = SHORT) -> Completion:
        return await self.fleet.generate(PROMPT, sampling, rollout_id=rollout)


def keeper(url: str, name: str, backoff_s: float = 0.05) -> Keeper:
    return Keeper(
        RunningServer(url),
        name=name,
        backend=lambda client: VllmBackend(client, stop_token=63),
        tokenizer=Tokenizer(),
        backoff=Backoff(first_s=backoff_s, longest_s=backoff_s),
    )


@pytest.fixture
def start() -> Iterator[Callable[[], Any]]:
    with ExitStack() as stack:

        def one() -> Any:
            server = stack.enter_context(vllm_stand_in.stand_in())
            server.vocabulary = vocabulary_digest(Tokenizer().get_vocab())
            return server

        yield one


@asynccontextmanager
async def world(folder: Path, servers: list[Any], *, generate_s: float = 20.0) -> AsyncIterator[World]:
    keepers = [keeper(server.url, f"serve-0/{index}") for index, server in enumerate(servers)]
    front = Front(keepers, key=KEY)
    server = HttpServer(front.app, who="serve")
    shown: list[WeightProof] = []

    async def show(proof: WeightProof) -> None:
        shown.append(proof)

    async with AsyncExitStack() as stack, asyncio.timeout(60):
        url = await server.start()
        stack.push_async_callback(front.close)
        stack.push_async_callback(server.stop)
        serving.announce(folder, "serve-0", url=url, key=KEY, count=len(servers))
        fleet = Fleet(
            folder, show=show, stop_token=63, max_tokens=64, most=8, tolerance=1e-3,
            deadlines=VllmDeadlines(generate_s=generate_s, control_s=20.0, update_s=20.0),
        )  # fmt: skip
        stack.push_async_callback(fleet.close)
        tasks = [asyncio.create_task(work) for work in (*(each.run() for each in keepers), fleet.run())]

        async def cancel() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        stack.push_async_callback(cancel)
        yield World(servers=servers, keepers=keepers, fleet=fleet, url=url, shown=shown)


def in_world(
    folder: Path, servers: list[Any], work: Callable[[World], Awaitable[Any]], *, generate_s: float = 20.0
) -> Any:
    async def run() -> Any:
        async with world(folder, servers, generate_s=generate_s) as made:
            return await work(made)

    return asyncio.run(run())


def test_tokens_name_the_life_that_sampled_them_and_its_proof_is_shown_first(
    tmp_path: Path, start: Callable[[], Any]
) -> None:
    async def work(w: World) -> tuple[Completion, list[WeightProof], str]:
        await w.loaded(7)
        return await w.say(), list(w.shown), w.keepers[0].life

    completion, shown, life = in_world(tmp_path, [start()], work)
    assert completion.token_ids.tolist() == [4, 5, 6, 7]
    assert completion.versions.tolist() == [7] * 4
    assert completion.samplers == {(life, 7)}
    assert life.startswith("serve-0/0#")
    assert [(proof.server, proof.serial) for proof in shown] == [(life, 7)]
    assert shown[0].checksum64 == announced(7).version.checksum64


def test_load_gives_the_proof_of_the_first_server_that_has_it(
    tmp_path: Path, start: Callable[[], Any]
) -> None:
    """The other one hangs in its update."""
    servers = [start(), start()]
    servers[1].faults["/update_weights"] = ["hang"]

    async def work(w: World) -> tuple[WeightProof, int, str]:
        loading = asyncio.create_task(w.fleet.load(announced(3)))
        w.publish(3)
        return await loading, w.fleet.serial, w.keepers[0].life

    proof, serial, life = in_world(tmp_path, servers, work)
    assert (proof.serial, serial, proof.server) == (3, 3, life)


def test_load_of_weights_that_a_newer_update_has_overtaken_gives_the_newer_proof(
    tmp_path: Path, start: Callable[[], Any]
) -> None:
    async def work(w: World) -> WeightProof:
        await w.loaded(9)
        return await w.fleet.load(announced(8))

    assert in_world(tmp_path, [start()], work).serial == 9


def test_a_server_that_fails_is_left_and_the_rollout_goes_on_elsewhere_with_its_tokens(
    tmp_path: Path, start: Callable[[], Any]
) -> None:
    """The first answer is cut off after two tokens; then that server breaks."""
    servers = [start(), start()]

    async def work(w: World) -> tuple[Completion, list[str]]:
        await w.loaded(7)
        for server in servers:
            server.aborts_after = [2]
        first, other = await _served_first(w, servers)
        other.aborts_after = []
        return await w.say(), [w.keepers[servers.index(each)].life for each in (first, other)]

    completion, lives = in_world(tmp_path, servers, work)
    assert completion.token_ids.tolist() == [4, 5, 6, 7]
    assert completion.samplers == {(life, 7) for life in lives}


async def _served_first(w: World, servers: list[Any]) -> tuple[Any, Any]:
    """Have rollout 1 stick to a server, which breaks after its next answer; return it and the other."""
    held = [server.aborts_after for server in servers]
    for server in servers:
        server.aborts_after = []
    completion = await w.say()
    ((life, _),) = completion.samplers
    index = next(i for i, each in enumerate(w.keepers) if each.life == life)
    for server, aborts in zip(servers, held, strict=True):
        server.aborts_after = aborts
    servers[index].faults[GENERATE] = [None, 500, 500, 500]
    return servers[index], servers[1 - index]


def test_a_refused_request_fails_alone(tmp_path: Path, start: Callable[[], Any]) -> None:
    """It would be refused again, and says nothing about the server, which others go on asking."""
    server = start()

    async def work(w: World) -> int:
        await w.loaded(7)
        server.faults[GENERATE] = [400]
        before = len(server.bodies[GENERATE])
        with pytest.raises(InfrastructureError, match="HTTP 400"):
            await w.say(1)
        assert w.fleet._router.place(2, time.monotonic()) == "serve-0/0"  # it does not rest
        return len(server.bodies[GENERATE]) - before

    assert in_world(tmp_path, [server], work) == 1


def test_a_front_that_is_gone_is_waited_for_until_the_deadline(
    tmp_path: Path, start: Callable[[], Any]
) -> None:
    async def work(w: World) -> None:
        await w.loaded(7)
        serving.announce(tmp_path, "serve-0", url="http://127.0.0.1:9", key=KEY, count=1)
        w.fleet._find()
        with pytest.raises(InfrastructureError, match="vLLM server of"):
            await w.say()

    in_world(tmp_path, [start()], work, generate_s=1.0)


def test_tokens_of_weights_nobody_proves_go_out_without_a_proof(
    tmp_path: Path, start: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the server samples from serial 8 while it has proven 7."""
    monkeypatch.setattr(fleet_module, "PROOF_S", 0.3)

    async def work(w: World) -> tuple[Completion, list[WeightProof]]:
        await w.loaded(7)
        w.servers[0].version = "8"
        return await w.say(), w.shown

    completion, shown = in_world(tmp_path, [start()], work)
    assert completion.versions.tolist() == [8] * 4
    assert shown == []


def test_a_wrong_proof_is_not_shown(tmp_path: Path, start: Callable[[], Any]) -> None:
    """The hub published other weights under this serial than the server has proven."""

    async def work(w: World) -> list[WeightProof]:
        await w.loaded(7)
        other = announced(7)
        w.fleet.announce(replace(other, version=replace(other.version, checksum64=1)))
        await w.say()
        return w.shown

    assert in_world(tmp_path, [start()], work) == []


def test_tokens_wait_for_the_proof_of_an_update_that_is_under_way(
    tmp_path: Path, start: Callable[[], Any]
) -> None:
    """The server samples from serial 8 before its proof is done: the tokens come out after it."""
    server = start()

    async def work(w: World) -> None:
        await w.loaded(7)
        server.version = "8"
        saying = asyncio.create_task(w.say())
        await _until(lambda: GENERATE in server.calls[-3:] and len(server.bodies[GENERATE]) > 4)
        assert not saying.done()
        await w.loaded(8)
        completion = await saying
        assert completion.versions.tolist() == [8] * 4
        assert [proof.serial for proof in w.shown] == [8]

    in_world(tmp_path, [server], work)


def test_a_fenced_server_begins_a_new_life_and_proves_the_newest_weights_again(
    tmp_path: Path, start: Callable[[], Any]
) -> None:
    server = start()

    async def work(w: World) -> None:
        await w.loaded(7)
        first = w.keepers[0].life
        server.faults["/update_weights"] = [500, 500]  # whole, and once more: then it is fenced
        w.publish(8)
        proof = await within(w.keepers[0].proof(8), 20.0, "test", "a proof")
        assert proof is not None
        assert proof.server == w.keepers[0].life != first
        assert w.keepers[0].lives == 2
        # What the first life has proven stays true, and it will prove nothing more.
        old = await w.keepers[0].proof(7, life=first)
        assert old is not None
        assert old.serial == 7
        assert await w.keepers[0].proof(8, life=first) is None

    in_world(tmp_path, [server], work)


def test_a_server_of_another_vocabulary_is_refused(start: Callable[[], Any]) -> None:
    server = start()
    server.vocabulary = "0" * 64
    with pytest.raises(ConfigurationError, match="another"):
        asyncio.run(asyncio.wait_for(keeper(server.url, "serve-0/0").run(), 20))


def test_a_server_that_never_starts_ends_the_role() -> None:
    with pytest.raises(ConfigurationError, match=f"did not start {STARTS} times in a row"):
        asyncio.run(asyncio.wait_for(keeper("http://127.0.0.1:9", "serve-0/0", 0.01).run(), 20))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/servers/0/pause", 404),
        ("POST", "/servers/0/collective_rpc", 404),
        ("POST", "/servers/0/update_weights", 404),
        ("GET", "/servers/0/metrics", 404),
        ("GET", "/servers/0/../../pause", 404),
        ("GET", "/servers/0/inference/v1/generate", 404),
        ("POST", "/servers/0//inference/v1/generate", 404),
        ("GET", "/servers/1/load", 404),
        ("GET", "/servers/0/load", 200),
        ("GET", "/servers", 200),
        ("GET", "/servers/0/proofs/99?seconds=0.05", 504),
        ("GET", "/servers/0/proofs/99?seconds=soon", 400),
        ("GET", "/servers/0/proofs/99?life=serve-0%2F0%23gone", 410),
    ],
)
def test_only_listed_routes_are_handed_on(
    tmp_path: Path, start: Callable[[], Any], method: str, path: str, status: int
) -> None:
    async def work(w: World) -> tuple[int, list[str]]:
        await w.loaded(7)
        before = len(w.servers[0].calls)
        async with httpx2.AsyncClient(headers={"authorization": f"Bearer {KEY}"}) as client:
            answer = await client.request(method, w.url + path)
        beyond = [call for call in w.servers[0].calls[before:] if call != "/metrics"]
        return answer.status_code, beyond

    assert in_world(tmp_path, [start()], work) == (status, [])


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer another"}, {"authorization": KEY[:-1]}])
@pytest.mark.parametrize("path", ["/servers", "/servers/0/load", "/servers/0/v1/models"])
def test_nobody_gets_in_without_the_key(
    tmp_path: Path, start: Callable[[], Any], headers: dict[str, str], path: str
) -> None:
    async def work(w: World) -> tuple[int, str]:
        await w.loaded(7)
        async with httpx2.AsyncClient(headers=headers) as client:
            answer = await client.get(w.url + path)
        return answer.status_code, answer.text

    status, text = in_world(tmp_path, [start()], work)
    assert status == 401
    assert KEY not in text


def test_the_key_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    serving.announce(tmp_path, "serve-0", url="http://127.0.0.1:1", key=KEY, count=2)
    path = tmp_path / "servers" / "serve-0.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(serving.served(tmp_path)) == ["serve-0/0", "serve-0/1"]
    assert KEY not in repr(serving.served(tmp_path))
    serving.withdraw(tmp_path, "serve-0")
    assert serving.served(tmp_path) == {}


def test_the_load_of_a_server_is_read_from_its_metrics(tmp_path: Path, start: Callable[[], Any]) -> None:
    text = b"""# HELP vllm:kv_cache_usage_perc used
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:num_requests_running{engine="0",model_name="m"} 12.0
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting_by_reason{engine="0"} 9.0
"""

    async def work(w: World) -> Any:
        await w.loaded(7)
        w.servers[0].faults["/metrics"] = [text] * 50
        async with FrontClient(f"{w.url}/servers/0", key=KEY) as client:
            return await client.load(), w.keepers[0].life

    look, life = in_world(tmp_path, [start()], work)
    assert (look.life, look.serial, look.state) == (life, 7, "serving")
    assert (look.kv_cache, look.running, look.waiting) == (0.75, 12, 3)


def test_a_client_that_hangs_up_frees_the_servers_place(tmp_path: Path, start: Callable[[], Any]) -> None:
    async def work(w: World) -> None:
        await w.loaded(7)
        w.servers[0].faults[GENERATE] = ["hang"]
        saying = asyncio.create_task(w.say())
        await _until(lambda: not w.servers[0].faults[GENERATE])
        saying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saying
        for rollout in range(2, 12):  # more than the places there are
            assert (await w.say(rollout)).token_ids.tolist() == [4, 5, 6, 7]

    in_world(tmp_path, [start()], work)


def test_check_has_the_server_prove_again(tmp_path: Path, start: Callable[[], Any]) -> None:
    async def work(w: World) -> None:
        async with FrontClient(f"{w.url}/servers/0", key=KEY) as client:
            await w.loaded(7)
            assert (await client.recheck()).checksum64 == announced(7).version.checksum64
            w.servers[0].held = {"serial": 7, "checksum64": "f" * 16}  # somebody has changed its weights
            with pytest.raises(InfrastructureError, match="expected checksum"):
                await client.recheck()
            with pytest.raises(ProtocolError):
                await client.proof(8, life="serve-0/0#over")

    in_world(tmp_path, [start()], work)


def test_check_waits_for_an_update_that_is_under_way(tmp_path: Path, start: Callable[[], Any]) -> None:
    """In the middle of it the server holds other weights than those that it has proven."""

    async def work(w: World) -> None:
        await w.loaded(7)
        backend = w.keepers[0]._backend
        assert backend is not None
        sound = w.servers[0].held
        async with FrontClient(f"{w.url}/servers/0", key=KEY) as client:
            async with backend._updating:
                w.servers[0].held = {"serial": 8, "checksum64": "f" * 16}
                checking = asyncio.create_task(client.recheck())
                done, _ = await asyncio.wait({checking}, timeout=0.5)
                assert not done
                w.servers[0].held = sound
            assert (await checking).serial == 7

    in_world(tmp_path, [start()], work)


def test_a_message_has_no_more_tokens_than_the_episode_has_room_for(
    tmp_path: Path, start: Callable[[], Any]
) -> None:
    async def work(w: World) -> None:
        await w.loaded(7)
        prompt = np.arange(1, 62, dtype=np.int32)
        said = await w.fleet.generate(prompt, Sampling(max_tokens=40), rollout_id=1)
        assert len(said.token_ids) == 64 - 61
        with pytest.raises(ValueError, match="expected 1 to 63 tokens, got 64"):
            await w.fleet.generate(np.zeros(64, np.int32), SHORT, rollout_id=1)

    in_world(tmp_path, [start()], work)


async def _until(ready: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not ready():  # noqa: ASYNC110 - the stand-in has no event for it
            await asyncio.sleep(0.01)
