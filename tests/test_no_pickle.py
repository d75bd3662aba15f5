"""The watch for unpickling (site/no_pickle.py) sees what is planted, and lets others be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

PLANTS = {
    "loads": "import pickle; pickle.loads(pickle.dumps({'a': 1}))",
    "imported name": "from pickle import loads, dumps; loads(dumps(1))",
    "load": "import io, pickle; pickle.load(io.BytesIO(pickle.dumps(1)))",
    "Unpickler": "import io, pickle; pickle.Unpickler(io.BytesIO(pickle.dumps(1))).load()",
    "pure Python": "import pickle; pickle._loads(pickle.dumps(1))",
    "in C": "import _pickle; _pickle.loads(_pickle.dumps(1))",
    "marshal": "import marshal; marshal.loads(marshal.dumps(1))",
    "shelve": "import shelve, tempfile; d = shelve.open(tempfile.mkdtemp() + '/a'); d['a'] = 1; d['a']",
    "numpy": "import io, numpy as np; f = io.BytesIO(); np.save(f, np.array([None])); f.seek(0); "
    "np.load(f, allow_pickle=True)",
    "torch": "import io, torch; f = io.BytesIO(); torch.save(1, f); f.seek(0); "
    "torch.load(f, weights_only=True)",
    "cloudpickle": "import cloudpickle; cloudpickle.loads(cloudpickle.dumps(1))",
    "multiprocessing": "import multiprocessing as m; a, b = m.Pipe(); a.send(1); b.recv()",
    "eval": "eval('1')",
    "exec": "exec('1')",
    "compile": "compile('1', 'f', 'exec')",
    "caught": "import pickle\ntry: pickle.loads(pickle.dumps(1))\nexcept BaseException: pass",
}


def planted(folder: Path, plant: str, how: str) -> subprocess.CompletedProcess[str]:
    """Run a test, under the fixtures of ours, in which a module named like the engine's does `plant`."""
    (folder / "plant.py").write_text(plant)
    (folder / "test_inner.py").write_text(
        "import subprocess, sys, types\n"
        f"SOURCE = {str(folder / 'plant.py')!r}\n"
        "def run():\n"
        "    module = types.ModuleType('slipstream.planted')\n"
        "    exec(compile(open(SOURCE).read(), SOURCE, 'exec'), module.__dict__)\n"
        "def test_inner():\n"
        + {
            "here": "    run()\n",
            "process": "    subprocess.run([sys.executable, __file__], timeout=60)\n",
        }[how]
        + "if __name__ == '__main__':\n    run()\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["--rootdir", str(folder), "-c", str(HERE.parent / "pyproject.toml"), str(folder)]
    path = os.pathsep.join([str(HERE / "site"), str(HERE), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": path}
    )


@pytest.mark.parametrize("name", ["loads", pytest.param("torch", marks=pytest.mark.slow), "caught"])
@pytest.mark.parametrize("how", ["here", "process"])
def test_a_planted_call_fails_its_test(name: str, how: str, tmp_path: Path) -> None:
    done = planted(tmp_path, PLANTS[name], how)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "slipstream.planted:" in done.stdout and " reaches " in done.stdout


def test_a_test_without_a_plant_passes(tmp_path: Path) -> None:
    done = planted(tmp_path, "import json; json.loads('1')", "process")
    assert done.returncode == 0, done.stdout + done.stderr


PROBE = """
import json, os, pathlib, sys, types
report, seen = pathlib.Path(os.environ["SLIPSTREAM_BREACHES"]), {}
for name, plant in json.load(sys.stdin).items():
    module = types.ModuleType(sys.argv[1])
    code = compile(plant, "plant", "exec")
    raised = ""
    try:
        exec(code, module.__dict__)
    except AssertionError as error:
        raised = type(error).__name__
    written = report.read_text() if report.exists() else ""
    report.write_text("")
    seen[name] = [raised, written.partition(" ")[0]]
print(json.dumps(seen))
"""


def probe(folder: Path, name: str, plants: dict[str, str]) -> dict[str, list[str]]:
    """Run each plant in a module of this name; return [what it raised, who was written down] by plant."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, name],
        input=json.dumps(plants),
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "SLIPSTREAM_BREACHES": str(folder / "report")},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("package", ["slipstream.planted", "slipstream_kernels.planted", "slipstream"])
def test_each_way_is_seen_and_written_down(package: str, tmp_path: Path) -> None:
    line = {name: plant.count("\n", 0, plant.find("loads")) + 1 for name, plant in PLANTS.items()}
    expected = {name: ["Breach", f"{package}:{line[name]}"] for name in PLANTS}
    expected["caught"][0] = ""
    assert probe(tmp_path, package, PLANTS) == expected


def test_others_may_unpickle_and_libraries_may_make_code_for_us(tmp_path: Path) -> None:
    nothing = {name: ["", ""] for name in PLANTS}
    assert probe(tmp_path, "somebody.else_", PLANTS) == nothing
    theirs = {
        "namedtuple": "import collections; collections.namedtuple('A', 'b')",
        "dataclass": "import dataclasses; dataclasses.make_dataclass('A', ['b'])",
        "import": "import zoneinfo, difflib, xml.dom.minidom",
    }
    assert probe(tmp_path, "slipstream.planted", theirs) == {name: ["", ""] for name in theirs}
