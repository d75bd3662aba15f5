"""Benchmarks of the kernels: rows of every op, mistakes in one sentence, the gate, the GPU's rehearsed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
MACHINE = "a machine"
OPS = {
    "linear_logprob", "linear_policy_loss", "linear_kl", "policy_loss", "gae", "vtrace", "td_lambda",
    "discounted_return", "segment_scan", "group_advantage", "checksum64", "delta_encode", "delta_apply",
    "fp8_quantize",
}  # fmt: skip


@pytest.fixture(autouse=True)
def parts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCH)
    yield


@pytest.fixture
def gate() -> ModuleType:
    return import_module("kernels_suite.gate")


def test_one_op_gives_rows_table_and_picture(tmp_path: Path) -> None:
    document = tmp_path / "all.json"
    done = bench("--op", "policy_loss", "--smoke", "--output", tmp_path, "--json", document)
    assert done.returncode == 0, done.stderr

    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["op"] for row in rows} == {"policy_loss"}
    assert {"eager", "reference"} <= {row["variant"] for row in rows}
    check_measured(rows)
    assert "policy_loss, forward+backward, smoke" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "ratios.svg").read_text().startswith("<?xml")
    found = json.loads(document.read_text())
    assert found["rows"] == rows
    assert found["environment"]["ceilings"]["copy_gb_s"] > 0


@pytest.mark.slow
def test_a_smoke_has_rows_of_every_op(tmp_path: Path) -> None:
    done = bench("--smoke", "--output", tmp_path)
    assert done.returncode == 0, done.stderr

    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["op"] for row in rows} == OPS
    assert {row["op"] for row in rows if row["status"] == "measured"} == OPS
    check_measured(rows)
    assert [row for row in rows if row["status"] in {"failed", "oom"}] == []


def check_measured(rows: list[dict[str, Any]]) -> None:
    """Every measured row has finite figures, small errors, and a command; every other row has a reason."""
    for row in rows:
        if row["status"] != "measured":
            assert row["note"], row
            continue
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"], row
        assert isfinite(row["ratio_to_eager"]) and row["ratio_to_eager"] > 0, row
        assert row["command"].startswith(f"slipstream bench kernels --op {row['op']}"), row
        limit = 0.03 if row["op"] == "fp8_quantize" else 2e-5
        assert all(error <= limit for error in row["errors"].values()), row
        host = row["mode"].startswith("call")
        assert (row["host_us"] is not None) is host
        assert host or row["percent_of_ceiling"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--op", "nonsense"], "'nonsense'"),
        (["--device", "tpu"], "'tpu'"),
        (["--smoke", "--full"], "--full"),
    ],
)
def test_a_mistake_is_one_sentence(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        module("kernels").main(options)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("kernels: ") and words in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize(("name", "options"), [("kernels", ["--device", "cuda"]), ("gpu", [])])
def test_a_missing_device_is_one_sentence(
    name: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert module(name).main(options) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "CUDA device" in said


def module(name: str) -> ModuleType:
    """Load a benchmark under a name of its own: `kernels` is also a package of Hugging Face's."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def row_of(variant: str, ratio: float | None, *, op: str = "gae", ours: bool = True) -> dict[str, Any]:
    return {"key": f"{op} forward smoke float32 {variant}", "variant": variant, "ours": ours,
            "ratio_to_eager": ratio}  # fmt: skip


def test_the_gate_names_a_planted_regression(gate: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "baselines.json"
    written = [row_of("native", 40.0), row_of("reference", 2.0), row_of("torchrl", 9.0, ours=False)]
    assert gate.update(written, MACHINE, path) == 2

    assert gate.regressions(written, MACHINE, path) == []
    assert gate.regressions([row_of("native", 34.1), row_of("reference", 2.0)], MACHINE, path) == []
    slower = [row_of("native", 33.9), row_of("reference", 2.0)]
    assert [str(found) for found in gate.regressions(slower, MACHINE, path)] == [
        "gae forward smoke float32 native: expected 40.000 times eager, at least 34.000; got 33.900"
    ]


def test_a_row_that_vanished_is_a_regression_and_one_of_another_op_is_not(
    gate: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "baselines.json"
    gate.update([row_of("native", 40.0), row_of("native", 3.0, op="vtrace")], MACHINE, path)

    for rows in ([row_of("native", None)], [row_of("eager", 1.0, ours=False)]):
        assert [(found.key, found.got) for found in gate.regressions(rows, MACHINE, path)] == [
            ("gae forward smoke float32 native", None)
        ]


def test_an_update_keeps_what_was_not_measured(gate: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "baselines.json"
    gate.update([row_of("native", 40.0)], "another", path)
    gate.update([row_of("native", 40.0), row_of("reference", 2.0)], MACHINE, path)
    gate.update([row_of("native", 50.0)], MACHINE, path)

    machines = gate.read(path)["machines"]
    assert set(machines) == {"another", MACHINE}
    assert sorted(machines[MACHINE].values()) == [2.0, 50.0]


def test_a_machine_without_baselines_is_a_mistake(gate: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(gate.BaselineError, match='no baseline for "a machine"; --update writes one'):
        gate.regressions([row_of("native", 40.0)], MACHINE, tmp_path / "none.json")


@pytest.mark.slow
def test_the_gate_ends_a_run_with_1(tmp_path: Path) -> None:
    path = tmp_path / "baselines.json"
    options = ["--op", "group_advantage", "--smoke", "--output", tmp_path, "--baselines", path]
    assert bench(*options, "--update").returncode == 0
    baselines = json.loads(path.read_text())
    (ratios,) = baselines["machines"].values()
    key = next(iter(ratios))
    ratios[key] *= 1000
    path.write_text(json.dumps(baselines))

    done = bench(*options, "--check")
    assert done.returncode == 1
    assert f"{key}: expected {ratios[key]:.3f} times eager" in done.stderr


def test_what_raises_is_a_row_with_its_reason() -> None:
    plan, measure = import_module("kernels_suite.plan"), import_module("kernels_suite.measure")

    def raising(error: Exception) -> Any:
        def run(inputs: dict[str, Any]) -> dict[str, Any]:
            raise error

        return run

    calls = Counter[str]()

    def growing(inputs: dict[str, Any]) -> dict[str, Any]:
        calls["growing"] += 1
        if calls["growing"] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory beside the others")
        return {"output": inputs["x"] + 0.0}

    variants = (
        plan.Variant(name="eager", run=lambda inputs: {"output": inputs["x"] + 0.0}),
        plan.Variant(name="growing", run=growing),
        plan.Variant(name="hungry", run=raising(torch.OutOfMemoryError("CUDA out of memory"))),
        plan.Variant(name="broken", run=raising(ZeroDivisionError("by zero"))),
        plan.Variant(name="missing", run=raising(AssertionError()), obstacle="it is not installed"),
    )
    case = plan.Case(
        op="gae",
        mode="forward",
        shape="four",
        dims={"N": 4},
        dtype=torch.float32,
        make=lambda seed: {"x": torch.ones(4)},
        make_small=lambda: {"x": torch.ones(4)},
        exact=lambda inputs: plan.Exact(outputs={"output": inputs["x"].double()}),
        variants=variants,
        size_bytes=32.0,
    )
    setting = measure.Setting(device="cpu", effort=measure.SMOKE, cache_bytes=1 << 10, command="{op}")
    rows = {row["variant"]: row for row in measure.measure(case, setting)}

    assert {name: row["status"] for name, row in rows.items()} == {
        "eager": "measured", "growing": "oom", "hungry": "oom", "broken": "failed", "missing": "absent",
    }  # fmt: skip
    assert rows["broken"]["note"] == "ZeroDivisionError: by zero"
    assert rows["eager"]["errors"] == {"output": 0.0} and rows["eager"]["ratio_to_eager"] == 1.0


@pytest.mark.slow
def test_the_gpu_command_tries_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = run(BENCH / "gpu.py", "--rehearse", "--part", "tiles", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.split("|") for line in (tmp_path / "tiles.md").read_text().splitlines() if "33×32" in line]
    assert ["with logits" in cells[1] for cells in found].count(True) == 1 and len(found) == 2
    assert all(float(cells[5]) < 1e-5 for cells in found)


@pytest.mark.slow
def test_the_gpu_command_rehearsed_writes_everything(tmp_path: Path) -> None:
    done = run(BENCH / "gpu.py", "--rehearse", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    verdicts = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert {row["verdict"] for row in verdicts} <= {"pass", "absent"}
    assert {"float32", "bfloat16"} <= {row["dtype"] for row in verdicts}
    assert all(row["error"] <= row["limit"] for row in verdicts if row["verdict"] == "pass")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    check_measured(rows)
    assert "not measured" in (tmp_path / "figures.md").read_text()
    assert "| pass |" in (tmp_path / "correctness.md").read_text()
    assert {"table.md", "ratios.svg", "environment.json"} <= {path.name for path in tmp_path.iterdir()}


def test_the_gpu_command_keeps_what_it_has_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = module("gpu")
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    (tmp_path / "gpu.py").write_text(
        "import json, sys, time\n"
        "print(json.dumps({'kind': 'item', 'item': 0, 'name': 'item 0'}), flush=True)\n"
        "print(json.dumps({'kind': 'verdict', 'row': {'item': 0}}), flush=True)\n"
        "print(json.dumps({'kind': 'item', 'item': 1, 'name': 'item 1'}), flush=True)\n"
        "time.sleep(600)\n"
    )
    # Ample for the first item; the second never ends.
    result = gpu.Run(folder=tmp_path, ends_at=time.monotonic() + 5.0)
    assert gpu.follow(result, 0) is None

    assert result.cut and not result.lost
    assert [row["item"] for row in result.verdicts] == [0]


def test_the_gpu_command_goes_on_behind_an_item_that_crashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = module("gpu")
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    (tmp_path / "gpu.py").write_text(
        "import json, os, sys\n"
        "first = int(sys.argv[sys.argv.index('--from-item') + 1])\n"
        "for item in range(first, 3):\n"
        "    print(json.dumps({'kind': 'item', 'item': item, 'name': f'item {item}'}), flush=True)\n"
        "    if item == 1: os.abort()\n"
        "    print(json.dumps({'kind': 'verdict', 'row': {'item': item}}), flush=True)\n"
        "print(json.dumps({'kind': 'end'}), flush=True)\n"
    )
    result = gpu.Run(folder=tmp_path, ends_at=float("inf"))
    item: int | None = 0
    while item is not None:
        item = gpu.follow(result, item)

    assert [row["item"] for row in result.verdicts] == [0, 2]
    assert [reason.split(":")[0] for reason in result.lost] == ["item 1"]


def bench(*options: object) -> subprocess.CompletedProcess[str]:
    """Run the benchmark as a user does."""
    return run("-m", "slipstream", "bench", "kernels", *options)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python on these arguments, with our sources on its path."""
    roots = [str(BENCH.parent / "engine"), str(BENCH.parent / "kernels")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(roots)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
