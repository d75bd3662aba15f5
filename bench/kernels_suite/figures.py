"""The figures a GPU run is asked for, read off its rows: wanted, got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure: the best of our backends at a case."""

    op: str
    mode: str
    shape: str
    least: float
    over: tuple[str, ...] = ()
    """Peers whose fastest is the measure; without them it is the percentage of the ceiling."""


HEAD: Final = "forward+backward"
MILLION: Final = "1M in 1024 segments"
CODEC: Final = "16384×16384 bfloat16"
FIGURES: Final = (
    Figure(op="linear_logprob", mode="forward", shape="Qwen", least=85),
    Figure(op="linear_policy_loss", mode=HEAD, shape="Qwen 100% trained", least=80),
    Figure(
        op="linear_policy_loss", mode=HEAD, shape="Qwen 100% trained", least=1, over=("quack", "liger FLCE")
    ),
    Figure(op="policy_loss", mode=HEAD, shape=MILLION, least=70),
    Figure(op="gae", mode="forward", shape=MILLION, least=70),
    Figure(op="vtrace", mode="forward", shape=f"{MILLION}, 30 % holes", least=70),
    Figure(op="discounted_return", mode="forward", shape=f"{MILLION}, 30 % holes", least=70),
    Figure(op="segment_scan", mode="forward", shape=MILLION, least=70),
    Figure(op="checksum64", mode="forward", shape=CODEC, least=70),
    Figure(op="delta_encode", mode="forward", shape=CODEC, least=70),
    Figure(op="delta_apply", mode="forward", shape=CODEC, least=70),
    Figure(op="fp8_quantize", mode="forward", shape=CODEC, least=70),
)


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown of all figures."""
    lines = ["# Figures", "", "| figure | wanted | got | by |", "| --- | --- | --- | --- |"]
    for figure in FIGURES:
        got, backend = _got(figure, rows)
        unit = "× the fastest of " + ", ".join(figure.over) if figure.over else "% of the ceiling"
        shown = "not measured" if got is None else f"{got:.2f}" if figure.over else f"{got:.0f}"
        name = f"{figure.op}, {figure.mode}, {figure.shape}"
        lines.append(f"| {name} | ≥ {figure.least:g} {unit} | {shown} | {backend} |")
    return "\n".join(lines) + "\n"


def _got(figure: Figure, rows: Sequence[Row]) -> tuple[float | None, str]:
    here = [
        row
        for row in rows
        if (row["op"], row["mode"], row["shape"]) == (figure.op, figure.mode, figure.shape)
        and row["status"] == "measured"
    ]
    ours = min((row for row in here if row["ours"]), key=lambda row: row["median_ms"], default=None)
    peers = [row["median_ms"] for row in here if row["variant"] in figure.over]
    if ours is None or (figure.over and not peers):
        return None, "–"
    if figure.over:
        return min(peers) / ours["median_ms"], ours["variant"]
    return ours.get("percent_of_ceiling"), ours["variant"]
