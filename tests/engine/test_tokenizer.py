"""The tokenizer of the small policy, and what is said of folders without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from slipstream.chat import Chat
from slipstream.environments.research import ResearchOptions, corpus
from slipstream.errors import CheckpointError
from slipstream.tokenizer import load_tokenizer, train_tokenizer


def test_training_a_tokenizer_twice_gives_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(corpus(ResearchOptions(), worlds=16), vocabulary=768)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_load_tokenizer_names_what_is_missing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"no: no model here \(the folder is missing\); give a local"):
        load_tokenizer(tmp_path / "no")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>")
    bare.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no chat template"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert Chat(load_tokenizer(tmp_path)).message("Oslo").tolist() == Chat(tokenizer).message("Oslo").tolist()
