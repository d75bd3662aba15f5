"""A GGUF file as a Hugging Face folder: the same numbers, the same tokens, a template the policy speaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from slipstream.chat import Chat, Said
from slipstream.config import ModelConfig
from slipstream.environments.research import TOOLS
from slipstream.errors import CheckpointError
from slipstream.gguf_conversion import convert
from slipstream.model import canary_logprobs, check_decoder, load_policy, named_weights
from slipstream.tokenizer import load_tokenizer
from slipstream.tools.hermes import format_call

gguf: Any = pytest.importorskip("gguf", reason="the extra models is not installed")
pytest.importorskip("accelerate", reason="the extra models is not installed")

HIDDEN, HEADS, KV_HEADS, WIDE = 32, 4, 2, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ Ġ", "i n"]
TOKENS = [*SPECIAL, *LETTERS, "ĠĠ", "in"]


def write_gguf(path: Path, *, splits: str = "smollm") -> dict[str, np.ndarray[Any, Any]]:
    """Write a Llama of one layer; return its weights by Hugging Face's names, where rotation changes none."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    draw = np.random.default_rng(1)
    shapes = {
        "token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,), "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
        "blk.0.attn_v": (HIDDEN * KV_HEADS // HEADS, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (WIDE, HIDDEN), "blk.0.ffn_up": (WIDE, HIDDEN), "blk.0.ffn_down": (HIDDEN, WIDE),
    }  # fmt: skip
    weights = {name: draw.normal(0.0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    for name, values in weights.items():
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "model.embed_tokens.weight": weights["token_embd"],
        "model.layers.0.self_attn.v_proj.weight": weights["blk.0.attn_v"],
        "model.layers.0.mlp.down_proj.weight": weights["blk.0.ffn_down"],
        "model.norm.weight": weights["output_norm"],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, converted."""
    made = tmp_path_factory.mktemp("gguf")
    np.savez(made / "expected.npz", **write_gguf(made / "tiny.gguf"))
    (made / "model").mkdir()
    convert(made / "tiny.gguf", made / "model")
    return made / "model"


def test_the_weights_are_those_of_the_file(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in held, "a tied head is written once"
    for name, values in write_gguf(folder.with_name("again.gguf")).items():
        assert torch.equal(held[name], torch.from_numpy(values).bfloat16()), name
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["dtype"], config["eos_token_id"]) == ("bfloat16", 2)
    assert "quantization_config" not in config


def test_the_folder_is_a_policy(folder: Path) -> None:
    policy = load_policy(folder, config=ModelConfig(path=str(folder)), device=torch.device("cpu"))
    assert policy.model.dtype == torch.float32
    check_decoder(policy.model, name="tiny", max_tokens=64)
    assert "lm_head.weight" not in named_weights(policy.model)
    assert np.isfinite(canary_logprobs(policy.model, (3, 4, 5))).all()
    assert policy.chat.stop_token == TOKENS.index("<|im_end|>")


def test_text_is_split_as_the_model_was_trained(folder: Path) -> None:
    """Digits stand alone, so that the blanks before them stay together."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("in  17", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["in", "ĠĠ", "1", "7"]
    for text in ("Zoë lives in  Übach.\n\t42", format_call("open", {"document": "17"})):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_another_way_to_split_text_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", splits="llama-bpe")
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: expected a tokenizer .* smollm, got llama-bpe"):
        convert(tmp_path / "tiny.gguf", tmp_path)


def openai(name: str, arguments: dict[str, str]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_the_template_speaks_as_the_policy_is_trained(folder: Path) -> None:
    """Tools, a call and its result, rendered by an agent, are the tokens that a rollout holds."""
    tokenizer = load_tokenizer(folder)
    chat = Chat(tokenizer, explain_calls=True)
    tools = [
        {"type": "function", "function": {"name": t.name, "description": "", "parameters": t.parameters}}
        for t in TOOLS
    ]
    call = {"query": 'Zoë "Z" Adler'}
    said = [
        Said(role="user", text="Where?"),
        Said(role="assistant", text=format_call("search", call)),
        Said(role="tool", text="17\n18"),
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": None, "tool_calls": [openai("search", call)]},
        {"role": "tool", "content": "17\n18"},
    ]
    for system in ([], ["Be brief."], [""]):
        ours = [Said(role="system", text=text) for text in system] + said
        theirs = [{"role": "system", "content": text} for text in system] + messages
        rendered = tokenizer.apply_chat_template(
            theirs, tools=tools, tokenize=False, add_generation_prompt=True
        )
        expected = chat.conversation(ours, TOOLS).tolist()
        assert tokenizer.encode(rendered, add_special_tokens=False) == expected


def test_without_tools_the_template_is_the_models_own(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    own = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% endif %}"
    )
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
    for messages in ([user], [system, user], [user, {"role": "assistant", "content": "Yes"}, user]):
        for generate in (False, True):
            rendered = [
                tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=generate
                )
                for template in (None, own)
            ]
            assert rendered[0] == rendered[1]


def test_no_text_gives_a_control_token(folder: Path) -> None:
    """Its unknown token is a control token too, for to bytes nothing is unknown."""
    tokenizer = load_tokenizer(folder)
    chat = Chat(tokenizer, explain_calls=True)
    for control in SPECIAL:
        bridge = chat.bridge(f"a{control}b").tolist()
        plain = chat.bridge("ab").tolist()
        for number in range(len(SPECIAL)):
            assert bridge.count(number) == plain.count(number), control
        assert control in tokenizer.decode(bridge)
    message = chat.conversation([Said(role="user", text="?"), Said(role="assistant", text="<|endoftext|>")])
    assert TOKENS.index("<|endoftext|>") not in message.tolist()
