"""Times the variants of a case side by side: all in every round, on inputs that rotate past the cache."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from kernels_suite import accuracy, memory
from kernels_suite.attempt import NONE, Failure, attempt
from kernels_suite.floors import gpu_extras, least_cost
from kernels_suite.plan import Case, Exact, Inputs, Outputs, Variant

Row = dict[str, Any]
MOST_COPIES: Final = 64
LONG_S: Final = 0.5
SHORTEST_S: Final = 1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure."""

    least_rounds: int
    most_rounds: int
    seconds: float
    """After this a case has no further round beyond the least."""
    least_call_s: float
    """A shorter call is repeated within a round until it takes this long."""


SMOKE: Final = Effort(least_rounds=3, most_rounds=3, seconds=0.2, least_call_s=0.0005)
HOST_CALL_S: Final = 0.02
"""Calls on tiny inputs are repeated this long within a round: single ones find cold caches."""
GPU: Final = Effort(least_rounds=5, most_rounds=20, seconds=3.0, least_call_s=0.002)
FULL: Final = Effort(least_rounds=3, most_rounds=25, seconds=40.0, least_call_s=0.005)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all cases of a run share."""

    device: str
    effort: Effort
    cache_bytes: int
    command: str
    """What repeats the run; rows put their op into it."""


def measure(case: Case, setting: Setting) -> Iterator[Row]:
    """Yield one row for each variant of the case, measured or with the reason why not."""
    if setting.device == "cuda":
        torch.cuda.empty_cache()
    rows = {variant.name: _blank(case, variant, setting) for variant in case.variants}
    live = _comparable(case, rows)
    inputs = _rotation(case, setting, many=bool(live))
    if isinstance(inputs, Failure):
        _fail(rows, live, inputs)
        live = []
    else:
        live = [variant for variant in live if _warmed(variant, inputs, rows[variant.name], setting)]
    if live and not isinstance(inputs, Failure):
        calls: dict[str, Callable[[Inputs], object]] = {variant.name: variant.run for variant in live}
        factor = 1.0
        ceiling = None if case.host_only else _floor(case, setting)
        if ceiling is not None and not isinstance(ceiling, Failure):
            calls["ceiling"], factor = ceiling
        first_s = {name: rows[name]["first_call_s"] for name in calls if name in rows}
        least_s = max(HOST_CALL_S if case.host_only else 0.0, setting.effort.least_call_s)
        repeats = _repeats(calls, inputs, setting.device, first_s, least_s)
        for variant in list(live):
            found = repeats[variant.name]
            if isinstance(found, Failure):
                rows[variant.name] |= {"status": found.status, "note": found.note}
                live.remove(variant)
        counts = {name: count for name, count in repeats.items() if not isinstance(count, Failure)}
        seconds = _rounds(calls, inputs, setting, counts)
        if "ceiling" in seconds:
            seconds["ceiling"] = [factor * time_s for time_s in seconds["ceiling"]]
        _fill(case, rows, seconds)
        if setting.device == "cuda":
            for variant in live:
                rows[variant.name] |= _attempt_row(partial(gpu_extras, variant, inputs))
    yield from (row for row in rows.values() if row["status"] != NONE)


def comparisons(case: Case) -> Iterator[tuple[Variant, dict[str, float] | Failure]]:
    """Yield each variant of ours, and eager, with the errors of its outputs against float64."""
    made = attempt(lambda: _small(case))
    for variant in case.variants:
        if not variant.ours and variant.name != case.eager:
            continue
        if variant.obstacle or isinstance(made, Failure):
            yield variant, made if isinstance(made, Failure) else Failure("absent", variant.obstacle)
            continue
        yield variant, attempt(partial(_errors, variant, *made))


def _errors(variant: Variant, inputs: Inputs, exact: Exact) -> dict[str, float]:
    return accuracy.errors(variant.run(inputs), exact)


def _small(case: Case) -> tuple[Inputs, Exact]:
    inputs = case.make_small()
    return inputs, case.exact(inputs)


def _comparable(case: Case, rows: dict[str, Row]) -> list[Variant]:
    """Run each variant on the small inputs; note errors or obstacles; return those that ran."""
    made = attempt(lambda: _small(case))
    if isinstance(made, Failure):
        _fail(rows, case.variants, made)
        return []
    inputs, exact = made
    live = []
    for variant in case.variants:
        row = rows[variant.name]
        if variant.obstacle:
            row |= {"status": "absent", "note": variant.obstacle}
            continue
        outputs = attempt(partial(_compared, variant, inputs, exact))
        if isinstance(outputs, Failure):
            row |= {"status": outputs.status, "note": outputs.note}
            continue
        row |= outputs
        live.append(variant)
    return live


def _compared(variant: Variant, inputs: Inputs, exact: Exact) -> Row:
    outputs: Outputs = variant.run(inputs)
    found = accuracy.errors(outputs, exact)
    worst = max(found.values(), default=None, key=lambda error: math.inf if math.isnan(error) else error)
    return {"errors": found, "worst_error": worst, "facts": accuracy.facts(outputs)}


def _rotation(case: Case, setting: Setting, *, many: bool) -> list[Inputs] | Failure:
    """Return inputs that together exceed the cache twice, as far as the most copies allow."""
    first = attempt(lambda: case.make(0))
    if isinstance(first, Failure) or not many:
        return first if isinstance(first, Failure) else [first]
    size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
    copies = 1 if case.host_only else min(MOST_COPIES, max(2, math.ceil(2 * setting.cache_bytes / size)))
    # Other values for a few, the same values at other addresses for the rest: making them is slow.
    seeds = [case.make(seed) for seed in range(1, min(copies, 3))]
    made = [first, *seeds]
    return made + [_copied(made[index % len(made)]) for index in range(copies - len(made))]


def _copied(inputs: Inputs) -> Inputs:
    return {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def _warmed(variant: Variant, inputs: list[Inputs], row: Row, setting: Setting) -> bool:
    """Run once at full size for memory, and for an idea of its time; note a failure."""
    began = time.perf_counter()
    done = attempt(lambda: memory.peak_extra_bytes(lambda: variant.run(inputs[0]), setting.device))
    if isinstance(done, Failure):
        row |= {"status": done.status, "note": done.note}
        return False
    row |= {"peak_extra_bytes": done, "first_call_s": time.perf_counter() - began}
    return True


def _repeats(
    calls: dict[str, Callable[[Inputs], object]],
    inputs: list[Inputs],
    device: str,
    first_s: dict[str, float],
    least_s: float,
) -> dict[str, int | Failure]:
    """Return how often each variant is called within a round, or why it cannot be beside the others."""
    repeats: dict[str, int | Failure] = {}
    for name, call in calls.items():
        # A long call is not run once more only to learn that it is long, unless memory might be short.
        long = first_s.get(name, 0.0) > LONG_S and device != "cuda"
        call_s = least_s if long else attempt(partial(timed, call, inputs, 1, device))
        if isinstance(call_s, Failure):
            repeats[name] = call_s
            if device == "cuda":
                torch.cuda.empty_cache()
        else:
            repeats[name] = max(1, math.ceil(least_s / max(SHORTEST_S, call_s)))
    return repeats


def _rounds(
    calls: dict[str, Callable[[Inputs], object]],
    inputs: list[Inputs],
    setting: Setting,
    repeats: dict[str, int],
) -> dict[str, list[float]]:
    """Return seconds per call of each variant in each round, all variants in every round."""
    effort, device = setting.effort, setting.device
    names = list(repeats)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(effort.most_rounds):
            if number >= effort.least_rounds and time.perf_counter() - began > effort.seconds:
                break
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[name].append(timed(calls[name], inputs, repeats[name], device))
    finally:
        if was_enabled:
            gc.enable()
    return seconds


def timed(call: Callable[[Inputs], object], inputs: list[Inputs], repeats: int, device: str) -> float:
    """Return seconds per call; on a GPU between two events, the calls one behind the other."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for index in range(repeats):
            call(inputs[index % len(inputs)])
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats
    began = time.perf_counter()
    for index in range(repeats):
        call(inputs[index % len(inputs)])
    return (time.perf_counter() - began) / repeats


def _fill(case: Case, rows: dict[str, Row], seconds: dict[str, list[float]]) -> None:
    """Turn seconds into figures; ratios are medians of the ratios within the same round."""
    for name, times in seconds.items():
        if name == "ceiling":
            continue
        low, middle, high = _quantiles(times)
        row = rows[name]
        row |= {
            "status": "measured",
            "rounds": len(times),
            "median_ms": middle * 1e3,
            "p20_ms": low * 1e3,
            "p80_ms": high * 1e3,
            "host_us": middle * 1e6 if case.host_only else None,
        }
        if case.eager in seconds:
            row["ratio_to_eager"] = _ratio(seconds[case.eager], times)
        if "ceiling" in seconds:
            floor = statistics.median(seconds["ceiling"])
            rate, unit = (case.flops / 1e12, "TFLOP/s") if case.products else (case.size_bytes / 1e9, "GB/s")
            row |= {
                "percent_of_ceiling": 100 * _ratio(seconds["ceiling"], times),
                "ceiling_ms": floor * 1e3,
                "ceiling": rate / floor,
                "rate": rate / middle,
                "unit": unit,
            }


def _floor(case: Case, setting: Setting) -> tuple[Callable[[Inputs], object], float] | Failure:
    return attempt(lambda: least_cost(case, setting.device, setting.cache_bytes))


def _ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def _quantiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) < 2:
        return times[0], times[0], times[0]
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], statistics.median(times), cuts[7]


def _attempt_row(run: Callable[[], Row]) -> Row:
    done = attempt(run)
    return {"note": done.note} if isinstance(done, Failure) else done


def _blank(case: Case, variant: Variant, setting: Setting) -> Row:
    return {
        "op": case.op,
        "mode": case.mode,
        "shape": case.shape,
        "dims": dict(case.dims),
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": setting.device,
        "variant": variant.name,
        "ours": variant.ours,
        "ratio_to": case.eager,
        "key": f"{case.key} {variant.name}",
        "lacks": variant.lacks,
        "status": "failed",
        "note": "",
        "command": setting.command.format(op=case.op),
    }


def _fail(rows: dict[str, Row], variants: Any, failure: Failure) -> None:
    for variant in variants:
        rows[variant.name] |= {"status": failure.status, "note": failure.note}
