"""Datasets of reasoning-gym: which are trusted, whose fault a scorer's exception is, and what never runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from worlds import attempt, constant, equal_in_pieces, factory_of, played, success

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import environment_factory
from slipstream.environments.reasoning_gym.entries import Entries, harmless
from slipstream.environments.reasoning_gym.verdicts import findings, fit, why_unfit
from slipstream.environments.splits import split_of
from slipstream.errors import ConfigurationError
from slipstream.tools.hermes import format_call
from slipstream.types import Split

NAME = "reasoning-gym:basic_arithmetic"


@pytest.fixture(autouse=True)
def _package(request: pytest.FixtureRequest) -> None:
    if "without" not in request.node.name:
        pytest.importorskip("reasoning_gym")


def test_verdicts_without_the_package() -> None:
    assert findings()["version"] == "0.1.25" and len(findings()["datasets"]) == 105
    assert why_unfit("game_of_life_halting") == "pays 1 for the constant answer 'zzz'"
    assert why_unfit("coin_flip").startswith("pays 0.")
    assert why_unfit("prime_factorization").startswith("has a scorer that raises ValueError")
    assert why_unfit("boxnet") == "gives its own answer a score of 0"
    assert why_unfit("countdown") == "has a scorer that runs the answer as code"
    assert why_unfit("list_functions") == "does not draw the same entry twice"
    assert why_unfit("nothing").startswith("was not audited")
    assert {"basic_arithmetic", "chain_sum", "gcd"} <= set(fit())
    assert len(fit()) > 50


def test_a_missing_package_is_one_sentence_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigurationError, match=re.escape("pip install 'slipstream[reasoning-gym]'")):
        factory_of(NAME)


def test_scripts_and_constant_answers() -> None:
    factory = factory_of(NAME, tool_failure_rate=0.5)
    assert success(factory, factory.scripts["oracle"], 30) == 1.0
    assert success(factory, factory.scripts["do_nothing"], 30) == 0.0
    assert max(constant(factory, answer, 60) for answer in ("0", "-1", "zzz", "")) <= 0.1


def test_what_is_unfit_loads_but_says_why() -> None:
    factory = factory_of("reasoning-gym:game_of_life_halting")
    assert factory.unfit == (
        "environment.name: reasoning-gym:game_of_life_halting pays 1 for the constant answer 'zzz'; choose "
        "another dataset, or train on it all the same with environment.options.trust_scorer=true"
    )
    assert constant(factory, "zzz", 5) == 1.0
    assert not factory_of("reasoning-gym:game_of_life_halting", trust_scorer=True).unfit
    assert not factory_of(NAME).unfit


@pytest.mark.parametrize("name", ["basic_arithmetic", "gsm_symbolic", "acre"])
def test_splits_share_no_question_and_an_entry_is_always_the_same(name: str) -> None:
    factory, again = (factory_of(f"reasoning-gym:{name}") for _ in range(2))
    asked: dict[Split, set[str]] = {}
    for split in Split:
        tasks = [factory.tasks.task(split, index) for index in range(20)]
        assert tasks == [again.tasks.task(split, index) for index in range(20)]
        asked[split] = {task.question for task in tasks}
        assert len(asked[split]) > 15
        assert all(split_of(question) is split for question in asked[split])
    assert factory.tasks.task(Split.TRAIN, (1 << 24) + 7).question


def test_a_dataset_that_is_too_small_for_three_splits_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = Entries("basic_arithmetic")
    monkeypatch.setattr(entries, "entry", lambda number: {"question": "always the same"})
    with pytest.raises(ConfigurationError, match="too few different questions for three splits"):
        for split in Split:
            entries.number(split, 0)


def scores_of(name: str, answer: str) -> dict[str, Any]:
    factory = factory_of(f"reasoning-gym:{name}")
    _, scores = played(factory, factory.tasks.task(Split.TRAIN, 0), [format_call("answer", {"text": answer})])
    return {score.name: score.value for score in scores}


@pytest.mark.parametrize("answer", ["junk", "", "2 x", "\0", "9" * 5000])
def test_what_makes_a_scorer_raise_is_the_answers_fault(answer: str) -> None:
    assert scores_of("prime_factorization", answer)["outcome"] == -1.0


def test_a_scorer_that_cannot_judge_its_own_answer_judges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = factory_of(NAME)
    import reasoning_gym

    def fails(self: object, answer: str, entry: object) -> float:
        raise KeyError("x")

    kind = type(reasoning_gym.create_dataset("basic_arithmetic"))
    monkeypatch.setattr(kind, "score_answer", fails)
    _, scores = played(factory, factory.tasks.task(Split.TRAIN, 0), [format_call("answer", {"text": "1"})])
    assert (scores[0].value, scores[0].invalid) == (None, "the scorer raised KeyError at its own answer")


def test_no_answer_is_run_as_code(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    writes = f"open({str(trace)!r}, 'w').write('x')"
    for name in ("spiral_matrix", "string_insertion", "binary_matrix", "n_queens", "countdown", "puzzle24"):
        for answer in (writes, f"[{writes}]", f"[[{writes}]]", f"[getattr(1, 'x'), {writes}]"):
            assert scores_of(name, answer)["outcome"] == -1.0
        assert not trace.exists(), f"{name} ran its answer"


@pytest.mark.parametrize(
    ("answer", "is_harmless"),
    [
        ("[1, 2, [3]]", True),
        ("(7 + 3) * 4 - 1", True),
        ("x**2*sin(x) + log(x) + C", True),
        ("['A', 'B']", True),
        ("_ Q _ _", True),
        ("f(1)", False),
        ("[exit()]", False),
        ("().__class__", False),
        ("(1).real", False),
        ("9**9**9", False),
        ("9**9999", False),
        ("[x for x in y]", False),
        ("1" * 3000, False),
    ],
)
def test_what_may_be_shown_to_a_scorer_that_runs_it(answer: str, is_harmless: bool) -> None:
    assert harmless(answer) is is_harmless


def test_the_calculator_and_going_on_from_any_state() -> None:
    factory = factory_of(NAME, tool_failure_rate=0.3)
    task = factory.tasks.task(Split.TRAIN, 3)
    calls = [format_call("calculate", {"expression": text}) for text in ("6 * 7", "1 / 0", "os")] * 3
    calls += ["none", format_call("answer", {"text": task.data["answer"]})]
    assert equal_in_pieces(factory, task, attempt(3), calls)
    moves, _ = played(factory_of(NAME), task, calls[:3])
    assert [move.observation for move in moves] == [
        "42",
        "error: division by zero",
        "error: cannot calculate os",
    ]


def test_a_wrong_dataset_names_the_nearest() -> None:
    for name, said in (
        ("reasoning-gym:basic_aritmetic", "got basic_aritmetic; did you mean basic_arithmetic?"),
        ("reasoning-gym", "expected a dataset of reasoning-gym, as in reasoning-gym:chain_sum, got none"),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(said)):
            environment_factory(EnvironmentConfig(name=name), RewardConfig())
