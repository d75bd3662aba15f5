"""Every decoder of bytes from the network or from a file, with samples and its documented errors."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from fuzz_mutations import Mutate, mutations, record_mutations

from slipstream import events, integrity, messages, metrics, records, run_folder, synthetic, wire
from slipstream.config import RunConfig, dump, load_config
from slipstream.environments.research import TOOLS
from slipstream.errors import (
    AddressError,
    CheckpointError,
    ConfigurationError,
    FrameError,
    RunFolderError,
    StorageError,
)
from slipstream.flight_recorder import FlightRecorder, read_flight, read_flights
from slipstream.ingest import IngestLog, read_events
from slipstream.rendezvous import hub_address, run_id
from slipstream.spool import Spool
from slipstream.tools.hermes import format_call, parse_call
from slipstream.types import (
    Lease,
    Outcome,
    Sampling,
    Score,
    ScoreKind,
    Split,
    TaskAttempt,
    Timings,
    ToolCall,
    ToolStatus,
    Trajectory,
    TrajectoryId,
)
from slipstream_kernels.delivery import load

ATTEMPT = TaskAttempt(task=3, seed=1, group=17, attempt=2)
IDENTITY = TrajectoryId(run="0123456789abcdef", actor="actor-0", epoch=2, seq=77)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One decoder."""

    samples: Callable[[], Sequence[bytes]]
    decode: Callable[[bytes], None]
    errors: tuple[type[Exception], ...]
    """What it may raise; anything else is a find."""
    share: float
    """Of the inputs of a mixed run: dear ones get fewer."""
    mutate: Callable[[Sequence[bytes], int | str], Mutate] = mutations


# Messages and records


def message_samples() -> list[bytes]:
    update = synthetic.update(3, step=2)
    lease = Lease(attempt=ATTEMPT, split=Split.HELDOUT, evaluation=3, issue=1)
    made = [
        messages.Hello(
            role="actor", name="actor-0", run="r", protocol=2, schema=wire.schema_hash(), session="s"
        ),
        messages.Want(train=3, evaluate=1, received_train=7, received_evaluate=0),
        messages.Deliver(seq=5),
        messages.Proof(proof=synthetic.proof(update)),
        messages.Status(counters={"made": 3.0, "tokens_per_s": 1e3}),
        messages.Ping(),
        messages.Welcome(epoch=1, credit_bytes=1 << 23, update=update),
        messages.Refused(reason="schema", retry=True),
        messages.Grant(leases=(lease,) * 3, pinned=update),
        messages.Ack(seqs=tuple(range(20)), bytes=9),
        messages.Weights(update=update),
        messages.Stop(reason="over"),
        messages.Publish(update=update),
        messages.Pull(step=3),
        messages.Checkpointed(step=4, oldest=2),
        messages.Report(about="train", metrics={"loss": 0.5, "slip/histogram": [1.0, 2.0]}),
        messages.Finish(reason="over"),
        messages.Batch(
            step=3, counters={"buffered": 3.0}, versions=(update.version,) * 3, forks={1: 2}, history="h"
        ),
        messages.Evaluated(
            serial=3, step=2, success=0.5, count=256, metrics={"turns": 3.0}, solved=((0, True),)
        ),
    ]
    bombs = [
        b"\x91" * 3000,
        b"\x81\xa1a" * 1000,
        b"\xdd\xff\xff\xff\xff",
        b"\x82\xa1x" + b"\x91" * 400 + b"\xc0",
    ]
    return [messages.encode_message(message) for message in made] + bombs


def decode_message(data: bytes) -> None:
    if not (len(data) + data[-1] if data else 0) & 127:
        nesting_agrees(data)
    messages.decode_message(data)


def nesting_agrees(data: bytes) -> None:
    """The native check of MessagePack's shape and the one in Python say the same."""
    native = load()
    if native is None:
        return
    plain = native.is_plain_msgpack(data, most_depth=messages.MAX_DEPTH, most_items=messages.MAX_ITEMS)
    try:
        messages.check_nesting_in_python(data, what="message")
        assert plain, "only Python takes this MessagePack"
    except FrameError as error:
        assert not plain, f"only the native library takes this MessagePack: {error}"


def made_trajectories() -> list[Trajectory]:
    calls = (
        ToolCall(turn=0, name="open", arguments={"a": [1, None, {"b": [True, 2.5]}], "c": "é"},
                 status=ToolStatus.ERROR, latency_s=0.5, cached=True),
    )  # fmt: skip
    scores = (
        Score(name="answer", kind=ScoreKind.OUTCOME, weight=1.0, value=-1.0),
        Score(name="step", kind=ScoreKind.PENALTY, weight=-0.05, value=None, invalid="no"),
    )
    small = [synthetic.trajectory(tokens, turns=2, serial=3) for tokens in (2, 8, 33)]
    other = dataclasses.replace(
        small[2], tool_calls=calls, scores=scores, outcome=Outcome.TIMED_OUT, note="late", identity=IDENTITY,
        attempt=ATTEMPT, sampling=Sampling(temperature=0.8),
        timings=Timings(started_s=1e9, finished_s=1e9 + 2, generate_s=1.5, marks_ms=(0, 900, 70_000)),
    )  # fmt: skip
    return [*small, other]


def record_samples() -> list[bytes]:
    return [bytes(wire.encode_trajectory(made)) for made in made_trajectories()]


def decode_record(data: bytes) -> None:
    if not (len(data) + data[-1] if data else 0) & 63:
        record_agrees(data)
    arrival = wire.inspect_trajectory(data)
    # The mask, a byte per token, is the last of the arrays.
    tokens = int.from_bytes(data[4 * (len(wire.ARRAYS) - 1) :][:4], "little")
    assert max(arrival.turns, arrival.sampled, len(arrival.serials)) <= tokens


def record_agrees(data: bytes) -> None:
    """Native and Python checks find the same, and so do inspecting and decoding."""
    native = load()
    if native is not None:
        found = native.check(integrity.address(data), len(data))
        if found is not None and not 0 <= found.turns <= found.tokens <= wire.MAX_TOKENS:
            found = None
        try:
            assert wire._check_in_python(data) == found
        except FrameError as error:
            assert found is None, f"only the native library takes this record: {error}"
    try:
        trajectory = wire.decode_trajectory(data)
    except FrameError as error:
        try:
            wire.inspect_trajectory(data)
        except FrameError as other:
            assert str(error) == str(other)
            return
        raise AssertionError("inspecting takes what decoding refuses") from error
    assert trajectory.turn_rewards.size <= trajectory.token_ids.size <= wire.MAX_TOKENS
    arrival = wire.inspect_trajectory(data)
    assert arrival.sampled == int(trajectory.loss_mask.sum())
    assert arrival.turns == trajectory.turn_rewards.size
    assert arrival.serials == tuple(sorted(set(trajectory.versions[trajectory.loss_mask > 0].tolist())))


def event_samples() -> list[bytes]:
    update = synthetic.update(3, step=2)
    received = events.Received(
        identity=IDENTITY, attempt=ATTEMPT, split=Split.TRAIN, evaluation=-1, issue=0,
        outcome=Outcome.COMPLETED, success=True, reward=0.5, turns=2, tokens=16, serials=(3, 4),
        verdict="buffered",
    )  # fmt: skip
    made: list[events.Event] = [
        received,
        events.Epoch(actor="a", epoch=0, session="s"),
        events.Incarnation(number=1, fork_step=0, session="s"),
        events.GroupOpened(group=0, task=0, split=Split.TRAIN),
        events.GroupOpened(group=1, task=3, split=Split.TRAIN, stage=0, temperature=1.1),
        events.Leased(actor="a", leases=(Lease(attempt=ATTEMPT, split=Split.TRAIN),) * 2),
        events.Released(slots=((-1, 1, 2),), reason="time-out"),
        events.Quarantined(actor="a", file="f", reason="r"),
        events.Trained(step=3, identities=(IDENTITY,) * 3),
        events.Dropped(identities=(IDENTITY,), reason="filtered"),
        events.GaveUp(slot=(-1, 1, 2), identities=(IDENTITY,)),
        events.Published(update=update),
        events.Proven(actor="a", session="s", serial=3),
        events.RolledBack(step=3),
        events.EvaluationDone(
            serial=3, step=2, success=0.5, count=4, metrics={"turns": 3.0}, solved=((7, False),)
        ),
        events.Measured(step=3, kl=0.1),
        events.CheckpointPublished(step=3),
    ]
    return [msgspec.msgpack.encode(event) for event in made]


def decode_event(data: bytes) -> None:
    events.decode_event(data)


# Files


@functools.cache
def folder() -> Path:
    """A folder of this process, on a memory disk where there is one; gone with it."""
    where = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    path = where / f"slipstream-fuzz-{os.getpid()}"
    path.mkdir(exist_ok=True)
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def emptied(name: str) -> Path:
    path = folder() / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def log_samples() -> list[bytes]:
    record = record_samples()[1]
    bodies = [(len(body).to_bytes(4, "little") + body, b"") for body in event_samples()[1:6]]
    bodies.insert(2, (len(event_samples()[0]).to_bytes(4, "little") + event_samples()[0], record))
    whole = b"".join(b"".join(records.pack(seq, [body], tail)) for seq, (body, tail) in enumerate(bodies))
    short = b"".join(b"".join(records.pack(seq, [bytes([seq])])) for seq in range(4))
    return [whole, short, whole + records.END + whole[:99], b""]


def scan(data: bytes) -> None:
    for ends_at_zeros in (False, True):
        found = records.scan(data, ends_at_zeros=ends_at_zeros)
        ends = [0]
        for record in found.records:
            assert record.offset >= ends[-1] and record.end <= len(data)
            ends.append(record.end)
        assert found.torn <= len(data)


NEW = bytes(wire.encode_trajectory(synthetic.trajectory(2)))


def recover_spool(data: bytes) -> None:
    home = emptied("spool")
    (home / "actor-0.0").write_bytes(data)
    spool = Spool(home / "actor-0")
    held = dict(spool.pending())
    assert len(held) == len(spool) and all(seq < spool.next_seq for seq in held)
    spool.append(spool.next_seq, NEW)
    spool.close()
    again = Spool(home / "actor-0")
    assert dict(again.pending()) == held | {again.next_seq - 1: NEW}
    again.close()


def read_log(data: bytes) -> None:
    home = emptied("log")
    (home / "000000.log").write_bytes(data)
    try:
        log = IngestLog(home)
    except StorageError:
        log = None
    if log is not None:
        try:
            for entry in log.replay():
                log.read(entry.position)
        finally:
            log.close()
    for _ in read_events(home):
        pass


def ring_samples() -> list[bytes]:
    recorder, path = FlightRecorder(), emptied("ring") / "hub-0.ring"
    recorder.start(path)
    recorder.note("batch 3 handed out")
    recorder.waits("a batch", 3.0)
    data = path.read_bytes()
    recorder.end()
    return [data[:1600], path.read_bytes()[:1600]]


def read_ring(data: bytes) -> None:
    path = folder() / "ring" / "other.ring"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    read_flights(path.parent)
    read_flight(path)


def weight_samples() -> list[bytes]:
    """Manifest and tensors of one folder in one input: u32 bytes of the first | first | second."""
    import torch

    from slipstream.weights.filesystem import FilesystemPublisher

    tensors = {"norm": torch.ones(3), "layers.0.head": torch.zeros((2, 4), dtype=torch.bfloat16)}
    home = Path(FilesystemPublisher(emptied("made")).publish(tensors, serial=3))
    parts = [(home / name).read_bytes() for name in ("manifest.json", "model.safetensors")]
    # The checksum is another's concern: the input must get past it as often as it can.
    return [len(parts[0]).to_bytes(4, "little") + parts[0] + parts[1]]


def fetch_weights(data: bytes) -> None:
    from slipstream.checkpoint import read_tensors
    from slipstream.weights.filesystem import FilesystemSubscriber

    home = emptied("weights")
    split = 4 + int.from_bytes(data[:4], "little")
    (home / "manifest.json").write_bytes(data[4:split])
    (home / "model.safetensors").write_bytes(data[split:])
    update = dataclasses.replace(synthetic.update(3, step=2), folder=str(home))
    try:
        FilesystemSubscriber().fetch(update)
    except CheckpointError:
        tensors = read_tensors(home / "model.safetensors")
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(data)


def verify_checkpoint(data: bytes) -> None:
    from slipstream import checkpoint

    home = emptied("checkpoint")
    (home / "manifest.json").write_bytes(data)
    (home / "state.json").write_bytes(data)
    for read in (lambda: checkpoint.read_state(home / "state.json"), lambda: checkpoint.verify(home)):
        try:
            read()
        except CheckpointError:
            continue
    assert sorted(path.name for path in folder().glob("*.json")) == []


def checkpoint_samples() -> list[bytes]:
    files = {"state.json": {"size": 3, "sha256": "0" * 64}, "../up.json": {"size": 1, "sha256": ""}}
    manifest = {"format": 1, "step": 7, "files": files}
    state = {"step": 3, "guard": {"skipped": 0}, "rows": [{"loss": 0.5}]}
    return [json.dumps(value, indent=1).encode() for value in (manifest, state)]


def toml_samples() -> list[bytes]:
    return [dump(RunConfig()).encode(), b"seed = 3\n[optim]\nbetas = [0.9, 0.95]\n", b"x = " + b"[" * 600]


def load_toml(data: bytes) -> None:
    path = folder() / "recipe.toml"
    path.write_bytes(data)
    text = data.decode(errors="surrogateescape")
    for overrides in ([], [f"optim.learning_rate={text[-12:]}"], [text[:24]]):
        try:
            load_config(path, overrides)
        except ConfigurationError:
            continue


def call_samples() -> list[bytes]:
    call = format_call("search", {"query": "Ada Kline home"})
    return [
        call.encode(),
        f"I think {format_call('open', {'document': '17'})} so".encode(),
        (call + call).encode(),
    ]


def read_call(data: bytes) -> None:
    for text in (data.decode(errors="replace"), data.decode("latin-1")):
        message = parse_call(text, TOOLS)
        assert message.error or message.name in {tool.name for tool in TOOLS}


def json_samples() -> list[bytes]:
    return [
        b'{"run": "0123456789abcdef"}',
        b'{"address": "tcp://127.0.0.1:5555"}',
        b'{"kind": "train", "step": 3, "time": 1.0, "loss": null}\n{"step": 1e999}\n{"step": NaN}\n',
        b'{"step": ' + b"[" * 1200 + b"}",
    ]


def read_small_files(data: bytes) -> None:
    home = folder() / "run"
    home.mkdir(exist_ok=True)
    for name in ("run.json", "hub.json", "metrics.jsonl"):
        (home / name).write_bytes(data)
    run_folder.read_json(home / "hub.json")
    metrics.read_rows(home)
    for read in (run_id, hub_address):
        try:
            read(home)
        except (RunFolderError, AddressError):
            continue


TARGETS = {
    "message": Target(samples=message_samples, decode=decode_message, errors=(FrameError,), share=0.60),
    "record": Target(samples=record_samples, decode=decode_record, errors=(FrameError,), share=0.34,
                     mutate=record_mutations),
    "event": Target(samples=event_samples, decode=decode_event, errors=(FrameError,), share=0.04),
    "call": Target(samples=call_samples, decode=read_call, errors=(), share=0.01),
    "scan": Target(samples=log_samples, decode=scan, errors=(), share=0.002),
    "spool": Target(samples=log_samples, decode=recover_spool, errors=(), share=0.0005),
    "log": Target(samples=log_samples, decode=read_log, errors=(StorageError,), share=0.0005),
    "ring": Target(samples=ring_samples, decode=read_ring, errors=(RunFolderError,), share=0.0005),
    "weights": Target(samples=weight_samples, decode=fetch_weights, errors=(CheckpointError,), share=0.0005),
    "checkpoint": Target(samples=checkpoint_samples, decode=verify_checkpoint, errors=(), share=0.0005),
    "toml": Target(samples=toml_samples, decode=load_toml, errors=(), share=0.0003),
    "json": Target(samples=json_samples, decode=read_small_files, errors=(), share=0.0005),
}  # fmt: skip
