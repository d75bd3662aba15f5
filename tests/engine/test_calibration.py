"""A judge against the outcomes of recorded episodes: the command, its figures and its exit code."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for needed in ("starlette", "uvicorn", "httpx2"):
    pytest.importorskip(needed)
sys.path.insert(0, str(Path(__file__).parent / "judging"))

from judge_server import JudgeServer, judge_server, said  # noqa: E402

from slipstream import cli, run_folder, synthetic  # noqa: E402
from slipstream.chat import Chat  # noqa: E402
from slipstream.config import load_config  # noqa: E402
from slipstream.events import Received  # noqa: E402
from slipstream.ingest import IngestLog  # noqa: E402
from slipstream.types import Score, ScoreKind, Trajectory, TrajectoryId  # noqa: E402
from slipstream.wire import encode_trajectory  # noqa: E402

RUBRIC = 'name = "right"\ncriterion = "Right."\n[choices]\nfails = 0\npartly = 0.5\nmeets = 1\n'


@pytest.fixture(scope="module")
def running() -> Iterator[JudgeServer]:
    with judge_server() as made:
        yield made


class Run:
    """A run folder whose episodes say what the judge is to say, and the command on it."""

    def __init__(self, path: Path, chat: Chat, server: JudgeServer, capsys: Any) -> None:
        self.path, self._chat, self._capsys, self._server = path, chat, capsys, server
        run_folder.write_config(path, load_config("research", []))
        (path / "checkpoints" / "warmup").mkdir(parents=True)
        chat.tokenizer.save_pretrained(path / "checkpoints" / "warmup")
        (path / "rubric.toml").write_text(RUBRIC)
        server.asked.clear()

        def answer(body: dict[str, Any]) -> str:
            found = re.search(r"say (fails|partly|meets|nonsense)", body["messages"][1]["content"])
            assert found is not None
            return said(found[1], "As told.") if found[1] != "nonsense" else "nonsense"

        server.says(answer)

    def keep(self, episodes: Sequence[tuple[bool | None, str]]) -> None:
        log = IngestLog(self.path / "trajectories")
        for number, (success, words) in enumerate(episodes):
            made = self._episode(number, success, words)
            log.append(received(made), encode_trajectory(made))
        log.close()

    def _episode(self, number: int, success: bool | None, words: str) -> Trajectory:
        tokens = self._chat.message(f"episode {number} say {words}")
        value = None if success is None else 2.0 * success - 1.0
        return dataclasses.replace(
            synthetic.trajectory(len(tokens)),
            identity=TrajectoryId(run="r", actor="actor-0", epoch=0, seq=number),
            token_ids=tokens,
            turns=np.zeros(len(tokens), np.int16),
            versions=np.zeros(len(tokens), np.int32),
            loss_mask=np.ones(len(tokens), np.uint8),
            scores=(Score(name="right", kind=ScoreKind.OUTCOME, weight=1.0, value=value),),
            segments=(),
        )

    def judge(self, *options: str) -> tuple[int, list[str]]:
        given = ["--rubric", str(self.path / "rubric.toml"), "--base-url", self._server.url, "--model", "m"]
        code = cli.main(["judge", str(self.path), *given, *options])
        written = self._capsys.readouterr()
        return code, (written.out or written.err).splitlines()


def received(one: Trajectory) -> Received:
    return Received(
        identity=one.identity, attempt=one.attempt, split=one.split, evaluation=-1, issue=0,
        outcome=one.outcome, success=one.success, reward=0.0, turns=1, tokens=1, serials=(0,),
        verdict="buffered",
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, chat: Chat, running: JudgeServer, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path / "run", chat, running, capsys)


EPISODES: list[tuple[bool | None, str]] = [
    *[(True, "meets")] * 4,
    (True, "fails"),
    *[(False, "fails")] * 3,
    (False, "partly"),
    (False, "meets"),
    (None, "meets"),
    (True, "nonsense"),
]


def test_the_report_has_the_exact_figures(run: Run, running: JudgeServer) -> None:
    """Of ten with a verdict 8 agree, chance is 1/2: kappa (0.8 - 0.5) / 0.5. No outcome, not asked."""
    run.keep(EPISODES)
    code, lines = run.judge()
    assert code == 0, lines
    assert lines == [
        "           fails   partly    meets  invalid",
        "success        1        0        4        1",
        "failure        3        1        1        0",
        "accuracy 0.800, Cohen's kappa 0.600, of 10; invalid 0.091 (nonsense 1)",
        "actor-0/0/4: success, judged fails: As told.",
        "actor-0/0/9: failure, judged meets: As told.",
    ]
    assert len(running.asked) == 11
    assert run.judge("--threshold", "0.61")[0] == 1
    assert run.judge("--most-invalid", "0.09")[0] == 1
    assert len(running.asked) == 13, "verdicts are kept, and what is none is asked for again"


def test_the_newest_episodes_are_taken(run: Run) -> None:
    run.keep([(True, "fails"), (False, "meets"), (True, "meets"), (False, "fails")])
    code, lines = run.judge("--episodes", "2")
    assert (code, lines[3]) == (0, "accuracy 1.000, Cohen's kappa 1.000, of 2; invalid 0.000")


@pytest.mark.parametrize(
    ("episodes", "figures"),
    [
        (
            [(True, "nonsense")] * 2,
            "accuracy none, Cohen's kappa not defined, of 0; invalid 1.000 (nonsense 2)",
        ),
        ([(True, "meets")] * 2, "accuracy 1.000, Cohen's kappa not defined, of 2; invalid 0.000"),
    ],
)
def test_a_kappa_that_is_not_defined_is_not_good_enough(
    run: Run, episodes: list[tuple[bool | None, str]], figures: str
) -> None:
    run.keep(episodes)
    code, lines = run.judge("--most-invalid", "1", "--threshold", "-1")
    assert (code, lines[3]) == (1, figures)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "holds no episode with a judged outcome"),
        (("--episodes", "0"), "--episodes must be at least 1, got 0"),
        (("--threshold", "2"), "--threshold must lie between -1 and 1, got 2.0"),
        (("--key-from", "NO_SUCH_VARIABLE"), "the environment variable NO_SUCH_VARIABLE is not set"),
    ],
)
def test_mistakes_are_sentences(run: Run, options: tuple[str, ...], sentence: str) -> None:
    run.keep([(None, "meets")])
    code, lines = run.judge(*options)
    assert code == 2 and len(lines) == 1 and sentence in lines[0]
