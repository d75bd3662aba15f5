"""Mistakes and damage: one sentence that says what to do, exit code 2, nothing lost."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
from books import check_finished
from runs import UNHURRIED, Ended, Run

from slipstream import cli, run_folder
from slipstream.ingest import read_events
from slipstream.messages import (
    PROTOCOL,
    Ack,
    AnyMessage,
    Deliver,
    Hello,
    Message,
    Refused,
    Welcome,
    decode_message,
    encode_message,
)
from slipstream.wire import schema_hash

pytestmark = pytest.mark.timeout(1800)


def refused(ended: Ended, *parts: str) -> None:
    """One sentence with all of these, and exit code 2."""
    assert ended.code == 2, (ended.code, ended.out, ended.err)
    for part in parts:
        assert part in ended.sentence, ended.sentence


def flip(path: Path, share: float = 0.5) -> None:
    """Damage one byte of a file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 0xFF
    path.write_bytes(data)


def kept(run: Run) -> dict[str, bytes]:
    """Everything that must survive a refusal."""
    folders = [run.folder / name for name in ("checkpoints", "trajectories")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in sorted(files)}


@pytest.mark.parametrize(
    ("recipe", "overrides", "parts"),
    [
        ("[optim]\nlearning_rat = 1.0\n", [], ["mine.toml", "unknown key optim.learning_rat",
                                               "did you mean optim.learning_rate?"]),
        ("[optim]\nlearning_rate = 'fast'\n", [], ["mine.toml", "optim.learning_rate must be", '"fast"']),
        ("seed = 1\n", ["optim.learning_rat=1"], ["command line: unknown key optim.learning_rat",
                                                  "did you mean optim.learning_rate?"]),
        ("seed = 1\n", ["steps=many"], ["command line: steps must be an integer", '"many"']),
        ("seed = \n", [], ["mine.toml: not valid TOML"]),
    ],
)  # fmt: skip
def test_configuration(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    overrides: list[str],
    parts: list[str],
) -> None:
    file, output = tmp_path / "mine.toml", tmp_path / "run"
    file.write_text(recipe)
    code = cli.main(["train", str(file), "--output", str(output), *overrides])
    refused(Ended(code, "", capsys.readouterr().err), *parts)
    assert not output.exists()


def test_a_run_folder_that_is_not_this_runs(new_run: Callable[..., Run]) -> None:
    run = new_run()
    command = ["train", "research", *run.settings]
    refused(run.command(*command).end(), f"{run.folder} holds a run already; add --resume")
    refused(
        run.command(*command, "optim.learning_rate=0.5", "--resume").end(),
        f"{run.folder} belongs to another configuration: optim.learning_rate is 0.001 there and 0.5 here",
    )


def test_a_model_folder_that_is_missing(tmp_path: Path) -> None:
    run = Run(tmp_path, ["model.path=/nonexistent"])
    refused(run.start().end(), "/nonexistent", "no model here", "give a local Hugging Face model folder")


@pytest.mark.slow
def test_a_model_folder_without_chat_template(tmp_path: Path, warm_start: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(warm_start / "checkpoints" / "warmup", model)
    for path in model.glob("chat_template*"):
        path.unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    run = Run(tmp_path / "run", [f"model.path={model}"])
    refused(run.start().end(), str(model), "chat template")


@pytest.mark.slow
def test_a_warm_start_below_the_band(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ["warmup.max_steps=1", "warmup.min_success=0.2"])
    refused(run.start().end(), "expected at least 0.20", "warmup.max_steps", "environment.options")


def test_a_port_in_use(new_run: Callable[..., Run]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = f"tcp://127.0.0.1:{holder.getsockname()[1]}"
        run = new_run("run", f"hub.address={address}")
        refused(run.start().end(), "hub.address", address, "Address already in use", "set another address")


def test_a_damaged_warm_start_of_a_run_that_has_begun(new_run: Callable[..., Run]) -> None:
    run = new_run()
    (run.folder / "trajectories").mkdir()
    flip(run.folder / "checkpoints" / "warmup" / "model.safetensors")
    before = kept(run)
    refused(run.resume().end(), "warmup/model.safetensors: expected sha256", "restore")
    assert kept(run) == before


@pytest.mark.slow
def test_damaged_checkpoints_and_a_damaged_log(new_run: Callable[..., Run]) -> None:
    run = new_run("run", *UNHURRIED, "evaluation.every=6", "supervision.restarts=0")
    train = run.start()
    run.reach(5, train)
    train.roles()["learner"].kill()
    assert train.end().code == 1
    steps = sorted((run.folder / "checkpoints").glob("step-*"))
    assert len(steps) == 2
    sound = run.folder.with_name("sound")
    shutil.copytree(run.folder, sound)

    for step in steps:
        flip(step / "model.safetensors")
    before = kept(run)
    refused(run.resume().end(), "every checkpoint in", "is damaged", "model.safetensors: expected sha256")
    assert kept(run) == before

    shutil.rmtree(run.folder)
    shutil.copytree(sound, run.folder)
    log = run.folder / "trajectories" / "000000.log"
    flip(log)
    before = kept(run)
    refused(run.resume().end(), f"{log} is damaged at offset ", "restore the file from a copy")
    assert kept(run) == before

    shutil.rmtree(run.folder)
    shutil.copytree(sound, run.folder)
    flip(steps[-1] / "optimizer.safetensors")
    ended = run.resume().end()
    assert ended.code == 0, run.story(ended)
    assert f"{steps[-1]} is damaged; going on from {steps[-2].name}" in ended.out
    check_finished(run.folder, run.config)


class Stranger:
    """A peer that speaks for itself, frame by frame."""

    def __init__(self, run: Run) -> None:
        """Connect to a run's hub."""
        self.known = run_folder.read_json(run.folder / "hub.json")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(self.known["address"])

    def hello(self, **other: object) -> AnyMessage:
        """Say Hello as an actor, with some fields changed; return the answer."""
        fields = {"role": "actor", "name": "stranger", "run": self.known["run"], "protocol": PROTOCOL,
                  "schema": schema_hash(), "session": "s", **other}  # fmt: skip
        return self.ask(Hello(**fields))  # type: ignore[arg-type]

    def ask(self, message: Message, *frames: bytes) -> AnyMessage:
        """Send one message and return the answer."""
        self._socket.send_multipart([encode_message(message), *frames])
        assert self._socket.poll(100_000), f"no answer to {message}"
        return decode_message(self._socket.recv_multipart()[0])

    def close(self) -> None:
        """Hang up."""
        self._context.destroy(linger=0)


@pytest.mark.slow
def test_strangers_and_a_second_launcher_at_a_live_run(new_run: Callable[..., Run]) -> None:
    run = new_run("run", *UNHURRIED, "evaluation.every=12")
    train = run.start()
    run.reach(2, train)
    learner = train.roles()["learner"]
    learner.suspend()  # the run must not end before the strangers have been
    stranger = Stranger(run)
    try:
        answer = stranger.hello(protocol=99)
        assert isinstance(answer, Refused)
        assert f"protocol version: the hub has {PROTOCOL}, actor stranger has 99" in answer.reason
        answer = stranger.hello(schema="0" * 16)
        assert isinstance(answer, Refused)
        assert f"schema hash: the hub has {schema_hash()}, actor stranger has {'0' * 16}" in answer.reason
        assert isinstance(stranger.hello(), Welcome)
        record = next(entry.record for entry in read_events(run.folder / "trajectories") if entry.record)
        damaged = record[:32] + bytes(16) + record[48:]
        for seq, sent in enumerate((damaged, record, b"\xc1" * 64)):  # the second is another actor's
            answer = stranger.ask(Deliver(seq=seq), sent)
            while isinstance(
                answer, Refused
            ):  # perhaps the network's doing: it is asked for again, a few times
                assert answer.retry
                answer = stranger.ask(Deliver(seq=seq), sent)
            assert answer == Ack(seqs=(seq,), bytes=len(sent))
        refused(run.resume().end(), f"{run.folder} is in use by process {train.popen.pid}")
    finally:
        stranger.close()
        learner.resume()
    ended = train.end()
    assert ended.code == 0, run.story(ended)
    books = check_finished(run.folder, run.config)
    assert books.quarantined == 3
    bad = [path.read_bytes() for path in (run.folder / "quarantine").iterdir()]
    assert sum(damaged in data for data in bad) == 1 and len(bad) == 3
