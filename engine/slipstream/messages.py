"""Floor 1. The control messages between hub, actors and learner, and the one function that decodes them.

Every ZeroMQ message is one frame (MessagePack of a tagged struct of this file, at most 64 KiB, and its
CRC-32C, little-endian: one flipped bit of an Ack would delete what nobody has), for two kinds followed by
data:

    actor -> hub      Hello, Want, Deliver + its record, Proof, Status, Ping
    hub -> actor      Welcome, Refused, Grant, Ack, Weights, Stop, Ping
    learner -> hub    Hello, Publish, Pull, Checkpointed, Report, Finish, Ping
    hub -> learner    Welcome, Refused, Batch + one record per trajectory, Evaluated, Stop, Ping
"""

from __future__ import annotations

import struct
from typing import Any, Final, TypeVar

import google_crc32c
import msgspec

from slipstream.errors import DamageError, FrameError
from slipstream.types import Lease, Version, WeightProof, WeightUpdate
from slipstream_kernels.delivery import load

PROTOCOL: Final = 4
MAX_HEADER_BYTES: Final = 64 << 10
MAX_DEPTH: Final = 16
MAX_ITEMS: Final = 1 << 16
Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """Base of all control messages; `kind` on the wire is the class's name."""


class Hello(Message, frozen=True, kw_only=True, tag=True):
    """The first message of every connection."""

    role: str
    """"actor" or "learner"."""
    name: str
    run: str
    protocol: int
    schema: str
    """Hash of every struct and array on the wire (`wire.schema_hash`)."""
    session: str
    """Drawn anew by each process: the same session reconnects, another one replaces it."""
    step: int = 0
    """Learner only: the checkpoint step it resumes from."""
    history: str = ""
    """Learner only: what that checkpoint was trained on (history.py)."""


class Want(Message, frozen=True, kw_only=True, tag=True):
    """How many episodes an actor could start now; replaces its last Want."""

    train: int
    evaluate: int
    received_train: int
    """Leases of each sort this connection has received, so that those on the way are not granted twice."""
    received_evaluate: int


class Deliver(Message, frozen=True, kw_only=True, tag=True):
    """Announces the record of a trajectory in the frame that follows."""

    seq: int
    """The spool's number, quoted by Ack."""


class Proof(Message, frozen=True, kw_only=True, tag=True):
    """An actor's evidence that it holds a version."""

    proof: WeightProof


class Status(Message, frozen=True, kw_only=True, tag=True):
    """An actor's counters, for display and metrics."""

    counters: dict[str, float]


class Ping(Message, frozen=True, kw_only=True, tag=True):
    """Asks for a sign of life; the hub answers with the same."""


class Welcome(Message, frozen=True, kw_only=True, tag=True):
    """The answer to a Hello that is let in."""

    epoch: int
    """Actor: its epoch. Learner: its incarnation."""
    credit_bytes: int = 0
    """Actor: most bytes on the way before their acknowledgement."""
    update: WeightUpdate | None = None
    """Actor: the newest weights, if any are published."""
    next_serial: int = 0
    """Learner: the serial of its next publication."""
    fork_step: int = 0
    """Learner: the step its incarnation started from."""


class Refused(Message, frozen=True, kw_only=True, tag=True):
    """The hub does not serve this peer, and why."""

    reason: str
    retry: bool = False
    """True when another Hello would be let in: the hub restarted, or had given the peer up."""


class Grant(Message, frozen=True, kw_only=True, tag=True):
    """Leases for an actor."""

    leases: tuple[Lease, ...]
    pinned: WeightUpdate | None = None
    """The weights of the evaluation leases among them."""


class Ack(Message, frozen=True, kw_only=True, tag=True):
    """These spool records are in the hub's log, or will never be: delete them."""

    seqs: tuple[int, ...]
    bytes: int
    """Credit given back."""


class Weights(Message, frozen=True, kw_only=True, tag=True):
    """New weights are published."""

    update: WeightUpdate


class Stop(Message, frozen=True, kw_only=True, tag=True):
    """The run is over for this peer."""

    reason: str


class Publish(Message, frozen=True, kw_only=True, tag=True):
    """The learner has written new weights."""

    update: WeightUpdate


class Pull(Message, frozen=True, kw_only=True, tag=True):
    """The learner waits for the batch of this step (0 is the first)."""

    step: int


class Checkpointed(Message, frozen=True, kw_only=True, tag=True):
    """The learner has published a checkpoint of this step."""

    step: int
    oldest: int
    """Step of the oldest checkpoint it keeps."""


class Report(Message, frozen=True, kw_only=True, tag=True):
    """One row of the learner's metrics; "step" is among its keys."""

    about: str
    """"train" or "evaluation"."""
    metrics: dict[str, float | list[float]]


class Finish(Message, frozen=True, kw_only=True, tag=True):
    """The learner is done: the hub tells every actor to stop."""

    reason: str


class Batch(Message, frozen=True, kw_only=True, tag=True):
    """The trajectories of one step, in whole groups; one record per frame follows."""

    step: int
    counters: dict[str, float]
    versions: tuple[Version, ...]
    """What every serial among the trajectories' tokens stands for."""
    forks: dict[int, int]
    """incarnation -> the step it started from, of all since the oldest among `versions`."""
    history: str
    """What the learner has been trained on after this batch (history.py)."""


class Evaluated(Message, frozen=True, kw_only=True, tag=True):
    """The result of one held-out evaluation, pinned to one serial."""

    serial: int
    step: int
    success: float
    """Share of tasks solved."""
    count: int
    metrics: dict[str, float]
    """Means over the tasks: reward, turns, tokens, and the share of each outcome."""
    solved: tuple[tuple[int, bool], ...] = ()
    """Each task, and whether it was solved."""
    replayed: bool = False
    """True when sent again after a learner's Hello."""


AnyMessage = (
    Hello | Want | Deliver | Proof | Status | Ping | Welcome | Refused | Grant | Ack | Weights | Stop
    | Publish | Pull | Checkpointed | Report | Finish | Batch | Evaluated
)  # fmt: skip

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(AnyMessage)
_CHECK: Final = struct.Struct("<I")


def encode_message(message: Message) -> bytes:
    """Return the one frame of a control message; raises FrameError when no reader would take it."""
    frame = _ENCODER.encode(message)
    if len(frame) > MAX_HEADER_BYTES:
        raise FrameError(
            f"{type(message).__name__}: expected at most {MAX_HEADER_BYTES} bytes, got {len(frame)}"
        )
    return frame + _CHECK.pack(google_crc32c.value(frame))


def decode_message(frame: Buffer) -> AnyMessage:
    """Return the message in a frame; raises DamageError for a wrong check, FrameError for anything else."""
    body, check = bytes(frame[: -_CHECK.size]), bytes(frame[-_CHECK.size :])
    if _CHECK.pack(google_crc32c.value(body)) != check:
        raise DamageError(f"message: {len(frame)} bytes, whose CRC-32C is not the one behind them")
    message: AnyMessage = decode_struct(body, _DECODER, what="message", limit=MAX_HEADER_BYTES)
    return message


def decode_struct(
    frame: Buffer,
    decoder: msgspec.msgpack.Decoder[T],
    *,
    what: str,
    limit: int,
    most_items: int = MAX_ITEMS,
    free_form: bool = False,
) -> T:
    """Decode untrusted MessagePack of at most `limit` bytes; every failure is a FrameError naming `what`.

    A schema without `free_form` parts admits neither extension types nor depth of its own, so few possible
    containers prove it harmless; otherwise each item is looked at.
    """
    if len(frame) > limit:
        raise FrameError(f"{what}: expected at most {limit} bytes, got {len(frame)}")
    if free_form or len(bytes(frame).translate(None, _NO_CONTAINERS)) > _FEW_CONTAINERS:
        check_nesting(frame, what=what, most_items=most_items)
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError) as error:
        raise FrameError(f"{what}: expected its schema, got {error}") from error


def check_nesting(frame: Buffer, *, what: str, most_items: int = MAX_ITEMS) -> None:
    """Refuse MessagePack that is deep, cut off, oversized in items, or holds extension types.

    msgspec decodes recursively: deep nesting overflows a small C stack before Python can raise. Raises
    FrameError naming `what`.
    """
    native = load()
    if native is None or not native.is_plain_msgpack(
        bytes(frame), most_depth=MAX_DEPTH, most_items=most_items
    ):
        check_nesting_in_python(frame, what=what, most_items=most_items)


def check_nesting_in_python(frame: Buffer, *, what: str, most_items: int = MAX_ITEMS) -> None:
    """Do what `check_nesting` does, without the native library; raises FrameError."""
    position, end, items = 0, len(frame), 0
    open_items = [1]
    while open_items:
        if open_items[-1] == 0:
            open_items.pop()
            continue
        open_items[-1] -= 1
        items += 1
        if position >= end:
            raise FrameError(f"{what}: expected a whole MessagePack value, got its first {end} bytes")
        skip, children = _item(frame, position, what)
        position += skip
        if children:
            open_items.append(children)
        if len(open_items) > MAX_DEPTH or items > most_items or children > end:
            raise FrameError(f"{what}: expected depth <= {MAX_DEPTH} and <= {most_items} items, got more")
    if position != end:
        raise FrameError(f"{what}: expected {position} bytes, got {end}")


_NO_CONTAINERS: Final = bytes(byte for byte in range(256) if not (0x80 <= byte < 0xA0 or 0xDC <= byte < 0xE0))
_FEW_CONTAINERS: Final = 64
_SIZED: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_FIXED: Final = {0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9,
                 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}  # fmt: skip
_CONTAINERS: Final = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def _item(frame: Buffer, position: int, what: str) -> tuple[int, int]:
    """Return (bytes of this item without its children, number of its children)."""
    first: int = frame[position]
    if first < 0x80 or first >= 0xE0:
        return 1, 0
    if first < 0x90:
        return 1, 2 * (first & 0x0F)
    if first < 0xA0:
        return 1, first & 0x0F
    if first < 0xC0:
        return 1 + (first & 0x1F), 0
    if first in _FIXED:
        return _FIXED[first], 0
    if first in _SIZED:
        width = _SIZED[first]
        return 1 + width + int.from_bytes(frame[position + 1 : position + 1 + width], "big"), 0
    if first in _CONTAINERS:
        width, per_entry = _CONTAINERS[first]
        return 1 + width, per_entry * int.from_bytes(frame[position + 1 : position + 1 + width], "big")
    raise FrameError(f"{what}: expected plain MessagePack, got type byte {first:#04x} at {position}")


def message_schema() -> Any:
    """Return the JSON schema of every message: one half of the wire's schema hash."""
    return msgspec.json.schema(AnyMessage)
