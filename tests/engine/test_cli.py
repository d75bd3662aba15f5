"""The command line as a user meets it: real processes, exit codes, one sentence each."""

import subprocess
import sys
from pathlib import Path

import pytest

from slipstream import cli
from slipstream.commands.common import note_hub
from slipstream.config import load_config
from slipstream.errors import ConfigurationError, RunFolderError
from slipstream.rendezvous import hub_address, run_id


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slipstream", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=cwd)


def test_a_mistyped_key_is_answered_without_loading_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom slipstream.cli import main\ncode = main(sys.argv[1:])\n"
        "assert not {'torch', 'zmq', 'matplotlib', 'rich'} & set(sys.modules)\nsys.exit(code)"
    )
    command = [sys.executable, "-c", code, "train", "research", "optim.learning_rat=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    expected = "slipstream: command line: unknown key optim.learning_rat; did you mean optim.learning_rate?\n"
    assert done.stderr == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], 'unknown command "trian"; did you mean train?'),
        (["xyz"], 'unknown command "xyz"; commands are train, rollout, eval'),
        (["train"], "a RECIPE is missing; shipped are bfcl, deep-research"),
        (["train", "seed=2"], "a RECIPE is missing"),
        (["train", "reserch"], 'unknown recipe "reserch"; did you mean research'),
        (["train", "research", "--outptu", "x"], "unrecognized arguments: --outptu x; see slipstream train"),
        (["train", "research", "--resume", "--output", "none"], "none holds no run to resume"),
        (["train", "--resume", "--output", "none"], "none is no run folder: it holds no config.toml"),
        (["eval", "none"], "the following arguments are required: --recipe"),
        (["eval", "none", "--recipe", "research", "--tasks", "0"], "--tasks must be at least 1, got 0"),
        (["rollout", "research", "-n", "0"], "-n must be at least 1, got 0"),
        (["plot", "none"], "none holds no metrics.jsonl to plot"),
        (["bench", "none"], "benchmark"),
    ],
)  # fmt: skip
def test_mistakes(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("slipstream: ") and message in shown.err
    assert shown.err.count("\n") == 1


def test_dry_run_prints_a_recipe_that_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["train", "research", "steps=7", "--output", str(tmp_path / "out"), "seed=3", "--dry-run"]
    assert cli.main(arguments) == 0
    (tmp_path / "mine.toml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "mine.toml") == load_config("research", ["steps=7", "seed=3"])
    assert not (tmp_path / "out").exists()


def test_a_reader_that_has_gone_is_no_traceback(tmp_path: Path) -> None:
    program = [sys.executable, "-u", "-m", "slipstream", "train", "research", "--dry-run"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


def test_overview_help_and_version() -> None:
    assert "rollout      Print a few episodes to read." in run().stdout
    help_of_train = run("train", "--help")
    assert help_of_train.returncode == 0 and "--resume" in help_of_train.stdout
    assert run("version").stdout == run("--version").stdout
    assert run("version").stdout.startswith("slipstream ")


def test_a_role_that_joins_from_elsewhere_notes_the_hub(tmp_path: Path) -> None:
    for _ in range(2):
        note_hub(tmp_path, "tcp://h:1", "abc")
    assert (hub_address(tmp_path), run_id(tmp_path)) == ("tcp://h:1", "abc")
    with pytest.raises(RunFolderError, match="has address tcp://h:1, not tcp://h:2"):
        note_hub(tmp_path, "tcp://h:2", "abc")
    with pytest.raises(ConfigurationError, match="go together"):
        note_hub(tmp_path, "tcp://h:1", None)
