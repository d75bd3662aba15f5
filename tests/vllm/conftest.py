"""A small Llama on a real vLLM server, started once for all tests of this folder."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from transformers import PreTrainedModel

from slipstream.chat import Chat
from slipstream.config import ModelConfig
from slipstream.environments.research import ResearchOptions, corpus
from slipstream.inference.vllm.backend import VllmBackend
from slipstream.inference.vllm.contract import VllmClient, VllmDeadlines
from slipstream.inference.vllm.server import ServerOptions, VllmServer
from slipstream.inference.vllm.transports import WeightTransport
from slipstream.model import Policy, build_model, canary_logprobs, named_weights, write_policy
from slipstream.tokenizer import train_tokenizer
from slipstream.types import Version, WeightUpdate
from slipstream.weights.filesystem import FilesystemPublisher
from slipstream_kernels import checksum64_named

sys.path.append(str(Path(__file__).parents[1] / "integration"))

PROGRAM = os.environ.get("SLIPSTREAM_VLLM", "")
MAX_TOKENS = 512
CANARY = tuple(range(0, 320, 20))
T = TypeVar("T")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave all of this folder out unless there is a vLLM."""
    missing = shutil.which(PROGRAM) is None if PROGRAM else True
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("vllm")
            item.add_marker("slow")
            if item.get_closest_marker("timeout") is None:
                # A server takes a minute to start, several on a machine that has other work.
                item.add_marker(pytest.mark.timeout(1500))
            if missing:
                reason = (
                    "no vLLM: give the path of its program in SLIPSTREAM_VLLM (make test-vllm installs one)"
                )
                item.add_marker(pytest.mark.skip(reason=reason))


@dataclass(kw_only=True)
class World:
    """A policy, the server that was started from it, and a learner that publishes."""

    policy: Policy
    server: VllmServer
    publisher: FilesystemPublisher
    serial: int = 0
    history: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Weights by serial."""
    origin: list[torch.Tensor] = field(init=False)
    """Around which all of them lie: logits that grow from test to test would lose digits."""

    def __post_init__(self) -> None:
        self.origin = [parameter.detach().clone() for parameter in self.policy.model.parameters()]

    def publish(self, *, scale: float = 0.2, share: float = 1.0) -> WeightUpdate:
        """Change the policy clearly, in this share of its values, and publish it under the next serial."""
        self.serial += 1
        model = self.policy.model
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.serial)
            for parameter, first in zip(model.parameters(), self.origin, strict=True):
                changed = first + torch.randn_like(first) * first.std().nan_to_num(1.0) * scale
                parameter.copy_(torch.where(torch.rand_like(first) < share, changed, parameter))
        weights = {name: tensor.clone() for name, tensor in named_weights(model).items()}
        self.history[self.serial] = weights
        folder = self.publisher.publish(weights, serial=self.serial)
        version = Version(
            serial=self.serial,
            incarnation=0,
            step=self.serial,
            fork_step=0,
            checksum64=checksum64_named(weights),
        )
        return WeightUpdate(
            version=version,
            folder=folder,
            canary_tokens=CANARY,
            canary_logprobs=canary_logprobs(model, CANARY),
        )

    def backend(self, client: VllmClient, transport: WeightTransport | None = None) -> VllmBackend:
        """Return a backend over the server."""
        return VllmBackend(client, stop_token=self.policy.chat.stop_token, transport=transport)

    async def plant(self, fault: str) -> None:
        """Plant a fault inside the server (plants.py), or with "" take all out."""
        async with VllmClient(self.server.url) as client:
            await client.worker_call("plant", fault=fault)

    def run(
        self,
        work: Callable[[VllmBackend], Awaitable[T]],
        *,
        transport: WeightTransport | None = None,
        client: type[VllmClient] = VllmClient,
    ) -> T:
        """Do some work with an attached backend."""

        async def attached() -> T:
            deadlines = VllmDeadlines(generate_s=120.0, control_s=60.0, update_s=60.0)
            async with client(self.server.url, deadlines=deadlines) as connected, asyncio.timeout(240):
                backend = self.backend(connected, transport)
                await backend.attach(self.policy.tokenizer)
                return await work(backend)

        return asyncio.run(attached())


def small_policy(*, worlds: int = 16, seed: int = 0) -> Policy:
    """Return a Llama with a tied head and the research recipe's kind of tokenizer."""
    tokenizer = train_tokenizer(corpus(ResearchOptions(), worlds=worlds), vocabulary=768)
    chat = Chat(tokenizer)
    sizes = ModelConfig(hidden_size=64, intermediate_size=128, layers=2, heads=2)
    model: PreTrainedModel = build_model(
        sizes, vocabulary=len(tokenizer), stop_token=chat.stop_token, max_tokens=MAX_TOKENS, seed=seed
    )
    return Policy(model=model.eval(), tokenizer=tokenizer, chat=chat)


def server_of(folder: Path, policy: Policy, **options: Any) -> VllmServer:
    """Write the policy into a folder and return a server of it, not yet started."""
    (folder / "model").mkdir()
    write_policy(folder / "model", policy)
    settings = ServerOptions(
        program=PROGRAM,
        model=str(folder / "model"),
        dtype="float32",
        max_model_len=MAX_TOKENS,
        max_num_seqs=16,
        eager=True,
        **options,
    )
    return VllmServer(settings, folder=folder / "server")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The policy and its running server."""
    folder = tmp_path_factory.mktemp("vllm")
    policy = small_policy()
    server = server_of(folder, policy, arguments=("--worker-extension-cls", "plants.PlantedWorker"))
    (folder / "server" / "path").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("plants.py"), folder / "server" / "path")
    asyncio.run(server.start())
    yield World(policy=policy, server=server, publisher=FilesystemPublisher(folder / "weights", keep=64))
    server.stop()


@pytest.fixture
def restarted(world: World, tmp_path: Path) -> Iterator[Callable[[], World]]:
    """Starts a new server for the same learner: what it finds in place of one that was restarted."""
    made: list[World] = []

    def start() -> World:
        made.append(replace(world, server=server_of(tmp_path, world.policy)))
        asyncio.run(made[0].server.start())
        return made[0]

    yield start
    for one in made:
        one.server.stop()
        # The learner goes on where it is.
        world.serial = one.serial
