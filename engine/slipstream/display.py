"""Floor 5. Shows a run while it goes: one live screen on a terminal, plain lines elsewhere.

Both read the run folder only; what the launcher itself does reaches them as stages and events.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from slipstream.config import RunConfig
from slipstream.snapshot import Snapshot, take_snapshot

STAGES = ("warm start", "training", "final evaluation", "learning curve")
LIVE_S = 0.5
PLAIN_S = 5.0
BAR = 28


class Screen(Protocol):
    """Where a run is shown; entered while the run goes on."""

    def __enter__(self) -> Self:
        """Start showing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing; what was shown last stays."""

    def stage(self, name: str) -> None:
        """Tell that a stage begins."""

    def event(self, text: str) -> None:
        """Tell what happened, in one sentence."""

    def refresh(self) -> None:
        """Read the folder again if it is time to."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Show the summary of the finished run."""


def make_screen(config: RunConfig, folder: Path, stream: TextIO) -> Screen:
    """Return the live screen when `stream` is a terminal, else plain lines."""
    console = Console(file=stream)
    if console.is_terminal:
        return LiveScreen(config, folder, console)
    return PlainScreen(config, folder, stream)


class PlainScreen:
    """One line every few seconds, for logs and pipes."""

    def __init__(self, config: RunConfig, folder: Path, stream: TextIO, *, every_s: float = PLAIN_S) -> None:
        """Write lines to `stream`, at most one progress line in `every_s`."""
        self._config, self._folder, self._stream, self._every_s = config, folder, stream, every_s
        self._stage, self._next = "", 0.0

    def __enter__(self) -> Self:
        """Name the run."""
        self.event(f"run in {self._folder}, seed {self._config.seed}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""

    def stage(self, name: str) -> None:
        """Write a line for the stage's begin."""
        self._stage = name
        self._next = time.monotonic() + self._every_s
        self.event(f"stage {stage_number(name)}: {name}")

    def event(self, text: str) -> None:
        """Write the sentence with the time of day."""
        self._stream.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        self._stream.flush()

    def refresh(self) -> None:
        """Write a progress line when it is due."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every_s
            self.event(plain_line(take_snapshot(self._config, self._folder, self._stage)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the result."""
        for line in result_lines(summary, self._folder):
            self.event(line)


class LiveScreen:
    """One screen that redraws itself in place."""

    def __init__(self, config: RunConfig, folder: Path, console: Console) -> None:
        """Draw on `console`."""
        self._config, self._folder, self._console = config, folder, console
        self._stage, self._next = STAGES[0], 0.0
        self._events: deque[str] = deque(maxlen=5)
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Self:
        """Take the terminal's lower end."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last picture standing."""
        self._draw()
        self._live.stop()

    def stage(self, name: str) -> None:
        """Show the stage at once."""
        self._stage = name
        self._draw()

    def event(self, text: str) -> None:
        """Keep the sentence among the last events."""
        self._events.append(f"{time.strftime('%H:%M:%S')} {text}")
        self._draw()

    def refresh(self) -> None:
        """Draw when it is due."""
        if time.monotonic() >= self._next:
            self._draw()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Print the result above the picture."""
        for line in result_lines(summary, self._folder):
            self._console.print(line, highlight=False, markup=False)

    def _draw(self) -> None:
        self._next = time.monotonic() + LIVE_S
        snapshot = take_snapshot(self._config, self._folder, self._stage)
        title = f"Slipstream · {self._folder} · seed {self._config.seed}"
        self._live.update(picture(snapshot, list(self._events), title), refresh=True)


def picture(snapshot: Snapshot, events: Sequence[str], title: str) -> RenderableType:
    """Return the live screen's content."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    table.add_row("stage", f"{stage_number(snapshot.stage)} {snapshot.stage}")
    table.add_row("progress", _progress(snapshot))
    table.add_row("held-out success", _success(snapshot))
    table.add_row("training", f"success {_fixed(snapshot.success)}   reward {_fixed(snapshot.reward)}")
    table.add_row("slip", _histogram(snapshot))
    rates = f"{_whole(snapshot.generated_per_s)} generated   {_whole(snapshot.trained_per_s)} trained"
    table.add_row("tokens/s", rates)
    starved = "–" if snapshot.starved is None else f"{snapshot.starved:.0%}"
    table.add_row("waiting", Text("\n".join([*snapshot.waiting, f"learner starved {starved} of the time"])))
    table.add_row("actors", Text("\n".join(snapshot.actors) or "–"))
    if snapshot.cached is not None:
        table.add_row("tool cache", f"answered {snapshot.cached:.0%} of the calls")
    books = "   ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in snapshot.books.items())
    table.add_row("books", Text(books or "–"))
    table.add_row("events", Text("\n".join(events) or "–", style="dim"))
    return Panel(table, title=title, title_align="left", border_style="cyan", padding=(0, 1))


def plain_line(snapshot: Snapshot) -> str:
    """Return one line of progress."""
    held_out = snapshot.evaluations[-1][1] if snapshot.evaluations else None
    return (
        f"{snapshot.stage} step {snapshot.step}/{snapshot.steps} · success {_fixed(held_out)} held-out, "
        f"{_fixed(snapshot.success)} training · reward {_fixed(snapshot.reward)} · "
        f"slip {_fixed(snapshot.slip)} · tok/s {_whole(snapshot.generated_per_s)} generated, "
        f"{_whole(snapshot.trained_per_s)} trained · left {clock(snapshot.left_s)}"
    )


def result_lines(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the few lines a reader wants at the end."""
    interval = summary.get("success_ci95")
    span = f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    return [
        f"held-out success {_fixed(summary.get('success_warm_start'))} after the warm start, "
        f"{_fixed(summary.get('success_best'))} best{span}, {_fixed(summary.get('success_final'))} last",
        f"{summary.get('steps', 0):,} steps, {summary.get('trajectories', 0):,} trajectories, "
        f"{summary.get('tokens_trained', 0):,} trained tokens in {clock(summary.get('wall_seconds'))}",
        f"{summary.get('lost', 0):,} trajectories lost, {summary.get('doubled', 0):,} doubled, "
        f"{summary.get('restarts', 0):,} processes started again",
        f"see {folder / 'summary.json'} and {folder / 'learning_curve.png'}",
    ]


def sparkline(values: Sequence[float]) -> str:
    """Return one character per value of [0, 1]."""
    marks = "▁▂▃▄▅▆▇█"
    return "".join(marks[round(min(1.0, max(0.0, value)) * (len(marks) - 1))] for value in values)


def clock(seconds: float | None) -> str:
    """Return "1:02:03" or "2:03"; a dash when unknown."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def stage_number(name: str) -> str:
    """Return "2/4" for the second stage."""
    return f"{STAGES.index(name) + 1}/{len(STAGES)}" if name in STAGES else ""


def _progress(snapshot: Snapshot) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(1, snapshot.steps), completed=snapshot.step, width=BAR)
    row.add_row(bar, f"step {snapshot.step:,} of {snapshot.steps:,}", f"{clock(snapshot.left_s)} left")
    return row


def _success(snapshot: Snapshot) -> RenderableType:
    if not snapshot.evaluations:
        return Text("–")
    step, best = max(snapshot.evaluations, key=lambda pair: pair[1])
    values = [success for _, success in snapshot.evaluations]
    line = Text(f"{values[-1]:.3f}", style="bold green")
    line.append(f"   {sparkline(values[-40:])}   ", style="green")
    line.append(f"from {values[0]:.3f}, best {best:.3f} at step {step}", style="default")
    return line


def _histogram(snapshot: Snapshot) -> RenderableType:
    """Return one bar per slip with its share of the trained tokens."""
    tokens = sum(snapshot.slip_histogram)
    if not tokens:
        return Text("–")
    rows: list[RenderableType] = []
    for slip, count in enumerate(snapshot.slip_histogram):
        row = Text(f"{slip:>2} ")
        row.append("█" * round(BAR * count / tokens), style="magenta")
        row.append(f" {count / tokens:.0%}")
        rows.append(row)
    return Group(*rows, Text(f"mean {_fixed(snapshot.slip)} versions", style="dim"))


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
