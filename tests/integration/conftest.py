"""One warm start for all runs of these tests, and run folders that begin behind it."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from runs import Run, make_warm_start


@pytest.fixture(scope="session")
def warm_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder's files after its warm start; never written again."""
    return make_warm_start(tmp_path_factory.mktemp("warm"))


@pytest.fixture
def new_run(tmp_path: Path, warm_start: Path) -> Callable[..., Run]:
    """Return a function that makes a run folder with a warm start and a name of its own."""

    def make(name: str = "run", *settings: str) -> Run:
        folder = tmp_path / name
        shutil.copytree(warm_start, folder)
        return Run(folder, settings)

    return make
