"""Every op of slipstream_kernels against eager PyTorch and its peers, side by side on this machine.

    slipstream bench kernels [--op NAME] [--shape PART] [--device cpu|cuda] [--smoke] [--output FOLDER]

The ceilings come first: copy bandwidth and matrix products on random data. Then each case: all variants in
every round, in turns, on inputs that rotate past the last-level cache, with the case's own matrix products
(or a copy of its least bytes) as one more variant, so that a change of clock meets all of them alike.
Reported are median and 20/80 % quantiles, the ratio to eager as the median of the ratios within a round, the
share of the ceiling, peak memory, and the errors against float64 of eager code that shares nothing with ours.
What is not installed, runs out of memory or fails is a row with its reason.

Shapes: on a CPU the quickstart's head and 4,096 × 1,024 × 32,768, on a GPU (or on a CPU with --full) the
vocabularies of Qwen, Llama and Gemma. --check compares ratios with baselines.json and ends with 1 on a
regression; --update writes them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import torch
from kernels_suite import gate, machine, measure, memory, report
from kernels_suite.plan import Place, Scale, training_dtype
from kernels_suite.suite import CASES, ceilings

BASELINES: Final = Path(__file__).with_name("baselines.json")
OUTPUT: Final = Path("runs") / "bench-kernels"
MISTAKE: Final = 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without its usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(MISTAKE, f"kernels: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 on a regression, 2 on a mistake."""
    chosen = _parser().parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("kernels: --device cuda needs a CUDA device, and torch sees none here\n")
        return MISTAKE
    place = _place(chosen)
    environment = machine.environment(place.device) | {"scale": place.scale.value}
    if place.device == "cpu":
        memory.limit_to_free_memory()
    environment["ceilings"] = ceilings(place)
    _say(f"{environment['class']}: copy {environment['ceilings']['copy_gb_s']:.1f} GB/s, "
         f"matmul {environment['ceilings']['matmul_tflop_s']:.3g} TFLOP/s")  # fmt: skip
    report.start(chosen.output, environment)
    rows = _measured(chosen, place)
    report.finish(chosen.output, environment, rows)
    _say(f"{len(rows)} rows in {chosen.output / report.TABLE}")
    if chosen.json is not None:
        document = report.clean({"environment": environment, "rows": rows})
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return _gated(chosen, environment["class"], rows)


def _measured(chosen: argparse.Namespace, place: Place) -> list[measure.Row]:
    options = "--smoke" if place.scale is Scale.SMOKE else "--full" if chosen.full else ""
    setting = measure.Setting(
        device=place.device,
        effort=measure.SMOKE if place.scale is Scale.SMOKE else measure.FULL,
        cache_bytes=machine.cache_bytes(place.device) if place.scale is not Scale.SMOKE else 1 << 20,
        command=f"slipstream bench kernels --op {{op}} --device {place.device} {options}".rstrip(),
    )
    rows = []
    for op in chosen.op or CASES:
        for case in CASES[op](place):
            if chosen.shape is not None and chosen.shape not in case.shape:
                continue
            for row in measure.measure(case, setting):
                rows.append(row)
                report.append(chosen.output, row)
                _say(_line(row))
    return rows


def _gated(chosen: argparse.Namespace, machine_class: str, rows: Sequence[measure.Row]) -> int:
    try:
        if chosen.update:
            count = gate.update(rows, machine_class, chosen.baselines)
            _say(f"{count} ratios of {machine_class} written to {chosen.baselines}")
        if not chosen.check:
            return 0
        found = gate.regressions(rows, machine_class, chosen.baselines)
    except gate.BaselineError as error:
        sys.stderr.write(f"kernels: {error}\n")
        return MISTAKE
    for regression in found:
        sys.stderr.write(f"kernels: {regression}\n")
    return 1 if found else 0


def _place(chosen: argparse.Namespace) -> Place:
    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    large = device == "cuda" or chosen.full
    scale = Scale.SMOKE if chosen.smoke else Scale.GPU if large else Scale.CPU
    return Place(device=device, scale=scale, dtype=training_dtype(device))


def _line(row: measure.Row) -> str:
    name = f"{row['op']:<19}{row['mode']:<19}{row['shape']:<30}{row['variant']:<25}"
    if row["status"] != "measured":
        return f"{name}{row['status']}: {row['note']}"
    ratio, share = row.get("ratio_to_eager"), row.get("percent_of_ceiling")
    return (
        f"{name}{row['median_ms']:>10.4g} ms"
        + ("" if ratio is None else f"{ratio:>9.2f} × eager")
        + ("" if share is None else f"{share:>6.0f} % of the ceiling")
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="slipstream bench kernels", description="Kernels against eager PyTorch and peers.")
    parser.add_argument("--op", action="append", choices=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--shape", metavar="PART", help="only shapes whose name holds this")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_true", help="tiny shapes: whether everything runs")
    size.add_argument("--full", action="store_true", help="on a CPU, the vocabularies of a GPU too")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder; default {OUTPUT}")
    parser.add_argument("--json", type=Path, help="file for environment and all rows")
    parser.add_argument("--check", action="store_true", help="end with 1 when a ratio is worse than baseline")
    parser.add_argument("--update", action="store_true", help="write this run's ratios as baselines")
    parser.add_argument("--baselines", type=Path, default=BASELINES, help=f"file; default {BASELINES.name}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
