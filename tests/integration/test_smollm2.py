"""A real model: SmolLM2-135M-Instruct answers, learns a few steps of the tool task, and its numbers agree.

The model is the folder in SLIPSTREAM_SMOLLM2, as `slipstream fetch-model smollm2` makes it, or else it is
fetched for these tests.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from books import check_finished
from runs import Process

from slipstream import pretrained
from slipstream.chat import Said
from slipstream.checkpoint import read_tensors
from slipstream.config import ModelConfig, load_config
from slipstream.environments.research import ResearchOptions, build_world, corpus
from slipstream.errors import AddressError, ConfigurationError
from slipstream.inference.embedded import EmbeddedBackend
from slipstream.metrics import read_rows, rows_of
from slipstream.model import Policy, check_decoder, load_policy
from slipstream.types import Sampling, Split

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
FOLDER = "SLIPSTREAM_SMOLLM2"
SMALL = (
    "steps=2", "batch.groups=1", "batch.group_size=4", "batch.token_budget=512", "actor.concurrency=4",
    "warmup.max_steps=6", "warmup.min_steps=0", "warmup.check_every=6", "warmup.batch=2",
    "warmup.learning_rate=3e-4", "warmup.min_success=0", "warmup.target_success=0", "evaluation.every=2",
    "evaluation.tasks=2", "evaluation.final_tasks=2", "checkpoint.every=2", "environment.max_turns=3",
    "environment.max_invalid=1", "environment.tool_failure_rate=0.0", "model.dtype=float32", "device=cpu",
    "optim.warmup_steps=0",
    # A group that fares alike has no advantages; this leaves no step without a gradient.
    "objective.entropy_coefficient=0.01",
)  # fmt: skip
RUN_S = 3000.0
"""Far above what a run takes on two idle cores, about four minutes."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder."""
    if named := os.environ.get(FOLDER):
        return Path(named).resolve()
    made = tmp_path_factory.mktemp("models") / "smollm2"
    try:
        pretrained.fetch(pretrained.SOURCES["smollm2"], made)
    except (AddressError, ConfigurationError) as error:
        pytest.skip(f"no SmolLM2 here, and {FOLDER} names no folder of it: {error}")
    return made


@pytest.fixture(scope="session")
def policy(folder: Path) -> Policy:
    """The model in float32."""
    config = ModelConfig(path=str(folder))
    return load_policy(folder, config=config, device=torch.device("cpu"))


def answer(policy: Policy, question: str) -> str:
    """Return the most likely answer to a question."""
    prompt = policy.chat.conversation([Said(role="user", text=question)])
    backend = EmbeddedBackend(
        policy.model, stop_token=policy.chat.stop_token, rows=1, max_tokens=len(prompt) + 24
    )

    async def ask() -> str:
        serving = asyncio.create_task(backend.run())
        said = await backend.generate(prompt, Sampling(temperature=0.0, max_tokens=24), rollout_id=1)
        serving.cancel()
        return policy.chat.text(said.token_ids)

    return asyncio.run(ask())


def test_it_knows_the_capital_of_france(policy: Policy) -> None:
    assert answer(policy, "What is the capital of France?") == "The capital of France is Paris."


def test_its_tokens_give_the_text_back(policy: Policy) -> None:
    """Of everything an episode shows, and of what no template has seen."""
    options = ResearchOptions()
    texts = list(corpus(options, worlds=2))
    texts += [page.body for page in build_world(Split.HELDOUT, 0, options).documents]
    texts += ["Zoë  lives in Übach-Palenberg, 3 410 km away.\n\t日本語 🙂 \u200b", "  ", "a\r\nb"]
    for text in texts:
        assert policy.chat.text(policy.chat.encode(text)) == text


def test_its_head_times_its_hidden_states_are_its_logits(policy: Policy) -> None:
    assert policy.model.config.vocab_size == len(policy.tokenizer) == 49152
    check_decoder(policy.model, name="smollm2", max_tokens=512)


def check_rows(run: Path) -> None:
    """Losses are numbers, and sampler and learner give a token the same probability."""
    rows = rows_of(read_rows(run), "train")
    assert len(rows) == 2
    for row in rows:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
        assert (row["slip/max"], row["skipped"]) == (0.0, 0.0)
        # The same weights in float32, sampled with a cache and trained packed.
        assert abs(float(row["mismatch/k3"])) < 1e-8
        assert abs(float(row["ratio/min"]) - 1.0) < 1e-4 and abs(float(row["ratio/max"]) - 1.0) < 1e-4
        assert float(row["grad_norm"]) > 0.0
    (warm,) = rows_of(read_rows(run), "warmup")
    assert 0.0 < float(warm["loss"]) < 0.3, "six steps take it from about 1.1 to below 0.1"


def check_weights(folder: Path, run: Path) -> None:
    """Warm start and reinforcement learning each have moved every tensor, the tied head among them."""
    names = [folder, run / "checkpoints" / "warmup", run / "checkpoints" / "step-00000002"]
    stages = [read_tensors(name / "model.safetensors") for name in names]
    for old, new in itertools.pairwise(stages):
        assert old.keys() == new.keys()
        changes = [float((new[name].float() - old[name].float()).abs().max()) for name in old]
        assert np.isfinite(changes).all()
        assert min(changes) > 0.0


def test_it_learns_a_few_steps(folder: Path, tmp_path: Path) -> None:
    """Warm start, two updates at slip 0, evaluations and the summary; every number is accounted for."""
    settings = (*SMALL, f"model.path={folder}")
    run, config = tmp_path / "run", load_config("smollm2", settings)
    ended = Process(
        "train", "smollm2", *settings, "--serial", "--output", str(run), log=tmp_path / "train.log"
    ).end(RUN_S)
    assert ended.code == 0, ended.err
    assert len(check_finished(run, config).trained) == 8
    check_rows(run)
    check_weights(folder, run)
