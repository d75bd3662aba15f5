"""Policies: built from sizes or loaded from a folder, and refused by name when they cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from slipstream.attention import install
from slipstream.chat import Chat
from slipstream.config import ModelConfig, load_config
from slipstream.errors import CheckpointError, ConfigurationError
from slipstream.model import (
    WEIGHTS,
    Policy,
    build_model,
    canary_logprobs,
    check_decoder,
    choose_device,
    choose_dtype,
    copy_weights,
    first_policy,
    head,
    load_model,
    load_policy,
    named_weights,
    write_policy,
)

ModelMaker = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")
SIZES = ModelConfig(hidden_size=16, intermediate_size=24, layers=1, heads=2)


def built(seed: int = 1) -> PreTrainedModel:
    return build_model(SIZES, vocabulary=40, stop_token=4, max_tokens=64, seed=seed)


def test_equal_seeds_give_equal_weights() -> None:
    state = torch.random.get_rng_state()
    one, same, other = built(), built(), built(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in named_weights(one).items():
        assert torch.equal(tensor, named_weights(same)[name])
    assert not torch.equal(head(one), head(other))


def test_a_tied_head_is_one_tensor() -> None:
    model = built()
    assert head(model) is model.get_input_embeddings().weight
    assert "lm_head.weight" not in named_weights(model)


def test_a_written_policy_is_read_back(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = Policy(model=built(), tokenizer=tokenizer, chat=Chat(tokenizer))
    write_policy(tmp_path, policy)
    again = load_policy(tmp_path, config=SIZES, device=CPU)
    assert named_weights(again.model).keys() == named_weights(policy.model).keys()
    tokens = (4, 9, 17, 3)
    assert canary_logprobs(again.model, tokens) == canary_logprobs(policy.model, tokens)
    assert again.chat.message("Oslo").tolist() == policy.chat.message("Oslo").tolist()


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = Policy(model=built(), tokenizer=tokenizer, chat=Chat(tokenizer))
    write_policy(tmp_path, policy)
    loaded = load_model(tmp_path)
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.write(bytes((tmp_path / WEIGHTS).stat().st_size))
    for name, tensor in named_weights(loaded).items():
        assert torch.equal(tensor, named_weights(policy.model)[name]), name


def test_canary_log_probabilities_are_the_models_own(make_model: ModelMaker) -> None:
    tokens = torch.tensor([5, 9, 36, 0, 3])
    own = make_model(kv_heads=1, installed=False)
    with torch.no_grad():
        logits = own(input_ids=tokens[None]).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0]
    found = canary_logprobs(make_model(kv_heads=1), tuple(tokens.tolist()))
    assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_copied_weights_must_fit() -> None:
    model, other = built(), built(2)
    with torch.no_grad():
        copy_weights(model, named_weights(other))
    assert all(torch.equal(t, named_weights(other)[n]) for n, t in named_weights(model).items())
    with pytest.raises(CheckpointError, match="extra is on one side only"):
        copy_weights(model, {**named_weights(other), "extra": torch.zeros(1)})


def test_missing_and_damaged_folders_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CheckpointError, match=r"no model here \(config.json is missing\)"):
        load_model(tmp_path)
    write_policy(tmp_path, Policy(model=built(), tokenizer=tokenizer, chat=Chat(tokenizer)))
    file = tmp_path / WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot load the model"):
        load_model(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot load the model"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot load the model"):
        load_model(tmp_path)


def test_the_device_is_checked() -> None:
    assert choose_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert choose_device("auto") == CPU
        with pytest.raises(ConfigurationError, match=r'device must be .* got "cuda:0": no GPU is usable'):
            choose_device("cuda:0")


def test_auto_is_bfloat16_on_a_gpu_only() -> None:
    cuda = torch.device("cuda:1")
    assert choose_dtype("auto", cuda) is torch.bfloat16
    assert choose_dtype("auto", CPU) is choose_dtype("auto", None) is torch.float32
    assert choose_dtype("float32", cuda) is torch.float32
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16
    config = load_config("smollm2")
    assert (config.model.dtype, config.device) == ("auto", "auto")


def test_check_decoder_accepts_ours(make_model: ModelMaker) -> None:
    model = make_model(kv_heads=1)
    check_decoder(model, name="tiny", max_tokens=128)
    assert canary_logprobs(model, (1, 2, 3))


TINY = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.6,
}


def test_soft_capped_logits_are_refused() -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**TINY, final_logit_softcapping=2.0))
    install(model)
    with pytest.raises(CheckpointError, match="tiny: this model's logits are not its head times"):
        check_decoder(model, name="tiny", max_tokens=128)


@pytest.mark.parametrize("window", [64, 128, None])
def test_windows_shorter_than_an_episode_are_refused(window: int | None) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**TINY, sliding_window=window))
    install(model)
    if window == 64:
        with pytest.raises(
            CheckpointError, match=r"attends to 64 tokens only, fewer than .*max_tokens = 128"
        ):
            check_decoder(model, name="tiny", max_tokens=128)
    else:
        check_decoder(model, name="tiny", max_tokens=128)


def test_first_policy_builds_from_the_corpus() -> None:
    config = load_config("research", ["model.hidden_size=16", "model.heads=2", "device=cpu"])
    policy = first_policy(config, ["Ada lives in Oslo. <tool_call>"] * 3)
    assert policy.model.config.vocab_size == len(policy.tokenizer)
    assert policy.chat.text(policy.chat.message("Ada lives in Oslo.")) == "Ada lives in Oslo."
    with pytest.raises(CheckpointError, match="no model here"):
        first_policy(load_config("research", ["model.path=/nowhere"]), [])
