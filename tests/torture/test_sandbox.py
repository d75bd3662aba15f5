"""What tools of ill will try from inside a sandbox: each is contained, and nothing of it is left.

Every attack runs in every confinement that this machine has. Those that can do no harm are also run
without one, where they must succeed: an attack that cannot succeed proves nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import attacks
import playground

from slipstream.config import EnvironmentConfig, RewardConfig, SandboxConfig
from slipstream.environments.sandboxed import SandboxedEnvironment, service
from slipstream.errors import InfrastructureError
from slipstream.interfaces import AssistantMessage
from slipstream.tools.confinement import FIRST_UID, UIDS, namespaces_work
from slipstream.tools.sandbox import Sandbox, Worker, WorkerError, WorkerTimeout, why_not_bubblewrap
from slipstream.types import Split, TaskAttempt

LIMITS = SandboxConfig(
    call_timeout_s=1.0,
    memory_bytes=512 << 20,
    scratch_bytes=8 << 20,
    processes=24,
    open_files=64,
    cpu_s=20,
    answer_bytes=64 << 10,
)
CONFINEMENTS = ("bubblewrap", "process", "process without namespaces")
SECRET = "canary-7c1f9ab2e0"
WALLS = {"PermissionError", "FileNotFoundError", "OSError", "ConnectionRefusedError", "BlockingIOError",
         "NotADirectoryError", "MemoryError", "RuntimeError", "ProcessLookupError", "gaierror",
         "RecursionError", "TimeoutError"}  # fmt: skip
"""What an attack may run into; any other error would be a mistake of the attack itself."""
ATTACKS = [
    name
    for name, value in vars(attacks).items()
    if callable(value)
    and getattr(value, "__module__", "") == "attacks"
    and name[0].islower()
    and name[0] != "_"
    and name != "laboratory"
]
NEEDS_FILE_SYSTEM = {"read_a_file_of_the_host", "list_the_run_folder", "read_through_dots", "own_environment",
                     "read_through_a_symbolic_link", "read_through_a_hard_link", "unix_socket"}  # fmt: skip
"""A plain process reads what its user may read."""
NEEDS_NAMESPACES = {"write_var_tmp", "write_dev_shm", "write_the_hosts_tmp", "kill_the_actor",
                    "kill_the_neighbours", "kill_the_parent", "kill_everybody", "environment_of_others",
                    "steal_files_of_others", "many_large_files", "many_empty_files", "write_the_run_folder",
                    "write_through_a_symbolic_link", "write_home", "write_our_code"}  # fmt: skip
"""Without namespaces and as an ordinary user nothing but good manners stops these."""
HARMLESS = ["tcp_to_loopback", "udp_to_loopback", "unix_socket", "abstract_socket", "reverse_shell",
            "unix_datagram_without_connecting", "abstract_datagram_without_connecting", "listen_on_a_port",
            "read_a_file_of_the_host", "list_the_run_folder", "read_through_dots", "own_environment",
            "read_through_a_symbolic_link", "read_through_a_hard_link", "write_the_run_folder",
            "write_through_a_symbolic_link", "environment_of_others", "memory_files", "sparse_file",
            "too_many_threads", "too_much_memory", "too_much_mapped_memory", "one_large_file",
            "many_large_files", "many_empty_files", "too_many_open_files",
            "kill_the_actor", "output_bomb", "read_memory_of_others"]  # fmt: skip
"""Attacks that succeed outside of a sandbox, whoever runs them."""


class Victims:
    """Things of the host that attacks are aimed at."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        folder.chmod(0o777)
        secret = folder / "secret"
        secret.write_text(SECRET)
        secret.chmod(0o644)
        self.folder, self._stack = folder, stack
        self.tcp = self._socket(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        self.udp = self._socket(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        self.unix = self._socket(socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "stream"))
        self.abstract = self._socket(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.folder}/stream")
        self.datagram = self._socket(socket.AF_UNIX, socket.SOCK_DGRAM, str(folder / "datagram"))
        self.abstract_datagram = self._socket(socket.AF_UNIX, socket.SOCK_DGRAM, f"\0{self.folder}/datagram")
        for path in (folder / "stream", folder / "datagram"):
            path.chmod(0o777)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.free_port = free.getsockname()[1]
        self.bystander = stack.enter_context(subprocess.Popen(["/bin/sleep", "600"]))
        stack.callback(self.bystander.kill)
        self.memory = ctypes.create_string_buffer(b"looted!!")

    def _socket(self, family: int, kind: int, address: Any) -> socket.socket:
        sock = self._stack.enter_context(socket.socket(family, kind))
        sock.bind(address)
        if kind == socket.SOCK_STREAM:
            sock.listen()
        sock.setblocking(False)
        return sock

    def told(self) -> dict[str, Any]:
        """Return what attacks are told."""
        return {
            "tcp": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "unix": self.unix.getsockname(),
            "unix_datagram": self.datagram.getsockname(),
            "abstract": f"\0{self.folder}/stream",
            "abstract_datagram": f"\0{self.folder}/datagram",
            "free_port": self.free_port,
            "folder": str(self.folder),
            "secret_file": str(self.folder / "secret"),
            "home": str(Path.home()),
            "actor": os.getpid(),
            "bystander": self.bystander.pid,
            "address": ctypes.addressof(self.memory),
        }

    def assert_untouched(self) -> None:
        """Nobody called, wrote, listened or was killed."""
        for sock in (self.tcp, self.unix, self.abstract):
            with pytest.raises(BlockingIOError):
                sock.accept()
        for sock in (self.udp, self.datagram, self.abstract_datagram):
            with pytest.raises(BlockingIOError):
                sock.recv(1)
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", self.free_port)) != 0
        assert self.bystander.poll() is None
        assert psutil.Process(self.bystander.pid).status() != psutil.STATUS_STOPPED
        assert sorted(path.name for path in self.folder.iterdir()) == ["datagram", "secret", "stream"]
        for place in ("/tmp", "/etc", "/", "/usr/bin", "/var/tmp", "/dev/shm", Path.home(), attacks_folder()):
            assert not Path(place, attacks.PWNED).exists(), place


def attacks_folder() -> Path:
    return Path(__file__).parent


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victims]:
    with ExitStack() as stack:
        yield Victims(tmp_path_factory.mktemp("run"), stack)


def sandbox_of(
    confinement: str,
    service: str = "attacks:laboratory",
    options: dict[str, Any] | None = None,
    packages: Sequence[str] = (),
) -> Sandbox:
    if confinement == "bubblewrap" and (reason := why_not_bubblewrap()):
        pytest.skip(f"bubblewrap does not work here: {reason}")
    if confinement == "process" and not namespaces_work():
        pytest.skip("the kernel refuses namespaces to this user")
    backend = "bubblewrap" if confinement == "bubblewrap" else "process"
    return Sandbox(
        backend,  # type: ignore[arg-type]
        service=service,
        options=options or {},
        config=LIMITS,
        packages=packages,
        namespaces=confinement != "process without namespaces",
    )


@pytest.fixture(scope="module", params=CONFINEMENTS)
def lab(request: pytest.FixtureRequest) -> Iterator[tuple[str, Sandbox]]:
    os.environ["SLIPSTREAM_TEST_TOKEN"] = SECRET
    try:
        sandbox = sandbox_of(request.param)
        yield request.param, sandbox
        sandbox.close()
    finally:
        del os.environ["SLIPSTREAM_TEST_TOKEN"]


def processes_of(sandbox: Sandbox) -> set[int]:
    """Return every process below the fork server, and every one of a worker's uid, wherever it went."""
    mine = {child.pid for child in psutil.Process(sandbox.pid).children(recursive=True)}
    uids = range(FIRST_UID, FIRST_UID + UIDS)
    return mine | {
        p.pid for p in psutil.process_iter(["uids"]) if p.info["uids"] and p.info["uids"].real in uids
    }


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def assert_nothing_left(sandbox: Sandbox, before: set[int]) -> None:
    # A keeper lets go of its leash a moment before it is gone itself.
    wait_until(lambda: processes_of(sandbox) <= before, f"left over: {processes_of(sandbox) - before}")
    assert sandbox.scratch_files() == []


async def loot_of(worker: Worker, attack: str, victims: Victims) -> Any:
    """Return what an attack got hold of; None where it ran into a wall."""
    try:
        raw = await worker.call("run", LIMITS.call_timeout_s, attack=attack, victims=victims.told())
    except WorkerTimeout:
        return None
    except WorkerError as error:
        wall = re.fullmatch(r"tool failed with (\w+)", str(error))
        assert wall is None or wall[1] in WALLS, f"{attack}: {error}"
        return None
    loot = msgspec.msgpack.decode(raw)
    # A second answer is noticed by the next call; daemons that fork may leave it no process to answer with.
    try:
        assert msgspec.msgpack.decode(await worker.call("ping", LIMITS.call_timeout_s)) == "pong"
    except WorkerError:
        assert attack in {"answer_twice", "garbage", "leave_a_daemon", "leave_daemons_that_fork"}, attack
        return None
    return loot


@pytest.mark.parametrize("attack", ATTACKS)
def test_smoke_attack_is_contained(attack: str, lab: tuple[str, Sandbox], victims: Victims) -> None:
    confinement, sandbox = lab
    if confinement != "bubblewrap" and attack in NEEDS_FILE_SYSTEM:
        pytest.skip("a plain process reads what its user may read")
    if confinement == "process without namespaces" and attack in NEEDS_NAMESPACES:
        pytest.skip("nothing but namespaces stops this")

    async def attacked() -> Any:
        worker = await sandbox.worker()
        try:
            return await loot_of(worker, attack, victims)
        finally:
            await worker.close()

    async def alive() -> None:
        worker = await sandbox.worker()
        assert msgspec.msgpack.decode(await worker.call("ping", 10.0)) == "pong"
        await worker.close()

    before = processes_of(sandbox)
    assert not asyncio.run(attacked())
    assert_nothing_left(sandbox, before)
    victims.assert_untouched()
    asyncio.run(alive())


@pytest.mark.parametrize("attack", HARMLESS)
def test_smoke_attack_succeeds_without_a_sandbox(
    attack: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Otherwise it would prove nothing that a sandbox stops it."""
    monkeypatch.setenv("SLIPSTREAM_TEST_TOKEN", SECRET)
    code = (
        "import sys, msgspec; sys.path.insert(0, sys.argv[1]); import attacks; "
        "print(bool(getattr(attacks, sys.argv[2])(msgspec.json.decode(sys.argv[3]))))"
    )
    with ExitStack() as stack:
        own = Victims(tmp_path_factory.mktemp("run"), stack)
        told = msgspec.json.encode(own.told()).decode()
        done = subprocess.run(
            [sys.executable, "-c", code, str(attacks_folder()), attack, told],
            cwd=tmp_path_factory.mktemp("scratch"),
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.stdout == "True\n", done.stderr


CHEATS = ["replace_the_judge", "replace_the_score", "write_a_verdict", "leave_someone_who_writes_verdicts",
          "rewrite_the_judges_code", "plant_a_module", "read_the_number", "forge_a_reward", "forge_infinity",
          "forge_scores", "forge_a_state_of_another_shape", "shadow_the_fork_server"]  # fmt: skip
NEED_NAMESPACES = {"write_a_verdict", "leave_someone_who_writes_verdicts", "rewrite_the_judges_code",
                   "shadow_the_fork_server"}  # fmt: skip


@pytest.fixture(scope="module", params=CONFINEMENTS)
def play(request: pytest.FixtureRequest) -> Iterator[tuple[str, Callable[[], SandboxedEnvironment]]]:
    config = EnvironmentConfig(limits=LIMITS)
    plain = playground.factory(config, RewardConfig())
    options = {
        "factory": "playground:factory",
        "environment": config.model_dump_json(),
        "rewards": RewardConfig().model_dump_json(),
    }
    sandbox = sandbox_of(
        request.param,
        f"{service.__module__}:{service.__name__}",
        options=options,
        packages=("playground", "attacks"),
    )
    yield request.param, lambda: SandboxedEnvironment(plain.make(), sandbox, config)  # type: ignore[arg-type]
    sandbox.close()


def played(
    make: Callable[[], SandboxedEnvironment], *messages: tuple[str, str]
) -> tuple[list[Any], float | None]:
    """Return the transitions of an episode and its outcome; None when the judge could not read its state."""

    async def episode() -> tuple[list[Any], float | None]:
        environment = make()
        moves = []
        try:
            task = playground.PlaygroundTasks().task(Split.TRAIN, 0)
            await environment.reset(task, TaskAttempt(task=0, seed=1, group=0, attempt=0))
            for name, what in messages:
                moves.append(
                    await environment.step(AssistantMessage(text="", name=name, arguments={"what": what}))
                )
            try:
                (score,) = await environment.score()
            except InfrastructureError:
                return moves, None
            return moves, score.value
        finally:
            await environment.close()

    return asyncio.run(episode())


@pytest.mark.parametrize("cheat", CHEATS)
def test_smoke_cheat_does_not_reach_the_judge(
    cheat: str, play: tuple[str, Callable[[], SandboxedEnvironment]]
) -> None:
    confinement, make = play
    if confinement == "process without namespaces" and cheat in NEED_NAMESPACES:
        pytest.skip("nothing but namespaces stops this")
    moves, outcome = played(make, ("cheat", cheat))
    assert outcome in (-1.0, None)
    assert outcome == -1.0 or cheat == "forge_a_state_of_another_shape"
    assert not playground.VERDICT.exists()
    assert all(math.isfinite(move.reward) for move in moves)
    if moves[0].call is not None:
        assert (moves[0].call.turn, moves[0].call.name) == (0, "cheat") and moves[0].call.latency_s < 60
    # The judge is no rubber stamp: the right answer is right, also after cheating.
    assert played(make, ("cheat", "nothing"), ("answer", "4711"))[1] == 1.0


STUBBORN = ("fork_bomb", "leave_a_daemon_and_exit", "ignore_every_signal", "leave_daemons_that_fork",
            "spin_in_c", "become_another_program", "shell_fork_bomb", "stop_itself")  # fmt: skip


@pytest.mark.parametrize(
    "kills", [pytest.param(50, id="smoke"), pytest.param(1000, id="many", marks=pytest.mark.slow)]
)
@pytest.mark.timeout(1800)
def test_kills_leave_nothing(kills: int, lab: tuple[str, Sandbox], victims: Victims) -> None:
    _, sandbox = lab
    before = processes_of(sandbox)
    files = len(os.listdir("/proc/self/fd"))

    async def all_of_them() -> None:
        places = asyncio.Semaphore(4)

        async def one(number: int) -> None:
            async with places:
                attack = STUBBORN[number % len(STUBBORN)]
                worker = await sandbox.worker()
                try:
                    await worker.call("run", 0.05, attack=attack, victims=victims.told())
                except WorkerError:
                    pass
                finally:
                    await worker.close()

        await asyncio.gather(*(one(number) for number in range(kills)))

    asyncio.run(all_of_them())
    assert_nothing_left(sandbox, before)
    assert len(os.listdir("/proc/self/fd")) == files
    victims.assert_untouched()
