"""Candidates for the tiles of tuning.py, each at work on a whole head: what to look at before choosing one.

A candidate is compared with float64 on a few rows, and timed beside the matrix product alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from kernels_suite.measure import timed
from slipstream_kernels.statistics import LOG2_E, merge
from slipstream_kernels.tuning import TILES, Tile

Row = dict[str, Any]
ROUNDS: Final = 5
PROVED_ROWS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A tile, at a head of some shape."""

    tile: Tile
    writes: bool
    """Whether it writes its logits, too."""
    rows: int
    hidden: int
    vocabulary: int

    @property
    def name(self) -> str:
        tile = self.tile
        words = [f"{tile.rows}×{tile.columns}×{tile.hidden}", f"{tile.warps} warps", f"{tile.stages} stages"]
        words += [f"groups of {tile.group}", *(["halves"] if tile.halves else [])]
        words += ["with logits"] if self.writes else []
        return f"{self.rows}×{self.hidden}×{self.vocabulary}: " + ", ".join(words)


def _tile(rows: int, columns: int, warps: int, stages: int, *, halves: bool = False, group: int = 16) -> Tile:
    return Tile(
        rows=rows, columns=columns, hidden=64, warps=warps, stages=stages, descriptors=True, halves=halves,
        group=group,
    )  # fmt: skip


def candidates(rehearse: bool) -> Iterator[Candidate]:
    """Yield what is to be tried; in a rehearsal the tile that Triton's interpreter takes, at a tiny head."""
    if rehearse:
        for writes in (False, True):
            tile = TILES["interpreted"]
            yield Candidate(tile=tile, writes=writes, rows=33, hidden=32, vocabulary=1040)
        return
    wide = [_tile(128, 256, 8, stages, halves=halves) for stages in (3, 4) for halves in (False, True)]
    groups = [_tile(128, 256, 8, 3, halves=True, group=group) for group in (4, 8, 32, 1 << 20)]
    others = [_tile(256, 128, 8, 3), _tile(256, 128, 8, 4), TILES["square"], _tile(128, 128, 4, 3)]
    for tile in (*wide, *groups, *others):
        yield Candidate(tile=tile, writes=False, rows=8192, hidden=4096, vocabulary=128256)
    writing = [_tile(128, 256, 8, 3), *(t for t in (*wide, *groups) if t.halves)]
    for tile in (*writing, TILES["square"], _tile(128, 128, 8, 2)):
        yield Candidate(tile=tile, writes=True, rows=3328, hidden=4096, vocabulary=151936)


def tried(candidate: Candidate, device: str) -> Row:
    """Return its time, its rate, its share of the matrix product's speed, and its errors."""
    from slipstream_kernels.triton.linear_logprob import head_parts

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    random = torch.Generator(device=device).manual_seed(1)
    shape = candidate.vocabulary, candidate.hidden
    hidden_NH = torch.randn(candidate.rows, shape[1], generator=random, device=device).to(dtype)
    weight_VH = (torch.randn(shape, generator=random, device=device) * 3 * shape[1] ** -0.5).to(dtype)
    labels_N = torch.randint(shape[0], (candidate.rows,), generator=random, device=device)
    logits_NV = torch.empty(candidate.rows, shape[0], dtype=dtype, device=device)
    one = torch.ones(1, device=device)

    def call(_: Any = None) -> Tensor:
        written = logits_NV if candidate.writes else None
        return head_parts(hidden_NH, weight_VH, labels_N, one, None, None, written, tile=candidate.tile)

    found_4C = merge(call())[:, :PROVED_ROWS].double()
    errors = _errors(found_4C, hidden_NH, weight_VH, labels_N, logits_NV if candidate.writes else None)
    seconds: list[float] = []
    ceiling: list[float] = []
    for _ in range(ROUNDS):
        seconds.append(timed(call, [{}], 1, device))
        ceiling.append(timed(lambda _: torch.mm(hidden_NH, weight_VH.T, out=logits_NV), [{}], 1, device))
    middle = statistics.median(seconds)
    return {
        "tile": candidate.name,
        **asdict(candidate.tile),
        "ms": middle * 1e3,
        "tflop_s": 2.0 * candidate.rows * shape[0] * shape[1] / middle / 1e12,
        "percent_of_ceiling": 100 * statistics.median(c / s for c, s in zip(ceiling, seconds, strict=True)),
        **errors,
    }


def _errors(
    found_4C: Tensor, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, logits_NV: Tensor | None
) -> dict[str, float]:
    """Return the greatest error of the statistics and of the logits, over the greatest logit."""
    some = slice(0, PROVED_ROWS)
    z_CV = hidden_NH[some].double() @ weight_VH.double().T
    base2_CV = z_CV * LOG2_E
    peak_C = base2_CV.max(1).values
    power_CV = torch.exp2(base2_CV - peak_C[:, None])
    truth_4C = torch.stack(
        (
            peak_C,
            power_CV.sum(1),
            (power_CV * (base2_CV - peak_C[:, None])).sum(1),
            base2_CV.gather(1, labels_N[some, None])[:, 0],
        )
    )
    scale = float(z_CV.abs().max())
    errors = {"error": float(((found_4C - truth_4C).abs() / truth_4C.abs().clamp(min=scale)).max())}
    if logits_NV is not None:
        errors["logit_error"] = float((logits_NV[some].double() - z_CV).abs().max()) / scale
    return errors


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown of all, the fastest of a shape first."""
    lines = ["# Tiles", "", "| tile | ms | TFLOP/s | % of the product alone | error | of logits |"]
    lines.append("| --- " * 6 + "|")
    for row in sorted(rows, key=lambda row: (str(row["tile"]).split(":")[0], float(row["ms"]))):
        written = f"{float(row['logit_error']):.1e}" if "logit_error" in row else "–"
        lines.append(
            f"| {row['tile']} | {row['ms']:.2f} | {row['tflop_s']:.0f} | {row['percent_of_ceiling']:.0f} "
            f"| {float(row['error']):.1e} | {written} |"
        )
    return "\n".join(lines) + "\n"
