"""Floor 3. The policy: a small Llama built here, or a Hugging Face causal language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
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
from slipstream.call_formats import CALL_FORMATS
from slipstream.chat import Chat
from slipstream.config import ModelConfig, RunConfig
from slipstream.errors import CheckpointError, ConfigurationError
from slipstream.tokenizer import load_tokenizer, no_model, train_tokenizer
from slipstream_kernels import linear_logprob

WEIGHTS = "model.safetensors"
CHECKED_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Policy:
    """A model with the tokenizer and chat format it speaks."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: Chat


def choose_device(name: str) -> torch.device:
    """Return the named device; "auto" is a GPU where there is one. Raises ConfigurationError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(
            f'device must be "auto" or "cpu" on this machine, got "{name}": no GPU is usable'
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device | None) -> torch.dtype:
    """Return the named dtype; "auto" is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device is not None and device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def first_policy(config: RunConfig, corpus: Iterable[str]) -> Policy:
    """Load the configured model folder, or train a tokenizer on `corpus` and build a small Llama.

    Raises ConfigurationError for the device and CheckpointError for the folder.
    """
    device = choose_device(config.device)
    if config.model.path:
        policy = load_policy(Path(config.model.path), config=config.model, device=device)
        check_decoder(policy.model, name=config.model.path, max_tokens=config.environment.max_tokens)
        return policy
    tokenizer = train_tokenizer(corpus, vocabulary=config.model.vocabulary)
    chat = Chat(tokenizer)
    model = build_model(
        config.model,
        vocabulary=len(tokenizer),
        stop_token=chat.stop_token,
        max_tokens=config.environment.max_tokens,
        seed=config.seed,
    )
    return Policy(model=_on(device, model), tokenizer=tokenizer, chat=chat)


def build_model(
    config: ModelConfig, *, vocabulary: int, stop_token: int, max_tokens: int, seed: int
) -> PreTrainedModel:
    """Build a Llama with fresh weights; equal arguments give equal weights.

    vocabulary: rows of its head, which is tied to the embedding; max_tokens: most tokens of an episode.
    """
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
    """Load a causal language model from a local folder; nothing is fetched and nothing is unpickled.

    Raises CheckpointError.
    """
    if not (folder / "config.json").is_file():
        raise no_model(folder, "config.json")
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=choose_dtype(dtype, device), use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot load the model: {str(error).splitlines()[0]}") from error
    install(model)
    if device is not None and device.type != "cpu":
        return _on(device, model)
    _unmap(model)
    return model


@torch.no_grad()
def _unmap(model: PreTrainedModel) -> None:
    """Give the parameters memory of their own: they come mapped from the file, and would change with it.

    They would also lie wherever its header ends, and products with a single row round by alignment: the
    bits of training would hang on which file it was resumed from.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _on(device: torch.device, model: PreTrainedModel) -> PreTrainedModel:
    # transformers wraps `to` and loses its types.
    moved: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return moved


def load_policy(folder: Path, *, config: ModelConfig, device: torch.device) -> Policy:
    """Load model, tokenizer and chat format from a folder: a checkpoint of ours or any Hugging Face model.

    Raises CheckpointError.
    """
    model = load_model(folder, dtype=config.dtype, device=device)
    tokenizer = load_tokenizer(folder)
    # A model that was not built here has to be told how a call is written.
    chat = Chat(tokenizer, explain_calls=bool(config.path), calls=CALL_FORMATS[config.call_format])
    return Policy(model=model, tokenizer=tokenizer, chat=chat)


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


def random_state() -> dict[str, Tensor]:
    """Return the state of PyTorch's generators, by device: nothing of ours draws from them, a model may."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random_state(states: Mapping[str, Tensor]) -> None:
    """Set the generators to what `random_state` gave; those of devices that are not here are left out."""
    torch.set_rng_state(states["cpu"].clone())
    for device in range(torch.cuda.device_count()):
        if f"cuda:{device}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{device}"].clone(), device)


def copy_weights(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Overwrite the model's parameters in place; raises CheckpointError unless names and shapes match."""
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
    segments = PackedSegments(np.array([0, len(token_ids)]), device)
    hidden_TH = run_decoder(model, tokens_T, torch.arange(len(token_ids), device=device), segments)
    logprob_N, _, _ = linear_logprob(hidden_TH[:-1], head(model), tokens_T[1:])
    return tuple(float(value) for value in logprob_N)


@torch.no_grad()
def check_decoder(model: PreTrainedModel, *, name: str, max_tokens: int) -> None:
    """Refuse a model whose logits are more than its head times full causal attention's hidden states.

    Soft-capped, scaled or biased logits, attention sinks and sliding windows shorter than an episode
    would make the log-probabilities computed here those of another model. Raises CheckpointError.
    """
    window = getattr(model.config, "sliding_window", None)
    if window and window < max_tokens and getattr(model.config, "use_sliding_window", True):
        raise CheckpointError(
            f"{name}: attends to {window} tokens only, fewer than environment.max_tokens = {max_tokens}"
        )
    vocabulary = model.config.vocab_size
    tokens_T = torch.linspace(0, vocabulary - 1, CHECKED_TOKENS, device=head(model).device).long()
    ours = torch.tensor(canary_logprobs(model, tuple(tokens_T.tolist())))
    training = model.training
    model.eval().set_attn_implementation("eager")
    logits_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0, :-1].float()
    install(model)
    model.train(training)
    theirs = torch.log_softmax(logits_TV, dim=-1).gather(1, tokens_T[1:, None])[:, 0].cpu()
    if float((ours - theirs).abs().max()) > (0.01 if model.dtype == torch.float32 else 0.25):
        raise CheckpointError(
            f"{name}: this model's logits are not its head times its hidden states "
            "(soft-capped, scaled or biased?); choose a model of Llama's or Qwen's kind"
        )
