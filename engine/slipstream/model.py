"""Floor 3. The policy: a small Llama built here, or a Hugging Face causal language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from slipstream import checkpoint
from slipstream.attention import PackedSegments, install, run_decoder
from slipstream.chat import Chat, load_tokenizer, train_tokenizer
from slipstream.config import ModelConfig, RunConfig
from slipstream.errors import CheckpointError
from slipstream_kernels import linear_logprob

WEIGHTS = "model.safetensors"
VOCABULARY = 2048
"""Most entries of a tokenizer trained here; the text of small environments needs fewer."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Policy:
    """A model with the tokenizer and chat format it speaks."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: Chat


def choose_device(name: str) -> torch.device:
    """Return the named device; "auto" is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def first_policy(config: RunConfig, corpus: Iterable[str]) -> Policy:
    """Load the configured model folder, or train a tokenizer on `corpus` and build a small Llama."""
    device = choose_device(config.device)
    if config.model.path:
        return load_policy(Path(config.model.path), config=config.model, device=device)
    tokenizer = train_tokenizer(corpus, vocabulary=VOCABULARY)
    chat = Chat(tokenizer)
    model = build_model(
        config.model,
        vocabulary=len(tokenizer),
        stop_token=chat.stop_token,
        max_tokens=config.environment.max_tokens,
        seed=config.seed,
    )
    return Policy(model=model.to(device), tokenizer=tokenizer, chat=chat)


def build_model(
    config: ModelConfig, *, vocabulary: int, stop_token: int, max_tokens: int, seed: int
) -> PreTrainedModel:
    """Build a Llama with fresh weights; equal arguments give equal weights."""
    sizes = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=True,
        bos_token_id=stop_token,
        eos_token_id=stop_token,
        initializer_range=config.hidden_size**-0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(sizes)
    install(model)
    return model


def load_model(
    folder: Path, *, dtype: str = "float32", device: torch.device | None = None
) -> PreTrainedModel:
    """Load a causal language model from a local folder; nothing is fetched and nothing is unpickled."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no model here (config.json is missing); give a local Hugging Face model folder"
        )
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=getattr(torch, dtype), use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot load the model: {str(error).splitlines()[0]}") from error
    install(model)
    return model.to(device) if device is not None else model


def load_policy(folder: Path, *, config: ModelConfig, device: torch.device) -> Policy:
    """Load model, tokenizer and chat format from a folder: a checkpoint of ours or any Hugging Face model."""
    model = load_model(folder, dtype=config.dtype, device=device)
    tokenizer = load_tokenizer(folder)
    # A model that was not built here has to be told how a call is written.
    return Policy(model=model, tokenizer=tokenizer, chat=Chat(tokenizer, explain_calls=bool(config.path)))


def write_policy(folder: Path, policy: Policy, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write a Hugging Face model folder with `tensors`, by default the model's own."""
    policy.model.config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    checkpoint.write_tensors(folder / WEIGHTS, named_weights(policy.model) if tensors is None else tensors)


def publish_policy(target: Path, policy: Policy, notes: Mapping[str, Any]) -> None:
    """Publish a policy as a verified folder in one atomic step."""
    checkpoint.publish(target, lambda folder: write_policy(folder, policy), notes)


def head(model: PreTrainedModel) -> Tensor:
    """Return the [V, H] weight of the language-model head."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


def named_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return every parameter once, by name; a tied head appears under its embedding's name only."""
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=True)}


def copy_weights(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Overwrite the model's parameters in place; names and shapes must match exactly."""
    parameters = named_weights(model)
    if parameters.keys() != tensors.keys():
        odd = sorted(parameters.keys() ^ tensors.keys())[0]
        raise CheckpointError(f"weights do not fit the model: {odd} is on one side only")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise CheckpointError(
                f"weights do not fit the model: {name} is {list(tensors[name].shape)}, expected "
                f"{list(parameter.shape)}"
            )
        parameter.copy_(tensors[name])


@torch.no_grad()
def canary_logprobs(model: PreTrainedModel, token_ids: tuple[int, ...]) -> tuple[float, ...]:
    """Return log-probabilities of tokens 1.. of a fixed sequence: what a holder of these weights computes."""
    device = head(model).device
    tokens_T = torch.tensor(token_ids, device=device)
    segments = PackedSegments(torch.tensor([0, len(token_ids)], device=device))
    hidden_TH = run_decoder(model, tokens_T, torch.arange(len(token_ids), device=device), segments)
    logprob_N, _, _ = linear_logprob(hidden_TH[:-1], head(model), tokens_T[1:])
    return tuple(float(value) for value in logprob_N)
