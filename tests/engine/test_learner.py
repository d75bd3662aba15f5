"""The learner asked to stop with its hub gone; and the weights that outlive its restarts."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from slipstream import messages as m
from slipstream import synthetic
from slipstream.best import read_best
from slipstream.chat import Chat
from slipstream.config import BatchConfig, CheckpointConfig, EvaluationConfig, ModelConfig, RunConfig
from slipstream.config_curriculum import CurriculumConfig, StageConfig
from slipstream.hub import open_ledger
from slipstream.learner import Learner, _PartingChannel
from slipstream.messages import decode_message, encode_message
from slipstream.model import Policy, build_model, publish_policy
from slipstream.transport.client import LearnerClient
from slipstream.transport.memory import MemoryHub
from slipstream.types import Lease, TrajectoryId, WeightUpdate
from slipstream.wire import encode_trajectory, schema_hash

NOBODY = "ipc:///tmp/slipstream-nobody-listens-here"
TASKS = 2
CONFIG = RunConfig(
    steps=100,
    model=ModelConfig(hidden_size=16, layers=1, intermediate_size=24, heads=2),
    batch=BatchConfig(groups=2, group_size=2),
    evaluation=EvaluationConfig(every=100, tasks=TASKS),
    checkpoint=CheckpointConfig(every=100, background=False),
)
"""No checkpoint but the warm start: each learner begins anew."""


def test_who_parts_says_nothing_to_a_hub_that_is_gone() -> None:
    channel = _PartingChannel(NOBODY)
    try:
        assert not channel.send([b"x"], 0.3)
        asked = time.monotonic() + 0.5
        channel.parting = lambda: time.monotonic() > asked
        assert channel.send([b"x"], 1000.0)
    finally:
        channel.close()


class Rig:
    """A real ledger and real learners in one thread, and an actor that makes trajectories up."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.log, self.ledger = open_ledger(CONFIG, folder, "run")
        self.hub = MemoryHub(self.ledger)
        self.channel = self.hub.channel("a")
        self.seq = 0
        self.granted = [0, 0]
        self.say(
            m.Hello(role="actor", name="a", run="run", protocol=m.PROTOCOL, schema=schema_hash(), session="s")
        )

    def say(self, message: m.Message, *frames: m.Buffer) -> list[Lease]:
        """Let the actor say something; returns the leases it has been granted since."""
        self.channel.send_now([encode_message(message), *frames])
        leases: list[Lease] = []
        while (reply := self.channel.receive_now()) is not None:
            match decode_message(reply[0]):
                case m.Grant(leases=some):
                    leases += some
                    self.granted[some[0].evaluation >= 0] += len(some)
                case m.Refused(reason=reason):
                    raise AssertionError(reason)
        return leases

    def learner(self, seed: int = 0, config: RunConfig = CONFIG) -> Learner:
        """Start a learner on a warm start of this seed, which has replaced the one before."""
        model = build_model(
            CONFIG.model, vocabulary=len(self.tokenizer), stop_token=4, max_tokens=128, seed=seed
        )
        policy = Policy(model=model, tokenizer=self.tokenizer, chat=Chat(self.tokenizer))
        warm = self.folder / "checkpoints" / "warmup"
        shutil.rmtree(warm, ignore_errors=True)
        publish_policy(warm, policy, {})
        client = LearnerClient(self.hub.sync_channel("learner-0"), "run", "learner-0")
        made = Learner(config, self.folder, client)
        made.start()
        self.say(m.Proof(proof=synthetic.proof(self.newest)))
        return made

    @property
    def newest(self) -> WeightUpdate:
        """What was announced last."""
        newest = self.ledger.state.newest
        assert newest is not None
        return newest

    def play(self, *, train: int = 0, evaluate: int = 0) -> None:
        """Ask for that many episodes and deliver them."""
        received_train, received_evaluate = self.granted
        leases = self.say(m.Want(train=train, evaluate=evaluate, received_train=received_train,
                                 received_evaluate=received_evaluate))  # fmt: skip
        assert len(leases) == train + evaluate
        for lease in leases:
            made = synthetic.answer_to(lease, serial=self.newest.version.serial, tokens=8, seed=self.seq)
            tokens_T = made.token_ids % len(self.tokenizer)
            identity = TrajectoryId(run="run", actor="a", epoch=0, seq=self.seq)
            made = dataclasses.replace(made, identity=identity, token_ids=tokens_T)
            self.say(m.Deliver(seq=self.seq), encode_trajectory(made))
            self.seq += 1

    def train(self, learner: Learner, steps: int) -> None:
        """Let a learner take some steps."""
        for step in range(learner.step + 1, learner.step + steps + 1):
            missing = CONFIG.batch.trajectories - self.ledger.state.fates["buffered"]
            if missing > 0:
                self.play(train=missing)
            learner.advance(timeout_s=0.0)
            assert learner.step == step
            self.say(m.Proof(proof=synthetic.proof(self.newest)))

    def missing(self) -> list[str]:
        """Return the weights that an evaluation still needs and that are gone."""
        state = self.ledger.state
        folders = [state.updates[serial].folder for serial in state.evaluation_serials]
        return [folder for folder in folders if not Path(folder).is_dir()]


@pytest.fixture
def rig(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[Rig]:
    made = Rig(tmp_path, tokenizer)
    yield made
    made.log.close()


def test_an_evaluation_that_outlives_two_learners_keeps_its_weights(rig: Rig) -> None:
    """Killed before its first checkpoint while the first evaluation ran, and again when it was done."""
    rig.train(rig.learner(), 1)
    rig.learner()
    rig.play(evaluate=TASKS)
    rig.train(rig.learner(), 5)
    assert not rig.missing()


def test_the_evaluated_version_is_compared_with_the_best_by_task(rig: Rig) -> None:
    learner = rig.learner()
    told = {"step": 0, "count": 4, "metrics": {}}
    first = m.Evaluated(serial=0, success=0.25, solved=tuple(enumerate([True, False, False, False])), **told)
    assert learner.best.compared(first) == {}
    learner._judge(first)
    rig.train(learner, 1)
    second = m.Evaluated(serial=1, success=0.5, solved=tuple(enumerate([False, True, True, False])), **told)
    found = learner.best.compared(second)
    assert found["paired/difference"] == 0.25
    assert (found["paired/low"], found["paired/high"]) == (-0.5, 1.0)
    learner._judge(second)
    assert learner.best.serial == 1
    assert read_best(rig.folder / "checkpoints") == learner.best


@pytest.mark.parametrize("staged", [False, True])
def test_success_in_training_stands_beside_an_evaluation_of_the_same_task(rig: Rig, staged: bool) -> None:
    curriculum = CurriculumConfig(enabled=staged, stages=(StageConfig(),))
    learner = rig.learner(config=CONFIG.model_copy(update={"curriculum": curriculum}))
    rig.train(learner, 2)
    learner._judge(m.Evaluated(serial=1, step=1, success=0.25, count=4, metrics={}, solved=()))
    rows = rig.ledger.take_reports()
    trained = [row["success"] for row in rows if row["kind"] == "train"]
    (evaluated,) = [row for row in rows if row["kind"] == "evaluation"]
    assert len(trained) == 2
    found = None if staged else pytest.approx(sum(trained) / 2 - 0.25)
    assert evaluated.get("monitor/heldout_gap") == found


def test_a_known_result_for_new_weights_ends_no_other_evaluation(rig: Rig) -> None:
    """A step that was trained again came out with other weights, then with the first ones once more."""
    rig.learner(seed=0)
    rig.play(evaluate=TASKS)
    rig.learner(seed=1)
    last = rig.learner(seed=0)
    assert rig.ledger.state.evaluation is not None
    rig.train(last, 5)
    assert not rig.missing()
    rig.play(evaluate=TASKS)
    rig.train(last, 1)
    assert sorted(path.name for path in (rig.folder / "weights").iterdir()) == [
        f"serial-{serial:08d}" for serial in range(5, 9)
    ]


def test_slip_counts_the_steps_that_a_learner_in_between_gave_up(rig: Rig) -> None:
    """Sampled at step 2 of a branch that ended at step 1, trained at step 2 of the branch after the next."""
    config = CONFIG.model_copy(update={"checkpoint": CheckpointConfig(every=1, background=False)})
    rig.train(rig.learner(config=config), 2)
    rig.play(train=CONFIG.batch.trajectories)
    shutil.rmtree(rig.folder / "checkpoints" / "step-00000002")
    rig.train(rig.learner(config=config), 1)
    last = rig.learner(config=config)
    rig.ledger.take_reports()
    rig.train(last, 1)
    (row,) = rig.ledger.take_reports()
    assert row["slip/mean"] == 2.0
    assert last.step == 3
