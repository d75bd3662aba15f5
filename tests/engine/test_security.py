"""Who comes in: keys on disk, the allow-list, names bound to keys, open addresses, Unix paths."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from slipstream import messages as m
from slipstream.addresses import stays_on_machine
from slipstream.cli import main
from slipstream.config import BatchConfig, EvaluationConfig, RunConfig, load_config
from slipstream.deadlines import Deadline, Deadlines
from slipstream.errors import AddressError, ConfigurationError, RefusedError
from slipstream.ingest import IngestLog
from slipstream.keys import AllowList, client_keys, hub_keys, make_keys
from slipstream.ledger import Ledger
from slipstream.process import Memory
from slipstream.spool import Spool
from slipstream.transport.client import ActorClient, LearnerClient
from slipstream.transport.guard import ConnectionGuard, Limits
from slipstream.transport.zeromq import DealerChannel, RouterServer, SyncDealerChannel

CONFIG = RunConfig(
    steps=4, batch=BatchConfig(groups=2, group_size=2), evaluation=EvaluationConfig(every=2, tasks=2)
)
HANGS_S = 60.0
"""Far above what anything takes: it only ends tests that hang."""
PATIENT = Deadlines(connect_s=HANGS_S, send_s=HANGS_S, ping_s=0.1, silence_s=HANGS_S)
NAMES = {"actor-0": "actor", "actor-1": "actor", "learner-0": "learner"}


class Hub:
    """A hub in a thread, on a real socket."""

    def __init__(
        self,
        folder: Path,
        keys: Path | str = "",
        *,
        address: str = "tcp://127.0.0.1:*",
        limits: Limits | None = None,
    ) -> None:
        self._log = IngestLog(folder / "log")
        self.ledger = Ledger(CONFIG, "run", self._log, lambda _: "nowhere")
        self.server = RouterServer(
            self.ledger, address, lost=self.ledger.lost, keys=hub_keys(str(keys)), limits=limits
        )
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self.server.run, args=(self._stopping.is_set,))
        self._thread.start()

    def await_count(self, name: str, least: int) -> None:
        """Wait until a counter has reached a number."""
        until(lambda: self.server.counters()[name] >= least, f"{name} >= {least}")

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self.server.close()
        self._log.close()


@contextlib.contextmanager
def hub(folder: Path, keys: Path | str = "", **more: object) -> Iterator[Hub]:
    serving = Hub(folder, keys, **more)  # type: ignore[arg-type]
    try:
        yield serving
    finally:
        serving.stop()


def until(ready: Callable[[], bool], what: str) -> None:
    deadline = Deadline(HANGS_S, "test", what)
    while not ready():
        deadline.check()
        threading.Event().wait(0.01)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys", NAMES)
    return tmp_path / "keys"


def join(address: str, folder: Path, keys: Path | str, name: str, *, key_of: str = "") -> m.Welcome:
    """Say Hello as an actor, with the key of another name if one is given."""

    async def go() -> m.Welcome:
        channel = DealerChannel(address, client_keys(str(keys), key_of or name))
        client = ActorClient(channel, Spool(folder / f"{name}.spool"), "run", name, deadlines=PATIENT)
        try:
            return await client.connect()
        finally:
            await client.close()

    return asyncio.run(go())


def test_keys_are_files_that_nobody_else_may_read(keys: Path) -> None:
    files = sorted(str(path.relative_to(keys)) for path in keys.rglob("*"))
    made = ["actor-0", "actor-1", "learner-0"]
    assert files == sorted(
        ["authorized", "hub.key", *(f"{name}.key" for name in made), *(f"authorized/{n}.toml" for n in made)]
    )
    for path in [keys, *keys.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    ours, theirs = hub_keys(str(keys)), client_keys(str(keys), "actor-0")
    assert ours is not None
    assert theirs is not None
    assert theirs.hub_public_key == ours.public_key
    assert AllowList(ours.authorized).user_of(theirs.public_key) == "actor/actor-0"
    assert ours.secret_key.decode() not in repr(ours)


def test_more_keys_leave_those_that_are_there(keys: Path) -> None:
    before = {path: path.read_bytes() for path in keys.rglob("*") if path.is_file()}
    written = make_keys(keys, {"actor-0": "actor", "actor-7": "actor"})
    assert sorted(path.name for path in written) == ["actor-7.key", "actor-7.toml"]
    assert {path: path.read_bytes() for path in before} == before


def test_the_command_makes_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert main(["keys", str(folder), "--actor", "a", "b"]) == 0
    assert str(folder / "b.key") in capsys.readouterr().out
    assert {path.stem for path in (folder / "authorized").iterdir()} == {"a", "b", "learner-0"}
    assert main(["keys", str(folder), "--actor", "../x"]) == 2
    assert 'got "../x"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda file: file.chmod(0o640), r"actor-0.key: others may read this secret \(mode 640\); chmod 600"),
        (lambda file: file.unlink(), r"actor-0.key cannot be read \(No such file.*slipstream keys"),
        (lambda file: file.write_text("x"), "actor-0.key: not valid TOML"),
        (lambda file: file.write_text('public_key = "short"'), "actor-0.key: public_key must be"),
    ],
)
def test_a_spoilt_key_is_one_sentence(keys: Path, spoil: Callable[[Path], None], expected: str) -> None:
    spoil(keys / "actor-0.key")
    with pytest.raises(ConfigurationError, match=expected):
        client_keys(str(keys), "actor-0")


def test_the_allow_list_follows_its_folder(keys: Path) -> None:
    client = client_keys(str(keys), "actor-0")
    assert client is not None
    allowed, entry = AllowList(keys / "authorized"), keys / "authorized" / "actor-0.toml"
    text = entry.read_text()
    entry.write_text(text.replace('role = "actor"', 'role = "admin"'))
    assert allowed.user_of(client.public_key) is None
    entry.write_text(text)
    assert allowed.user_of(client.public_key) == "actor/actor-0"
    entry.unlink()
    assert allowed.user_of(client.public_key) is None


def test_with_keys_actors_and_learner_join_under_their_names(keys: Path, tmp_path: Path) -> None:
    with hub(tmp_path, keys) as serving:
        address = serving.server.address
        assert join(address, tmp_path, keys, "actor-0").epoch == 0
        assert join(address, tmp_path, keys, "actor-0").epoch == 1
        channel = SyncDealerChannel(address, client_keys(str(keys), "learner-0"))
        learner = LearnerClient(channel, "run", "learner-0", deadlines=PATIENT)
        assert learner.connect(0).epoch == 0
        learner.close()
        counters = serving.server.counters()
        assert (counters["refused_keys"], counters["refused_hellos"]) == (0, 0)


def test_a_removed_key_is_refused_at_the_next_handshake(keys: Path, tmp_path: Path) -> None:
    with hub(tmp_path, keys) as serving:
        join(serving.server.address, tmp_path, keys, "actor-0")
        (keys / "authorized" / "actor-0.toml").unlink()
        with pytest.raises(RefusedError, match=r"refused the key in .*actor-0.key: it is not in the hub's"):
            join(serving.server.address, tmp_path, keys, "actor-0")
        serving.await_count("refused_keys", 1)
        assert serving.ledger.state.epochs == {"actor-0": 0}


@pytest.mark.parametrize(
    ("role", "name", "key_of"),
    [
        ("actor", "actor-1", "actor-0"),
        ("learner", "learner-0", "actor-0"),
        ("actor", "learner-0", "learner-0"),
    ],
)
def test_a_key_serves_only_its_own_name_and_role(
    keys: Path, tmp_path: Path, role: str, name: str, key_of: str
) -> None:
    with hub(tmp_path, keys) as serving:
        reason = f"name: its key is that of {NAMES[key_of]}/{key_of}, not of {role}/{name}"
        with pytest.raises(RefusedError, match=reason):
            if role == "actor":
                join(serving.server.address, tmp_path, keys, name, key_of=key_of)
            else:
                channel = SyncDealerChannel(serving.server.address, client_keys(str(keys), key_of))
                with contextlib.closing(LearnerClient(channel, "run", name, deadlines=PATIENT)) as learner:
                    learner.connect(0)
        assert serving.server.counters()["refused_hellos"] == 1
        assert serving.ledger.state.epochs == {}


def test_a_routing_id_carries_no_rights_to_another_key(keys: Path, tmp_path: Path) -> None:
    """Whoever takes the routing id of a peer that has left is not that peer."""
    with hub(tmp_path, keys) as serving, zmq.Context() as context:
        answers = []
        for name in ("actor-0", "actor-1"):
            client = client_keys(str(keys), name)
            assert client is not None
            with context.socket(zmq.DEALER) as socket:
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.ROUTING_ID, b"same")
                socket.curve_publickey, socket.curve_secretkey = client.public_key, client.secret_key
                socket.curve_serverkey = client.hub_public_key
                socket.connect(serving.server.address)
                if name == "actor-0":
                    hello = m.Hello(role="actor", name=name, run="run", protocol=m.PROTOCOL,
                                    schema=m_schema(), session="s")  # fmt: skip
                    socket.send(m.encode_message(hello))
                    assert socket.poll(int(1000 * HANGS_S))
                    socket.recv()
                socket.send(m.encode_message(m.Ping()))
                assert socket.poll(int(1000 * HANGS_S))
                answers.append(m.decode_message(socket.recv()))
            until(lambda: serving.server.counters()["connections"] == 0, "the peer to be gone")
    assert answers[0] == m.Ping()
    assert isinstance(answers[1], m.Refused)


def m_schema() -> str:
    from slipstream.wire import schema_hash

    return schema_hash()


def test_without_an_answer_from_the_allow_list_nobody_comes_in(keys: Path, tmp_path: Path) -> None:
    """ZAP fails closed: a hub whose list cannot be asked lets nobody in."""
    from slipstream.transport.sockets import set_router_options

    client = client_keys(str(keys), "actor-0")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        set_router_options(router, hub_keys(str(keys)))
        port = router.bind_to_random_port("tcp://127.0.0.1")
        channel = SyncDealerChannel(f"tcp://127.0.0.1:{port}", client)
        with pytest.raises(RefusedError, match=r"is not the one whose public key|refused the key"):
            channel.send([b"x"], HANGS_S)
        channel.close()


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("tcp://127.0.0.1:*", True), ("tcp://127.9.9.9:5555", True), ("tcp://localhost:5555", True),
        ("tcp://[::1]:5555", True), ("ipc:///run/user/1/hub", True), ("ipc://*", True),
        ("tcp://*:5555", False), ("tcp://0.0.0.0:*", False), ("tcp://eth0:5555", False),
        ("tcp://10.0.0.1:5555", False), ("tcp://[::]:5555", False), ("ipc://@open", False),
        ("tcp://localhost.example.com:1", False), ("udp://127.0.0.1:5", False), ("nonsense", False),
    ],
)  # fmt: skip
def test_which_addresses_stay_on_the_machine(address: str, private: bool) -> None:
    assert stays_on_machine(address) is private


def test_an_open_address_needs_keys_or_a_word() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"command line: hub.address must be on this machine .*`slipstream keys` made, or hub.insecure",
    ):
        load_config("research", ["hub.address=tcp://*:5555"])
    assert load_config("research", ["hub.address=tcp://*:5555", "hub.insecure=true"]).hub.insecure
    assert load_config("research", ["hub.address=tcp://*:5555", "hub.keys=keys"]).hub.keys == "keys"
    with pytest.raises(ConfigurationError, match=r"hub.insecure must be false where hub.keys is set"):
        load_config("research", ["hub.keys=keys", "hub.insecure=true"])


@pytest.mark.parametrize("secured", [False, True])
def test_an_honest_peer_is_never_taken_for_one_that_holds_much(
    keys: Path, tmp_path: Path, secured: bool
) -> None:
    """Small messages cost more on the wire than they hold: that must not add up over a long life."""
    folder = str(keys) if secured else ""
    limits = Limits(outstanding_bytes=32 << 10)
    with hub(tmp_path, folder, limits=limits) as serving:
        channel = SyncDealerChannel(serving.server.address, client_keys(folder, "learner-0"))
        client = LearnerClient(channel, "run", "learner-0", deadlines=PATIENT)
        client.connect(0)
        ping = m.encode_message(m.Ping())
        for _ in range(60):
            for _ in range(50):
                assert channel.send([ping], HANGS_S)
            for _ in range(50):
                assert channel.receive(HANGS_S) is not None
        assert limits.outstanding_bytes < 60 * 50 * 12  # far more than that went over the wire
        client.close()
        assert serving.server.counters()["cut_connections"] == 0


def test_another_connection_with_the_number_of_one_that_is_gone_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        ours, theirs = (
            (socket.create_connection(address), server.accept()[0]),
            (socket.create_connection(address), server.accept()[0]),
        )
        guard = ConnectionGuard(Limits(hello_s=0.0))
        guard.accepted(ours[1].fileno())
        os.dup2(theirs[1].fileno(), ours[1].fileno())  # the system gives the number away again
        guard.check()
        assert guard.cut == 0
        guard.accepted(ours[1].fileno())
        guard.check()
        assert guard.cut == 1
        with pytest.raises(ConnectionResetError):
            theirs[0].recv(1)
        for end in (*ours, *theirs):
            end.close()


def test_what_a_connection_sent_and_nobody_read_is_dropped_when_it_is_cut() -> None:
    """libzmq would read it all, and make up to 32 times as much of it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as theirs,
        server.accept()[0] as ours,
    ):
        theirs.sendall(bytes(100_000))
        assert ours.recv(1) == b"\0"
        guard = ConnectionGuard(Limits(hello_s=0.0))
        guard.accepted(ours.fileno())
        guard.check()
        assert guard.cut == 1
        with pytest.raises(OSError):
            ours.recv(1)


def test_memory_that_strangers_fill_is_looked_at_before_the_next_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resident = 100 << 20
    monkeypatch.setattr(
        "slipstream.process.MemoryGauge.read", lambda _: Memory(resident=resident, shared=0, data=resident)
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as theirs,
        server.accept()[0] as ours,
    ):
        guard = ConnectionGuard(Limits(stranger_memory_bytes=200 << 20), clock=lambda: 0.0)
        guard.accepted(ours.fileno())
        guard.look()
        theirs.sendall(bytes(100_000))
        assert ours.recv(1, socket.MSG_PEEK) == b"\0"
        guard.look()
        assert guard.cut == 0, "the next round is not due, and memory is low"
        resident = 201 << 20
        guard.look()
        assert guard.cut == 1


def test_a_unix_path_has_one_holder_in_a_private_folder(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/own/hub"
    with hub(tmp_path, address=address) as first:
        assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700
        with pytest.raises(AddressError, match=rf"hub.address: {address} is in use by process {os.getpid()}"):
            RouterServer(first.ledger, address)
        assert join(address, tmp_path, "", "actor-0").epoch == 0
    with hub(tmp_path, address=address):  # the path left behind is no obstacle
        assert join(address, tmp_path, "", "actor-0").epoch == 1
    (tmp_path / "own").chmod(0o755)
    with pytest.raises(AddressError, match=r"own must belong to this user alone \(chmod 700\)"):
        RouterServer(first.ledger, address)
