"""The books of a run by content: what was promised, received, trained and kept must be the same things.

promised = in the log + quarantined + in spools          nothing is lost
the log, and the living line of batches, hold each once    nothing is doubled
the learner's checkpoint = the living line                 the learner trained what the hub thinks it did
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import roles

from slipstream.spool import Spool, spools_in

Identity = tuple[str, str, int, int]


@dataclass(kw_only=True)
class Log:
    """A hub's log by content."""

    keys: dict[str, Identity] = field(default_factory=dict)
    contents: dict[Identity, oracle.Content] = field(default_factory=dict)
    verdicts: dict[Identity, str] = field(default_factory=dict)
    slots: dict[Identity, tuple[int, int, int]] = field(default_factory=dict)
    line: list[list[Identity]] = field(default_factory=list)
    """The batches of the living line."""
    dropped: set[Identity] = field(default_factory=set)
    quarantined: list[str] = field(default_factory=list)
    """Names of files."""
    holders: dict[str, tuple[int, str]] = field(default_factory=dict)
    """actor -> its newest epoch and session."""
    proven: dict[tuple[str, str], set[tuple[str, int]]] = field(default_factory=dict)
    newest_seq: dict[tuple[str, int], int] = field(default_factory=dict)
    owners: dict[tuple[str, int], str] = field(default_factory=dict)
    rollbacks: int = 0
    wrong: list[str] = field(default_factory=list)

    def take(self, event: dict[str, Any], record: bytes, spools: dict[str, str]) -> None:
        """Follow one event; `spools` tells whose session is whose."""
        match event["kind"]:
            case "Epoch":
                self.holders[event["actor"]] = event["epoch"], event["session"]
                self.owners[event["actor"], event["epoch"]] = event["session"]
            case "Proven":
                self.proven.setdefault((event["actor"], event["session"]), set()).add(
                    (event["server"], event["serial"])
                )
            case "Received":
                self._received(event, record, spools)
            case "Trained":
                if event["step"] != len(self.line):
                    self.wrong.append(f"batch {event['step']} follows batch {len(self.line) - 1}")
                self.line.append([_identity(each) for each in event["identities"]])
            case "RolledBack":
                del self.line[event["step"] :]
                self.rollbacks += 1
            case "Dropped" | "GaveUp":
                self.dropped |= {_identity(each) for each in event["identities"]}
            case "Quarantined":
                self.quarantined.append(event["file"])

    def _received(self, event: dict[str, Any], record: bytes, spools: dict[str, str]) -> None:
        identity, content = _identity(event["identity"]), oracle.content_of(record)
        if _identity(content.header["identity"]) != identity:
            self.wrong.append(f"{identity} stands before the record of {content.header['identity']}")
        if content.key in self.keys:
            self.wrong.append(
                f"doubled: {content.key} is in the log as {self.keys[content.key]} and {identity}"
            )
        self.keys[content.key] = identity
        self.contents[identity], self.verdicts[identity] = content, event["verdict"]
        attempt = event["attempt"]
        self.slots[identity] = event["evaluation"], attempt["group"], attempt["attempt"]
        actor, epoch = identity[1], identity[2]
        newest, session = self.holders[actor]
        if spools.get(session) != content.maker:
            self.wrong.append(
                f"not fenced: {identity} of {content.maker} came while {spools.get(session)} held it"
            )
        if epoch == newest:
            before = self.newest_seq.get((actor, epoch), -1)
            if identity[3] <= before:
                self.wrong.append(f"order: {identity} came after number {before}")
            self.newest_seq[actor, epoch] = identity[3]
        if event["verdict"] in ("buffered", "evaluated"):
            known = self.proven.get((actor, self.owners[actor, epoch]), set())
            # No server samples in these runs: every token is of the actor's own backend.
            claimed = {("", serial) for serial in content.serials}
            if not claimed <= known:
                self.wrong.append(f"unproven: {identity} was taken with {sorted(claimed - known)}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the checker found."""

    wrong: list[str]
    counts: dict[str, int]


def check(folder: Path, aside: Path, *, drained: bool = True) -> Verdict:
    """Compare the books of a run that has come to its end; `drained`: every spool must be empty."""
    log = Log()
    spools = oracle.sessions(aside / "sessions")
    for event, record in oracle.read_log(folder / "log"):
        log.take(event, record, spools)
    begun, promised = set[str](), set[str]()
    for path in (aside / "oracle").iterdir():
        some_begun, some_promised = oracle.read_oracle(path)
        begun |= some_begun
        promised |= some_promised
    wrong = list(log.wrong)
    quarantined = _quarantined(folder, log, wrong)
    spooled = _spooled(folder)
    lost = promised - set(log.keys) - quarantined - spooled
    wrong += [f"lost: {key} was promised by {_maker(aside, key)} and is nowhere" for key in sorted(lost)]
    strange = (set(log.keys) | quarantined | spooled) - begun
    wrong += [f"from nowhere: {key}, {log.keys.get(key)}" for key in sorted(strange)]
    if drained:
        late = spooled - set(log.keys) - quarantined
        wrong += [f"undelivered: {key} is still in a spool" for key in sorted(late)]
    _check_training(folder, log, wrong)
    _check_status(folder, log, wrong)
    counts = Counter(log.verdicts.values())
    return Verdict(
        wrong=wrong,
        counts={
            "begun": len(begun),
            "promised": len(promised),
            "received": len(log.keys),
            "quarantined": len(quarantined),
            "trained": sum(map(len, log.line)),
            "steps": len(log.line),
            "dropped": len(log.dropped),
            "rollbacks": log.rollbacks,
            "lost": len(lost),
            **counts,
        },
    )


def _check_training(folder: Path, log: Log, wrong: list[str]) -> None:
    trained = [identity for batch in log.line for identity in batch]
    wrong += [f"doubled: {each} was trained {n} times" for each, n in Counter(trained).items() if n > 1]
    slots = Counter(log.slots[identity] for identity in trained if identity in log.slots)
    wrong += [f"doubled: attempt {slot} was trained {n} times" for slot, n in slots.items() if n > 1]
    for identity in trained:
        if log.verdicts.get(identity) != "buffered":
            wrong.append(f"{identity} was trained, and is {log.verdicts.get(identity)}")
    wrong += [f"{each} was dropped and trained" for each in set(trained) & log.dropped]
    told = roles.trained_of(folder / "checkpoints")
    line = [[log.contents[each].key for each in batch if each in log.contents] for batch in log.line]
    if told != line:
        first = next(
            (n for n, (a, b) in enumerate(zip(told, line, strict=False)) if a != b), min(len(told), len(line))
        )
        wrong.append(
            f"the checkpoint of {len(told)} steps and the living line of {len(line)} differ from {first} on"
        )


def _check_status(folder: Path, log: Log, wrong: list[str]) -> None:
    """Compare the hub's own books with these."""
    told = json.loads((folder / "status.json").read_text())["books"]
    training = [each for each in log.verdicts if log.slots[each][0] < 0]
    verdicts = Counter(log.verdicts[each] for each in training)
    trained = sum(map(len, log.line))
    books = {
        "made": len(training) + len(log.quarantined),
        "trained": trained,
        "buffered": verdicts["buffered"] - trained - len(log.dropped),
        "quarantined": len(log.quarantined),
        "unproven": verdicts["unproven"],
        "failed_infrastructure": verdicts["failed_infrastructure"],
        "duplicate": verdicts["duplicate"],
    }
    wrong += [
        f"books: the hub says {told[name]} {name}, its log {n}"
        for name, n in books.items()
        if told[name] != n
    ]


def _quarantined(folder: Path, log: Log, wrong: list[str]) -> set[str]:
    keys = set[str]()
    for name in log.quarantined:
        path = folder / "quarantine" / name
        if not path.is_file() or not path.stat().st_size:
            wrong.append(f"lost: quarantine forgot {name}")
            continue
        content = _readable(path.read_bytes())
        if content is not None:
            keys.add(content.key)
            if content.header["attempt"]["group"] != 1 << 30:
                wrong.append(f"quarantined without a fault of its own: {content.header['identity']}")
    return keys


def _readable(record: bytes) -> oracle.Content | None:
    try:
        return oracle.content_of(record)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, oracle.struct.error):
        return None


def _spooled(folder: Path) -> set[str]:
    keys = set[str]()
    for path in spools_in(folder / "spool"):
        spool = Spool(path)
        keys |= {oracle.content_of(payload).key for _, payload in spool.pending()}
        spool.close()
    return keys


def _maker(aside: Path, key: str) -> str:
    return next(
        (path.name for path in (aside / "oracle").iterdir() if f"> {key}\n" in path.read_text()), "nobody"
    )


def _identity(fields: dict[str, Any]) -> Identity:
    return fields["run"], fields["actor"], fields["epoch"], fields["seq"]
