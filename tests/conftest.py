"""Seeds and threads of every test; the watch for unpickling; and that no process outlives its test."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

SITE = Path(__file__).parent / "site"
sys.path.insert(0, str(SITE))

import no_pickle  # noqa: E402

if os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] != str(SITE):
    # Else sitecustomize has done it, as in the workers of pytest-xdist.
    no_pickle.install()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture(scope="session")
def _breaches() -> Iterator[Path]:
    """The file into which this test process and those it starts write their breaches."""
    with tempfile.NamedTemporaryFile(prefix="slipstream-breaches-") as file:
        os.environ[no_pickle.REPORT] = file.name
        yield Path(file.name)
        del os.environ[no_pickle.REPORT]


@pytest.fixture(autouse=True)
def _nothing_is_unpickled(_breaches: Path) -> Iterator[None]:
    """Fail a test in which the engine or the kernels made objects or code out of bytes."""
    yield
    found = _breaches.read_text(encoding="utf-8")
    os.truncate(_breaches, 0)
    assert not found, found


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """Start each test from the same random state and, where torch is loaded, on one thread."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)


STARTED: weakref.WeakSet[subprocess.Popen[Any]] = weakref.WeakSet()
"""Every process that this one has started, while somebody knows of it."""
HAS_FAILED = pytest.StashKey[bool]()
start_process = subprocess.Popen.__init__


@functools.wraps(start_process)
def _start_and_note(self: subprocess.Popen[Any], *arguments: Any, **options: Any) -> None:
    start_process(self, *arguments, **options)
    STARTED.add(self)


subprocess.Popen.__init__ = _start_and_note  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember of a test that it has failed."""
    report = yield
    if report.failed:
        item.stash[HAS_FAILED] = True
    return report


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kill what a test has left running, or it would slow down or fail another; a pass then is none."""
    before = [process for process in STARTED if process.poll() is None]
    yield
    left = [process for process in STARTED if process not in before and process.poll() is None]
    for process in left:
        _kill_tree(process)
    if not request.node.stash.get(HAS_FAILED, False):
        assert not left, f"still running at the end: {[process.args for process in left]}"


def _kill_tree(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it has started, and wait for its end."""
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for one in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(timeout=60)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
