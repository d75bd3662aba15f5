"""Datasets on disk in the forms that Hugging Face's tools leave them in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream.authoring.environment import environment
from slipstream.authoring.folders import dataset
from slipstream.authoring.rewards import reward
from slipstream.errors import ConfigurationError
from slipstream.types import Split

ROWS = [
    {"question": f"Capital {number}?", "answer": f"City {number}", "tags": [number]} for number in range(90)
]


@pytest.fixture(scope="module")
def arrow() -> Any:
    return pytest.importorskip("pyarrow")


def stream(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write what `Dataset.save_to_disk` writes."""
    import pyarrow as arrow

    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.Table.from_pylist(rows)
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as arrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    arrow.parquet.write_table(arrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (stream, "{}/data-00000-of-00001.arrow"),
        (parquet, "data/{}-00000-of-00001.parquet"),
        (parquet, "{}.parquet"),
    ],
)
def test_files_and_folders_name_their_split(
    arrow: Any, tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], None], names: str
) -> None:
    for number, split in enumerate(("train", "validation", "test")):
        write(tmp_path / names.format(split), ROWS[30 * number : 30 * number + 30])
    tasks = dataset(tmp_path)
    for number, split in enumerate((Split.TRAIN, Split.HELDOUT, Split.FRESH)):
        first, again = tasks.task(split, 0), tasks.task(split, 30)
        assert (first.question, dict(first.data)) == (
            f"Capital {30 * number}?",
            {"answer": f"City {30 * number}", "tags": [30 * number]},
        )
        assert again.question == first.question


def test_one_split_alone_is_split_by_the_hash(arrow: Any, tmp_path: Path) -> None:
    stream(tmp_path / "data-00000-of-00001.arrow", ROWS)
    stream(tmp_path / "cache-1234.arrow", [{"computed": 1}])
    tasks = environment(tasks=tmp_path, rewards=[reward()(lambda episode: True)]).tasks
    of = {split: {tasks.task(split, index).question for index in range(180)} for split in Split}
    assert sum(map(len, of.values())) == len(set().union(*of.values())) == 90


def test_what_datasets_itself_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": ROWS[:30], "validation": ROWS[30:60], "test": ROWS[60:]}
    made = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path))
    tasks = dataset(tmp_path)
    assert [tasks.task(split, 1).question for split in Split] == ["Capital 1?", "Capital 31?", "Capital 61?"]


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        dataset(folder).check()
    return str(caught.value)


def test_what_is_no_dataset_is_one_sentence(arrow: Any, tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"tasks: expected a dataset in {tmp_path} (*.arrow of save_to_disk, or *.parquet), found none"
    )
    broken = tmp_path / "train.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    assert refusal(tmp_path).startswith(f"tasks: {broken} cannot be read: ")
    parquet(broken, [{"text": "no question"}])
    assert refusal(tmp_path) == f'{broken}, row 0: expected text under "question", got none'
    parquet(broken, [{"question": "x", "image": b"\0"}])
    assert refusal(tmp_path).startswith(f"{broken}, row 0['image'] must be plain data")


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.extras.find_spec", lambda name: None)
    assert refusal(tmp_path) == (
        f"the dataset in {tmp_path} needs the extra datasets, and pyarrow is not installed; run pip install "
        "'slipstream[datasets]'"
    )
