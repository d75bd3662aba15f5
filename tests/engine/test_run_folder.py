"""Who may use a run folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.config import load_config
from slipstream.errors import RunFolderError
from slipstream.run_folder import opened, read_config, write_config


def refusal(folder: Path, *overrides: str, resume: bool = False) -> str:
    config = load_config("research", overrides)
    with pytest.raises(RunFolderError) as caught, opened(folder, config, resume=resume):
        pass
    return str(caught.value)


def test_a_new_folder_takes_the_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with opened(folder, load_config("research", ["seed=4"]), resume=False):
        assert read_config(folder).seed == 4
    with opened(folder, load_config("research", ["seed=4"]), resume=True):
        pass
    expected = f"{folder} holds a run already; add --resume or choose another --output"
    assert refusal(folder, "seed=4") == expected


def test_another_configuration_is_named_by_its_first_difference(tmp_path: Path) -> None:
    write_config(tmp_path, load_config("research", ["optim.learning_rate=1e-4"]))
    message = refusal(tmp_path, "optim.learning_rate=3e-4", "hub.credit_bytes=100000", resume=True)
    assert message == (
        f"{tmp_path} belongs to another configuration: optim.learning_rate is 0.0001 there and 0.0003 here; "
        "choose another --output or give the same settings"
    )


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    assert "holds no run to resume" in refusal(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    assert "holds no run to resume" in refusal(tmp_path, resume=True)
    (tmp_path / "thesis.tex").touch()
    assert "is no run folder: it holds thesis.tex" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "cannot be used as a run folder" in refusal(tmp_path / "file")
    with pytest.raises(RunFolderError, match=r"it holds no config.toml"):
        read_config(tmp_path)


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("seed = ")
    assert "config.toml cannot be used: config.toml: not valid TOML" in refusal(tmp_path, resume=True)


def test_a_folder_in_use_names_the_process(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom slipstream.config import load_config\n"
        "from slipstream.run_folder import opened\n"
        "with opened(Path(sys.argv[1]), load_config('research'), resume=False):\n"
        "    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert f"is in use by process {holder.pid}" in refusal(tmp_path, resume=True)
        holder.kill()
    with opened(tmp_path, load_config("research"), resume=True):
        pass
