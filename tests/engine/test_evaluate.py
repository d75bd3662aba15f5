"""Evaluation of a policy folder: the same tasks, the same draws, the same figures."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from slipstream import evaluate, synthetic, versions
from slipstream.chat import Chat
from slipstream.config import EnvironmentConfig, RunConfig, load_config
from slipstream.errors import CheckpointError, ConfigurationError
from slipstream.metrics import wilson_interval
from slipstream.model import Policy, build_model, publish_policy
from slipstream.types import Score, ScoreKind, Split, TaskAttempt

CATEGORIES = """
from slipstream.environments import EnvironmentFactory
from slipstream.types import Task

class Tasks:
    def task(self, split, index):
        return Task(split=split, index=index, question="?", data={"category": "odd" if index % 2 else "even"})

made = EnvironmentFactory(tasks=Tasks(), make=lambda: None)
"""


@pytest.fixture(scope="module")
def config() -> RunConfig:
    sizes = ["model.hidden_size=16", "model.intermediate_size=24", "model.layers=1", "model.heads=2"]
    return load_config("research", [*sizes, "device=cpu", "actor.concurrency=8"])


@pytest.fixture(scope="module")
def folder(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    chat = Chat(tokenizer)
    sizes = {"vocabulary": len(tokenizer), "stop_token": chat.stop_token, "max_tokens": 256, "seed": 1}
    target = tmp_path_factory.mktemp("run") / "checkpoints" / "warmup"
    publish_policy(
        target, Policy(model=build_model(config.model, **sizes), tokenizer=tokenizer, chat=chat), {}
    )
    return target


def test_figures_are_written_and_repeat(config: RunConfig, folder: Path, tmp_path: Path) -> None:
    results = []
    for name in ("one.json", "two.json"):
        options = {"split": Split.FRESH, "tasks": 20, "attempts": 1, "temperature": 1.0}
        assert evaluate.main(config, folder, output=tmp_path / name, **options) == 0
        results.append(json.loads((tmp_path / name).read_text()))
    assert results[0] == results[1]
    successes = round(results[0]["success"] * 20)
    assert results[0]["success_ci95"] == pytest.approx(list(wilson_interval(successes, 20)))
    assert (results[0]["split"], results[0]["tasks"], results[0]["temperature"]) == ("fresh", 20, 1.0)
    outcomes = [value for name, value in results[0].items() if name.startswith("outcome/")]
    assert sum(outcomes) == pytest.approx(1.0)


def test_other_versions_than_those_of_the_run_are_told(
    config: RunConfig, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = folder.parent.parent
    versions.hold(run, {**versions.present({}), "torch": "0.1"}, accept=True)
    evaluate.tried(config, folder, split=Split.FRESH, tasks=1, temperature=1.0)
    (run / "versions.json").unlink()
    here = versions.present({})["torch"]
    told = f"{folder}: success may not be that of its run: torch is {here} here and was 0.1"
    assert [record.message for record in caplog.records] == [told]


def test_the_batch_of_live_episodes_changes_nothing(config: RunConfig, folder: Path) -> None:
    def tokens(live: int) -> list[list[int]]:
        actor = config.actor.model_copy(update={"concurrency": live})
        changed = config.model_copy(update={"actor": actor})
        shown = evaluate.tried(changed, folder, split=Split.HELDOUT, tasks=6, temperature=1.0)
        return [one.token_ids.tolist() for one in shown]

    assert tokens(8) == tokens(2)


def test_several_attempts_give_pass_at_k(config: RunConfig, folder: Path, tmp_path: Path) -> None:
    options = {"split": Split.FRESH, "tasks": 4, "attempts": 3, "temperature": 1.0}
    assert evaluate.main(config, folder, output=tmp_path / "out.json", **options) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert "success_ci95" not in result
    assert result["pass_at"].keys() == {"1", "2", "3"}
    assert result["pass_at"]["1"] == pytest.approx(result["success"])
    shown = evaluate.tried(config, folder, split=Split.FRESH, tasks=2, attempts=3, temperature=1.0)
    assert [(t.attempt.task, t.attempt.attempt) for t in shown] == [(n, k) for n in (0, 1) for k in range(3)]
    assert len({t.token_ids.tobytes() for t in shown}) == 6


def test_pass_at_k_and_categories_are_counted_by_task(config: RunConfig, tmp_path: Path) -> None:
    """Task 0: one of two; task 1: both; task 2: none."""
    right = [True, False, True, True, False, False]
    shown = [
        dataclasses.replace(
            synthetic.trajectory(8),
            attempt=TaskAttempt(task=n // 2, seed=1, group=n // 2, attempt=n % 2),
            split=Split.FRESH,
            scores=(
                Score(name="outcome", kind=ScoreKind.OUTCOME, weight=1.0, value=1.0 if success else -1.0),
            ),
        )
        for n, success in enumerate(right)
    ]
    assert evaluate.passes_of(shown, 2) == {"1": pytest.approx(0.5), "2": pytest.approx(2 / 3)}
    assert evaluate.by_category(shown, config) == {}
    (tmp_path / "mine.py").write_text(CATEGORIES)
    named = config.model_copy(update={"environment": EnvironmentConfig(name=f"{tmp_path}/mine.py:made")})
    assert evaluate.by_category(shown, named) == {
        "even": {"success": 0.25, "tasks": 4.0},
        "odd": {"success": 1.0, "tasks": 2.0},
    }


def test_printed_figures(config: RunConfig, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(config, folder, split=Split.HELDOUT, tasks=10, attempts=1, temperature=0.0, output=None)
    shown = capsys.readouterr().out
    assert re.search(r"success 0\.\d{3} \[0\.\d{3}, 0\.\d{3}\] on 10 heldout tasks", shown)
    assert "(temperature 0.0, top-p 1.0)" in shown


def test_episodes_to_read(config: RunConfig, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.rollout(config, 3, None) == 0
    shown = capsys.readouterr().out
    assert shown.count("scripted demonstrations of the warm start") == 3
    assert 'policy │ <tool_call>{"name": "search"' in shown
    assert "       │ <|system|>Tools: search(query), open(document), answer(text)" in shown
    assert evaluate.rollout(config, 2, folder) == 0
    shown = capsys.readouterr().out
    assert shown.count(f"sampled from {folder}") == 2
    assert len(re.findall(r"reward [+-]\d\.\d\d \(outcome [+-]1\.00", shown)) == 2


def test_a_missing_folder_is_named(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model here"):
        evaluate.main(config, tmp_path, split=Split.FRESH, tasks=1, attempts=1, temperature=1.0, output=None)


OWN = """
from slipstream import Invalid, environment, metric, monitor, reward, tool_call

def tasks(split, index):
    return {"question": f"Number {index} of {split}?", "answer": "1"}

def oracle(task):
    yield tool_call("answer", text="1")

@reward()
def right(episode):
    return True if episode.task.index % 2 else Invalid("no reference")

@metric
def letters(episode):
    return len(episode.answer)

@monitor("log")
def short(episode):
    "The answer is short."
    return True

mine = environment(tasks=tasks, rewards=[right, letters, short], oracle=oracle)
mute = environment(tasks=tasks, rewards=[right])
"""


def test_episodes_of_ones_own_show_what_is_beside_the_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_task.py").write_text(OWN)
    name = f"environment.name={tmp_path / 'own_task.py'}"
    assert evaluate.rollout(load_config("research", [f"{name}:mine"]), 2, None) == 0
    first, second = capsys.readouterr().out.split("── episode 2")
    assert "completed, no reward (step -0.05, invalid +0.00)" in first
    assert "right: not judged (no reference)" in first
    assert "completed, reward +0.95 (right +1.00, step -0.05, invalid +0.00)" in second
    assert "letters: 1\n" in second and "fired/short: The answer is short.\n" in second
    with pytest.raises(ConfigurationError, match="has no script called oracle whose episodes could be shown"):
        evaluate.rollout(load_config("research", [f"{name}:mute"]), 2, None)
