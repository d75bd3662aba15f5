"""Floor 4. Where rows can be mirrored to; each sink is made and used in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

from slipstream import run_folder
from slipstream.metrics import Row


class Sink(Protocol):
    """One place; whatever it raises costs a row."""

    def write(self, row: Row) -> None:
        """Take one row of metrics.jsonl."""

    def close(self) -> None:
        """Finish what has been taken."""


def scalars(row: Row) -> dict[str, float]:
    """Return the numbers of a row as kind/name, such as train/success; without `step` and `time`."""
    kind = row.get("kind", "train")
    return {
        f"{kind}/{name}": float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and name not in ("step", "time")
    }


class TensorBoard:
    """Event files in RUN/tensorboard, written without TensorFlow and without torch."""

    def __init__(self, folder: Path, _name: str, _identity: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder / "tensorboard"))

    def write(self, row: Row) -> None:
        """Add an event."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row).items()]
        event = self._event(
            step=int(row.get("step") or 0),
            wall_time=float(row.get("time") or 0.0),
            summary=self._summary(value=values),
        )
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class Wandb:
    """A run in Weights & Biases; each kind of row has its own axis of steps, since steps repeat."""

    def __init__(self, folder: Path, name: str, identity: str) -> None:
        import wandb

        self._run = wandb.init(
            project=name,
            name=folder.name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=run_folder.read_config(folder).model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        for kind in ("train", "evaluation", "warmup"):
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")

    def write(self, row: Row) -> None:
        """Log a row."""
        self._run.log({**scalars(row), f"{row.get('kind', 'train')}/step": row.get("step")})

    def close(self) -> None:
        """End the run there."""
        self._run.finish()


SINKS: Final[Mapping[str, Callable[[Path, str, str], Sink]]] = MappingProxyType(
    {"tensorboard": TensorBoard, "wandb": Wandb}
)
"""By name: of the sink, its key in [tracking], the package it needs, and the extra that installs that."""


def make_sink(name: str, folder: Path, project: str, identity: str) -> Any:
    """Return a sink; raises whatever its package does."""
    return SINKS[name](folder, project, identity)
