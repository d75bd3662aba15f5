"""Seeds and threads of every test, and the watch for unpickling in it and in the processes it starts."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
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
