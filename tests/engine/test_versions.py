"""What a run was made with: recorded once, compared when it goes on, told when it is evaluated."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import pytest

from slipstream import versions
from slipstream.errors import RunFolderError


def test_a_run_records_what_it_was_made_with(tmp_path: Path) -> None:
    now = versions.present({"world": "3"})
    assert now == {
        "python": platform.python_version(),
        "slipstream": versions.installed(["slipstream"])["slipstream"],
        "torch": metadata.version("torch"),
        "world": "3",
    }
    assert versions.hold(tmp_path, now, accept=False) == []
    assert json.loads((tmp_path / "versions.json").read_text()) == now == versions.recorded_in(tmp_path)
    assert versions.hold(tmp_path, now, accept=False) == []
    assert versions.installed(["no-such-package"])["no-such-package"] == "source tree"


def test_other_versions_are_refused_by_name_unless_accepted(tmp_path: Path) -> None:
    versions.hold(tmp_path, {"torch": "2.11.0", "world": "3", "gone": "1"}, accept=False)
    now = {"torch": "2.12.0", "world": "3", "new": "4"}
    with pytest.raises(RunFolderError) as refused:
        versions.hold(tmp_path, now, accept=False)
    differences = [
        "gone is not used here and was 1",
        "new is 4 here and was not used",
        "torch is 2.12.0 here and was 2.11.0",
    ]
    assert str(refused.value) == (
        f"{tmp_path} was begun with other versions: {'; '.join(differences)}; install those again, or add "
        "--other-versions to go on with these"
    )
    assert versions.recorded_in(tmp_path)["torch"] == "2.11.0"
    assert versions.hold(tmp_path, now, accept=True) == differences
    assert versions.recorded_in(tmp_path) == now
    assert versions.hold(tmp_path, now, accept=False) == []


def test_a_run_from_before_versions_were_recorded_goes_on(tmp_path: Path) -> None:
    assert versions.hold(tmp_path, {"torch": "2.11.0"}, accept=False) == []
    assert versions.recorded_in(tmp_path) == {"torch": "2.11.0"}


def test_a_checkpoint_knows_the_versions_of_its_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "best").symlink_to("step-1")
    versions.hold(tmp_path / "run", {"torch": "2.11.0"}, accept=False)
    assert versions.of_checkpoint(tmp_path / "run" / "checkpoints" / "best") == {"torch": "2.11.0"}
    assert versions.of_checkpoint(tmp_path / "run" / "models" / "best") == {}
