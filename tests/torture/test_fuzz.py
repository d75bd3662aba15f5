"""No byte string crashes a decoder, makes it take memory without bound, or comes back as another error."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import fuzz  # noqa: E402
from fuzz_targets import TARGETS, Target  # noqa: E402

FINDS = sorted((HERE / "finds").glob("*.bin"))
"""Inputs that once got through, named after their decoder."""


def run(finds: Path, *options: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "fuzz.py"), "--finds", str(finds), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    print(done.stdout, done.stderr)
    return done


@pytest.mark.timeout(1800)
def test_smoke_five_million_inputs_raise_only_documented_errors(tmp_path: Path) -> None:
    """The seed is drawn anew each time and printed; TORTURE_SEED gives one again."""
    seed = os.environ.get("TORTURE_SEED") or str(int.from_bytes(os.urandom(4)))
    done = run(tmp_path, "--inputs", "5000000", "--seed", seed, "--seconds", "1700", timeout_s=1750)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, result["finds"]
    assert result["inputs"] >= 4_999_000 and result["of"].keys() == TARGETS.keys()


@pytest.mark.parametrize("path", FINDS, ids=lambda path: path.stem)
def test_smoke_what_was_found_once_stays_mended(path: Path) -> None:
    target = TARGETS[path.name.split("-")[0]]
    with contextlib.suppress(*target.errors):
        target.decode(path.read_bytes())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("name", TARGETS)
def test_guided_by_coverage_nothing_else_is_raised(name: str, tmp_path: Path) -> None:
    done = run(
        tmp_path, "--coverage", "--target", name, "--inputs", "20000", "--seconds", "30", timeout_s=280
    )
    assert done.returncode == 0, [path.name for path in tmp_path.iterdir()]


# The rig itself: what it would miss if it were broken.


def decode_badly(data: bytes) -> None:
    """A decoder with one bug for each thing that is watched."""
    match data[:1]:
        case b"E":
            raise KeyError("undocumented")
        case b"M":
            bytearray(2 * fuzz.MEMORY_BYTES)
        case b"C":
            os.abort()
        case b"H":
            while True:
                pass
        case b"D":
            raise ValueError("documented")


BROKEN = Target(samples=lambda: [b"fine"], decode=decode_badly, errors=(ValueError,), share=1.0)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"E", "KeyError"),
        (b"M", "MemoryError"),
        (b"H", "Hang"),
        (b"C", "ended with -6"),
        (b"D", ""),
        (b"f", ""),
    ],
)
def test_smoke_the_rig_sees_each_kind_of_find(data: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import fuzz, fuzz_targets, test_fuzz\n"
        "import dataclasses\n"
        f"always = dataclasses.replace(test_fuzz.BROKEN, mutate=lambda samples, seed: lambda: {data!r})\n"
        "fuzz_targets.TARGETS.clear()\n"
        "fuzz_targets.TARGETS['message'] = always\n"
        "fuzz.__file__ = __file__\n"
        "if __name__ == '__main__': sys.exit(fuzz.main())\n"
    )
    command = [sys.executable, str(tmp_path / "planted.py"), "--inputs", "2", "--workers", "1"]
    command += ["--finds", str(tmp_path / "finds"), "--target", "message"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == (1 if why else 0), done.stderr
    assert bool(result["finds"]) == bool(why)
    for find in result["finds"]:
        assert Path(find).read_bytes() == data
        assert why in Path(find).with_suffix(".txt").read_text()


def test_smoke_a_run_out_of_time_ends_with_what_it_has_done(tmp_path: Path) -> None:
    done = run(tmp_path, "--inputs", "1000000000", "--seconds", "3", "--target", "call", timeout_s=280)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, result["finds"]) == (0, [])
    assert result["inputs"] < 1_000_000_000
