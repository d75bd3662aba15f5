"""Small policies that tests share: the tokenizer of the research recipe and tiny models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from slipstream.chat import Chat

    ModelMaker = Callable[..., PreTrainedModel]

# Imports stand inside: most tests of the engine need no torch.


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The research recipe's tokenizer, of fewer worlds."""
    from slipstream.environments.research import ResearchOptions, corpus
    from slipstream.tokenizer import train_tokenizer

    return train_tokenizer(corpus(ResearchOptions(), worlds=16), vocabulary=768)


@pytest.fixture(scope="session")
def chat(tokenizer: PreTrainedTokenizerFast) -> Chat:
    """Its chat format."""
    from slipstream.chat import Chat

    return Chat(tokenizer)


@pytest.fixture(scope="session")
def make_model() -> ModelMaker:
    """Return a maker of tiny Llamas; weights are wide, so that probabilities differ clearly."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from slipstream.attention import install

    def make(
        *,
        vocabulary: int = 37,
        hidden_size: int = 16,
        intermediate_size: int = 24,
        kv_heads: int = 2,
        seed: int = 0,
        installed: bool = True,
        max_tokens: int = 128,
    ) -> PreTrainedModel:
        sizes = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=max_tokens,
            tie_word_embeddings=True,
            initializer_range=1.6 * hidden_size**-0.5,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(sizes)
        if installed:
            install(model)
        return model

    return make
