"""The warm start: trains what was demonstrated, stops with advice, and takes any local model folder."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slipstream import checkpoint, warmup
from slipstream.chat import Chat
from slipstream.config import EnvironmentConfig, RewardConfig, RunConfig, load_config
from slipstream.demonstrations import demonstrations
from slipstream.environments import environment_factory
from slipstream.environments.factory import EnvironmentFactory
from slipstream.environments.research import ResearchOptions, corpus
from slipstream.episodes import EpisodeRunner
from slipstream.errors import ConfigurationError, WarmStartError
from slipstream.inference.trial import held_trial
from slipstream.metrics import read_rows, undefined_names
from slipstream.model import Policy, build_model, load_policy
from slipstream.tokenizer import train_tokenizer
from slipstream.types import Split
from slipstream.warmup import WarmStart

TINY = (
    "device=cpu",
    "model.hidden_size=16",
    "model.intermediate_size=24",
    "model.layers=1",
    "model.heads=2",
    "warmup.batch=4",
    "evaluation.tasks=8",
    "evaluation.final_tasks=12",
    "actor.concurrency=8",
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config_of(*overrides: str) -> RunConfig:
    return load_config("research", [*TINY, *overrides])


def started(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> tuple[WarmStart, Policy, EpisodeRunner]:
    chat = Chat(tokenizer)
    sizes = {"vocabulary": len(tokenizer), "stop_token": chat.stop_token, "max_tokens": 256, "seed": 1}
    policy = Policy(model=build_model(config.model, **sizes), tokenizer=tokenizer, chat=chat)
    runner = EpisodeRunner(
        factory=environment_factory(config.environment, config.rewards),
        chat=chat,
        environment=config.environment,
        rewards=config.rewards,
    )
    return WarmStart(policy, runner, config, folder), policy, runner


def test_only_the_demonstrators_tokens_are_trained(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Loss and gradient are those of the mean cross-entropy over sampled tokens, each sequence alone."""
    config = config_of("optim.max_grad_norm=1e9", "batch.token_budget=256")
    start, policy, runner = started(config, tokenizer, tmp_path)
    plain = LlamaForCausalLM(copy.deepcopy(policy.model.config))
    plain.set_attn_implementation("eager")
    plain.load_state_dict(policy.model.state_dict())
    shown = asyncio.run(demonstrations(runner, config, range(4), policy.chat))
    total, count = torch.zeros(()), 0
    for one in shown:
        tokens = torch.from_numpy(one.token_ids).long()
        logprobs = torch.log_softmax(plain(input_ids=tokens[None]).logits[0, :-1], -1)
        mask = torch.from_numpy(one.loss_mask[1:]).bool()
        total = total - logprobs.gather(1, tokens[1:, None])[:, 0][mask].sum()
        count += int(mask.sum())
    (total / count).backward()
    assert start._step(0) == pytest.approx(total.item() / count, rel=1e-5)
    assert 0 < count < sum(len(one.token_ids) for one in shown) / 2
    for (name, found), expected in zip(policy.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_rows_move_the_screen(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = config_of("warmup.max_steps=25", "warmup.check_every=20", "warmup.target_success=0.5")
    start, _, _ = started(config, tokenizer, tmp_path)
    success, step = start.run()
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 25]
    assert ["success" in row for row in rows] == [False, True, True]
    assert (rows[-1]["success"], step) == (success, 25)
    assert rows[2]["loss"] < rows[0]["loss"] < 6.6
    assert not any(undefined_names(row) for row in rows)


@pytest.mark.parametrize(("least", "stops"), [(0, 3), (3, 3), (4, 6), (100, 9)])
def test_it_stops_at_the_first_check_that_reaches_the_target_after_its_least_steps(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, least: int, stops: int
) -> None:
    config = config_of(
        "warmup.max_steps=9", "warmup.check_every=3", "warmup.target_success=0.0", "warmup.min_success=0.0",
        f"warmup.min_steps={least}",
    )  # fmt: skip
    start, _, _ = started(config, tokenizer, tmp_path)
    assert start.run()[1] == stops


def test_too_weak_a_policy_stops_the_run_with_advice(tmp_path: Path) -> None:
    advice = r"held-out success is 0\.\d\d after 1 steps, expected at least 0\.20; give more demonstrations"
    with pytest.raises(WarmStartError, match=advice):
        warmup.main(config_of("warmup.max_steps=1"), tmp_path)
    assert not (tmp_path / "checkpoints").exists(), "a run that is resumed must not take it for trained"
    baselines = json.loads((tmp_path / "baselines.json").read_text())
    assert baselines["oracle"]["success"] > baselines["do_nothing"]["success"] == 0.0


def test_what_too_weak_a_policy_has_learnt_is_kept(tmp_path: Path) -> None:
    weak = tmp_path / "first" / "weak-warmup"
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with pytest.raises(WarmStartError, match=rf"model\.path={weak} goes on from what was learnt$"):
        warmup.main(config_of("warmup.max_steps=3"), tmp_path / "first")
    with pytest.raises(WarmStartError):
        warmup.main(config_of("warmup.max_steps=3", f"model.path={weak}"), tmp_path / "second")
    first, second = (
        [row["loss"] for row in read_rows(tmp_path / name) if row["kind"] == "warmup"]
        for name in ("first", "second")
    )
    assert second[-1] < first[-1] - 0.1, "it goes on with a lower loss"


def test_trying_is_worth_it_above_the_success_that_pays_for_its_turns() -> None:
    tries = {"success": 1.0, "outcome": 1.0, "reward": 0.2}
    gives_up = {"success": 0.0, "outcome": -1.0, "reward": -1.05}
    # At p: p - (1 - p) - 0.8 against -1 - 0.05.
    assert warmup.break_even({"oracle": tries, "do_nothing": gives_up}) == pytest.approx(0.375)
    assert warmup.break_even({"oracle": tries | {"reward": 1.0}, "do_nothing": gives_up}) == 0.0
    assert warmup.break_even({"oracle": gives_up, "do_nothing": gives_up}) == 0.0
    assert warmup.break_even({"oracle": tries}) == warmup.break_even({}) == 0.0
    assert warmup.break_even({"oracle": tries, "do_nothing": {"success": 0.0}}) == 0.0


@pytest.mark.parametrize(("penalty", "warned"), [(0.05, True), (0.0, False)])
def test_a_warm_start_says_when_giving_up_earns_more(
    penalty: float, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Six calls in ten fail: an answer takes some eight turns at 0.05, giving up one."""
    hard = ("environment.tool_failure_rate=0.6", "environment.max_turns=40", "environment.max_tokens=768")
    untrained = ("warmup.max_steps=0", "warmup.min_success=0.0")
    warmup.main(config_of(*hard, *untrained, f"rewards.step_penalty={penalty}"), tmp_path)
    scripted = json.loads((tmp_path / "baselines.json").read_text())
    assert scripted["do_nothing"]["outcome"] == -1.0
    assert scripted["do_nothing"]["reward"] == pytest.approx(-1.0 - penalty)
    assert scripted["oracle"]["outcome"] == 1.0
    least = (1.0 - scripted["oracle"]["reward"] - penalty) / 2.0
    expected = f"below a success of {least:.2f} giving up at once earns more than trying"
    assert (expected in caplog.text) == warned == ("giving up" in caplog.text)


def test_baselines_of_others_stand_beside_those_of_the_scripts(tmp_path: Path) -> None:
    given = 'evaluation.baselines=[{name="frontier", score=0.8, source="its card", date="2026-11-01"}]'
    with pytest.raises(WarmStartError):
        warmup.main(config_of("warmup.max_steps=1", given), tmp_path)
    baselines = json.loads((tmp_path / "baselines.json").read_text())
    assert baselines["frontier"] == {"success": 0.8, "source": "its card", "date": "2026-11-01"}
    assert baselines["oracle"]["tasks"] == 12


def test_an_environment_is_made_once_when_demonstrations_are_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[EnvironmentConfig] = []

    def make(environment: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
        made.append(environment)
        return environment_factory(environment, rewards)

    monkeypatch.setattr(warmup, "environment_factory", make)
    assert warmup.main(config_of("warmup.max_steps=0", "warmup.min_success=0.0"), tmp_path) == 0
    assert len(made) == 1


def test_without_steps_the_model_is_taken_as_it_is(tmp_path: Path) -> None:
    assert warmup.main(config_of("warmup.max_steps=0", "warmup.min_success=0.0"), tmp_path) == 0
    assert json.loads((tmp_path / "checkpoints" / "warmup" / "manifest.json").read_text())["step"] == 0


def test_an_environment_that_is_unfit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = config_of()
    made = environment_factory(config.environment, config.rewards)
    unfit = dataclasses.replace(made, unfit="environment.name: this one pays for nonsense")
    monkeypatch.setattr(warmup, "environment_factory", lambda *given: unfit)
    with pytest.raises(ConfigurationError, match=r"^environment\.name: this one pays for nonsense$"):
        warmup.main(config, tmp_path)


def test_with_a_curriculum_a_weak_policy_may_begin(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warmup.main(config_of("warmup.max_steps=1", "curriculum.enabled=true"), tmp_path)
    assert "below warmup.min_success = 0.20; the curriculum begins" in caplog.text
    assert checkpoint.verify(tmp_path / "checkpoints" / "warmup")["success"] < 0.2


def test_demonstrations_may_be_of_other_tasks_and_the_band_is_judged_by_the_task_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shares: list[float] = []

    def held(policy: Policy, runner: EpisodeRunner, config: RunConfig) -> float:
        shares.append(config.environment.tool_failure_rate)
        assert runner.factory.tasks.task(Split.HELDOUT, 0).data["hops"] == (1 if shares[-1] == 0.0 else 2)
        return 0.5 if shares[-1] == 0.0 else 0.25

    monkeypatch.setattr(warmup, "held_success", held)
    made: list[float] = []

    def make(environment: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
        made.append(environment.tool_failure_rate)
        return environment_factory(environment, rewards)

    monkeypatch.setattr(warmup, "environment_factory", make)
    easier = "warmup.environment={tool_failure_rate=0.0, options={hops=1}}"
    harder = ("environment.tool_failure_rate=0.6", "environment.options.hops=2", "environment.max_turns=40")
    config = config_of("warmup.max_steps=1", *harder, "environment.max_tokens=768", easier)
    assert warmup.main(config, tmp_path) == 0
    assert shares == [0.0, 0.6]
    assert made == [0.6, 0.0]
    assert [row["success"] for row in read_rows(tmp_path)] == [0.25], "the last word of a step counts"
    assert checkpoint.verify(tmp_path / "checkpoints" / "warmup")["success"] == 0.25


def test_no_demonstration_is_a_spike(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    start, _, _ = started(config_of("optim.spike_factor=20.0"), tokenizer, tmp_path)
    for _ in range(32):
        start._optimizer._guard.accept(0.01, 0.01)
    assert start._optimizer._guard.fault(50.0, 50.0) == ""
    assert start._optimizer._guard.fault(float("nan"), 0.01) == "loss is nan"


def test_a_stage_that_cannot_be_made_is_told_before_the_training(tmp_path: Path) -> None:
    stage = "curriculum.stages=[{tools=['search', 'fetch']}]"
    with pytest.raises(ConfigurationError, match="has no tool fetch; there is search, open, answer"):
        warmup.main(config_of("warmup.max_steps=1", "curriculum.enabled=true", stage), tmp_path)
    assert not (tmp_path / "baselines.json").exists()


def test_limits_that_stop_the_expert_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"max_turns = 1 let the script that knows the answers solve only 0\.00"
    ):
        warmup.main(config_of("environment.max_turns=1"), tmp_path)


@pytest.fixture
def foreign_folder(tmp_path: Path) -> Path:
    """A tiny Llama with grouped heads, an untied head and a ChatML tokenizer, as one would download it."""
    trained = train_tokenizer(corpus(ResearchOptions(), worlds=4), vocabulary=500)._tokenizer
    trained.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_any_model_folder_goes_through_the_same_code(foreign_folder: Path, tmp_path: Path) -> None:
    config = config_of(
        f"model.path={foreign_folder}",
        "warmup.max_steps=2",
        "warmup.min_success=0.0",
        "environment.max_tokens=512",
        "sampling.max_tokens=8",
        "evaluation.tasks=2",
    )
    run = tmp_path / "run"
    run.mkdir()
    assert warmup.main(config, run) == 0
    folder = run / "checkpoints" / warmup.FOLDER
    checkpoint.verify(folder)
    policy = load_policy(folder, config=config.model, device=torch.device("cpu"))
    original = LlamaForCausalLM.from_pretrained(foreign_folder)
    assert not torch.equal(policy.model.get_output_embeddings().weight, original.lm_head.weight)
    runner = EpisodeRunner(
        factory=environment_factory(config.environment, config.rewards),
        chat=policy.chat,
        environment=config.environment,
        rewards=config.rewards,
    )
    policy.model.train()
    shown = held_trial(policy, runner, split=Split.FRESH, tasks=3, temperature=1.0, top_p=0.9, config=config)
    assert policy.model.training and all(p.requires_grad for p in policy.model.parameters())
    assert [t.attempt.task for t in shown] == [0, 1, 2]
    for one in shown:
        text = policy.chat.text(one.token_ids)
        assert text.startswith(
            "<|im_start|>system\nTools: search(query), open(document), answer(text)\nEach message"
        )
        assert "<|im_start|>assistant\n" in text
        assert one.loss_mask.sum() > 0 and np.isfinite(one.behavior_logprobs).all()
        assert set(one.versions[one.loss_mask > 0].tolist()) == {0}


def test_conversations_of_the_users_own_are_imitated_beside_or_instead_of_demonstrations(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = config_of("warmup.batch=8", "warmup.chats_share=0.25")
    _, policy, runner = started(config, tokenizer, tmp_path)
    played = asyncio.run(demonstrations(runner, config, range(18), policy.chat))
    own, others = played[:3], played
    beside = WarmStart(policy, runner, config, tmp_path, own)
    for step in (0, 2):
        numbers = [(2 * step) % 3, (2 * step + 1) % 3]
        expected = [*(own[n] for n in numbers), *others[6 * step : 6 * step + 6]]
        shown = beside._shown(step)
        assert [one.token_ids.tolist() for one in shown] == [one.token_ids.tolist() for one in expected]
    alone = replace(runner, factory=replace(runner.factory, scripts={}))
    shown = WarmStart(policy, alone, config, tmp_path, own)._shown(1)
    assert [one.token_ids.tolist() for one in shown] == [own[n % 3].token_ids.tolist() for n in range(8, 16)]
