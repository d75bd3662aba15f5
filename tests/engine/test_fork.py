"""A fork: another run's policy under changed settings, what it refuses, and what it writes down."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from slipstream import checkpoint, cli, config, fork
from slipstream.config import load_config
from slipstream.errors import CheckpointError, ConfigurationError, RunFolderError
from slipstream.metrics import append_row
from slipstream.run_folder import write_json
from slipstream.summary import warm_start_success

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def trained(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a warm start and two steps of real, tiny policies."""
    from slipstream.chat import Chat
    from slipstream.model import Policy, build_model, publish_policy, write_policy

    run = tmp_path_factory.mktemp("runs") / "old"
    settings = ["model.hidden_size=16", "model.intermediate_size=24", "model.layers=1", "model.heads=2"]
    made = load_config("research", [*settings, "seed=3"])
    (run / "checkpoints").mkdir(parents=True)
    config.save(made, run / "config.toml")
    chat = Chat(tokenizer)
    sizes = {"vocabulary": len(tokenizer), "stop_token": chat.stop_token, "max_tokens": 256}
    for seed, step in enumerate((0, 20, 40)):
        model = build_model(made.model, **sizes, seed=seed)
        policy = Policy(model=model, tokenizer=tokenizer, chat=chat)
        if not step:
            publish_policy(run / "checkpoints" / "warmup", policy, {"step": 200, "success": 0.4})
            continue

        def write(folder: Path, policy: Policy = policy) -> None:
            write_policy(folder, policy)
            for name in ("optimizer.safetensors", "random.safetensors", "state.json"):
                (folder / name).write_text("of the run")

        checkpoint.save_checkpoint(run / "checkpoints", step, write, keep=5)
    checkpoint.publish_folder(run / "checkpoints" / "step-00000020", run / "checkpoints" / "best")
    append_row(run / "metrics.jsonl", {"kind": "warmup", "step": 200, "success": 0.4})
    append_row(run / "metrics.jsonl", {"kind": "evaluation", "step": 20, "success": 0.8})
    write_json(run / "baselines.json", {"oracle": {"success": 1.0, "source": "scripted"}})
    write_json(run / "run.json", {"run": "abc"})
    return run


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("at", "source", "step", "success"),
    [
        ("", "step-00000040", 40, None),
        ("@20", "step-00000020", 20, 0.8),
        ("@best", "best", 20, 0.8),
        ("@warmup", "warmup", 0, 0.4),
    ],
)
def test_a_fork_begins_with_the_policy_of_a_checkpoint(
    trained: Path, tmp_path: Path, at: str, source: str, step: int, success: float | None
) -> None:
    made, planned = fork.planned(f"{trained}{at}", ["optim.learning_rate=1e-5", "steps=7"])
    assert (made.seed, made.steps, made.optim.learning_rate) == (3, 7, 1e-5)
    fork.begin(planned, tmp_path)
    old, new = trained / "checkpoints" / source, tmp_path / "checkpoints" / "warmup"
    manifest = checkpoint.verify(new)
    assert weights(new) == weights(old)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= manifest["files"].keys()
    assert not manifest["files"].keys() & fork.LEFT_BEHIND
    assert warm_start_success(tmp_path, []) == success
    told = json.loads((tmp_path / "fork.json").read_text())
    assert (told["run"], told["run_id"], told["checkpoint"], told["step"]) == (
        str(trained), "abc", source, step
    )  # fmt: skip
    assert told["changed"] == {"steps": 7, "optim.learning_rate": 1e-5}
    assert told["sha256"]["model.safetensors"] == manifest["files"]["model.safetensors"]["sha256"]


def test_success_is_not_carried_over_to_other_tasks(trained: Path, tmp_path: Path) -> None:
    _, planned = fork.planned(f"{trained}@20", ["environment.tool_failure_rate=0.3"])
    fork.begin(planned, tmp_path)
    assert not (tmp_path / "baselines.json").exists()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            "model.layers=3",
            "--fork: model.layers cannot change, since the policy has its size; leave it out, or train anew "
            "without --fork",
        ),
        (
            "warmup.batch=8",
            "--fork: warmup.batch would change nothing, since the warm start is that checkpoint; "
            "leave it out",
        ),
        (
            "environment.max_tokens=512",
            "--fork: environment.max_tokens must be at most 256, the positions of that policy, got 512",
        ),
    ],
)
def test_what_cannot_change_is_refused(trained: Path, setting: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        fork.planned(str(trained), [setting])
    assert str(caught.value) == sentence


def test_a_checkpoint_that_is_not_there_or_damaged_is_said(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint 30; give @ and one of 40, 20, best, warmup"):
        fork.planned(f"{trained}@30", [])
    with pytest.raises(RunFolderError, match=r"is no run folder: it holds no config\.toml"):
        fork.planned(str(tmp_path), [])
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / "checkpoints" / "best" / "model.safetensors").write_text("damaged")
    with pytest.raises(CheckpointError, match="expected"):
        fork.planned(f"{copy}@best", [])


def test_a_fork_whose_warm_start_is_gone_makes_none_of_its_own(trained: Path, tmp_path: Path) -> None:
    fork.check_begun(tmp_path)
    fork.begin(fork.planned(str(trained), [])[1], tmp_path)
    with pytest.raises(CheckpointError, match=r"is a fork of .*old, and its warm start is not whole; remove"):
        fork.check_begun(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output", "new", "--resume"], "--fork begins a run and --resume goes on with one"),
        (["seed=4"], "--fork needs --output DIR, a new folder"),
        (["research", "--output", "new"], "--fork takes the recipe of its run; leave research out"),
        (["sed=4", "--output", "new"], "unknown key sed; did you mean seed?"),
    ],
)
def test_mistakes_on_the_command_line(
    trained: Path,
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--fork", str(trained), *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_settings_of_a_fork_are_those_of_its_run_and_what_was_said(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["train", "seed=9", "--fork", f"{trained}@20", "steps=5", "--output", str(tmp_path / "new")]
    assert cli.main([*command, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "seed = 9" in told and "steps = 5" in told and "hidden_size = 16" in told


def test_it_leaves_behind_what_the_learner_keeps_for_itself() -> None:
    from slipstream import learner

    assert {"manifest.json", learner.OPTIMIZER, learner.RANDOM, learner.STATE} == fork.LEFT_BEHIND
