"""Checkpoints: whole or ignored, whatever happened to the files."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slipstream import checkpoint, tensor_file
from slipstream.errors import CheckpointError


def save(folder: Path, step: int, *, keep: int = 2, text: str = "") -> Path:
    def write(target: Path) -> None:
        (target / "part").mkdir()
        (target / "part" / "state.json").write_text(text or f"step {step}")

    return checkpoint.save_checkpoint(folder, step, write, keep=keep)


def test_the_newest_is_loaded_and_old_ones_are_removed(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        path = save(tmp_path, step)
    latest = checkpoint.load_latest(tmp_path)
    assert (latest.step, latest.path) == (100, path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["latest", "step-00000010", "step-00000100"]
    assert (tmp_path / "latest").read_text() == "step-00000100\n"
    assert checkpoint.verify(path)["step"] == 100


def test_a_damaged_one_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    state = save(tmp_path, 2) / "part" / "state.json"
    state.write_text("step 3")
    assert checkpoint.load_latest(tmp_path).step == 1
    assert f"skipped a damaged checkpoint: {state}: expected sha256" in caplog.text


def test_damage_names_file_expected_and_got(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    state = path / "part" / "state.json"
    state.write_text("longer than before")
    with pytest.raises(CheckpointError, match=f"{state}: expected 6 bytes, got 18"):
        checkpoint.verify(path)
    state.unlink()
    with pytest.raises(CheckpointError, match="expected 6 bytes, the file is missing"):
        checkpoint.verify(path)
    (path / "manifest.json").write_text('{"format": 1, "fil')
    with pytest.raises(CheckpointError, match="expected a JSON manifest, got damaged text"):
        checkpoint.verify(path)
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": {"a": 3}}))
    with pytest.raises(CheckpointError, match="expected sizes and sha256"):
        checkpoint.verify(path)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged; the newest: .*manifest"):
        checkpoint.load_latest(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.load_latest(tmp_path / "none")


def test_saving_after_a_fallback_removes_the_branch_given_up(tmp_path: Path) -> None:
    for step in (25, 50):
        damaged = save(tmp_path, step, keep=1)
    (damaged / "part" / "state.json").write_text("")
    save(tmp_path, 40, keep=1)
    assert checkpoint.load_latest(tmp_path).step == 40
    assert not damaged.exists()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, text="old")
    path = save(tmp_path, 3, text="new")
    assert (path / "part" / "state.json").read_text() == "new"
    checkpoint.verify(path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_best_is_a_verified_copy_that_is_replaced_whole(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.publish_folder(save(tmp_path, step), tmp_path / "best")
        manifest = checkpoint.verify(tmp_path / "best")
        assert manifest["step"] == step
        assert (tmp_path / "best" / "part" / "state.json").read_text() == f"step {step}"
    (tmp_path / "step-00000002" / "part" / "state.json").write_text("bad")
    with pytest.raises(CheckpointError):
        checkpoint.publish_folder(tmp_path / "step-00000002", tmp_path / "best")
    checkpoint.verify(tmp_path / "best")


def test_replacing_a_folder_never_leaves_its_name_empty(tmp_path: Path) -> None:
    """A reader that looks all the time sees a whole folder all the time."""
    best = tmp_path / "best"
    checkpoint.publish_folder(save(tmp_path, 1), best)
    code = (
        "import os, sys\nprint('ready', flush=True)\n"
        "while os.getppid() == int(sys.argv[2]):\n"
        "    if not os.path.isdir(sys.argv[1]): print('gone', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(best), str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        for _ in range(20):
            checkpoint.publish_folder(tmp_path / "step-00000001", best)
        reader.kill()
        assert reader.stdout.read() == ""


def test_kill_9_while_saving_leaves_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from slipstream.checkpoint import save_checkpoint\n"
        "def write(path):\n    (path / 'half').write_text('x')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "save_checkpoint(Path(sys.argv[1]), 2, write, keep=2)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=100, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint.load_latest(tmp_path).step == 1
    save(tmp_path, 2)
    assert checkpoint.load_latest(tmp_path).step == 2
    assert not list(tmp_path.glob(".*"))


def test_a_generator_s_state_is_read_only_where_it_is_due(tmp_path: Path) -> None:
    checkpoint.write_tensors(tmp_path / "random", {"cpu": torch.get_rng_state()})
    with pytest.raises(CheckpointError, match="cpu: expected dtype F64, F32, BF16, F16, got 'U8'"):
        checkpoint.read_tensors(tmp_path / "random")
    found = checkpoint.read_tensors(tmp_path / "random", dtypes=tensor_file.BYTES)
    assert torch.equal(found["cpu"], torch.get_rng_state())


def test_tensors_and_state_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    checkpoint.write_tensors(tmp_path / "t", tensors)
    loaded = checkpoint.read_tensors(tmp_path / "t")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    checkpoint.write_state(tmp_path / "s", {"cursor": 3})
    assert checkpoint.read_state(tmp_path / "s") == {"cursor": 3}
    (tmp_path / "t").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match="expected a header of at most 12 bytes, got 1844"):
        checkpoint.read_tensors(tmp_path / "t")
    with pytest.raises(CheckpointError, match="the file is missing"):
        checkpoint.read_tensors(tmp_path / "none")
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_state(tmp_path / "s", {"loss": float("nan")})


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/../../b", "a//b", "", ".", "a\0b"])
def test_a_manifest_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    """Publishing a copy would write where it says."""
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "other").write_text("")
    entry = {"size": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    (source / "manifest.json").write_text(json.dumps({"format": 1, "files": {name: entry}}))
    with pytest.raises(CheckpointError, match="expected names of files beside it, got"):
        checkpoint.publish_folder(source, tmp_path / "deep" / "target")
    assert not (tmp_path / "deep").exists()
