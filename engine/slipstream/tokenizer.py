"""Floor 3. The tokenizer of the small policy, trained on its environment's text, or a model folder's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from slipstream.call_formats import CLOSE, OPEN
from slipstream.errors import CheckpointError

CONTROL_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|pad|>")
CALL_TOKENS = (OPEN, CLOSE)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# A call's JSON punctuation is one piece, so that it merges into one token; words keep their *trailing*
# space, so that a name is the same token in a question and in a query; a lone symbol or a run of spaces
# is a piece of its own.
PIECES = r'\{"name": "\w+", "arguments": \{"\w+": "|"\}\}|\w+ ?|[^\w\s] ?|\s+'


def train_tokenizer(texts: Iterable[str], *, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`; any text can be encoded, what resembles `texts` is short.

    vocabulary: most tokens, the control tokens among them; those of a tool call are added to it.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(CONTROL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in CALL_TOKENS])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer with its chat template from a model folder.

    Raises CheckpointError when there is none, or no chat template or eos_token in it.
    """
    if not folder.is_dir():
        raise no_model(folder, "the folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot load the tokenizer: {str(error).splitlines()[0]}") from error
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{folder}: its tokenizer has no chat template; choose an instruction-tuned model"
        )
    if tokenizer.eos_token is None:
        raise CheckpointError(f"{folder}: its tokenizer has no eos_token, which must end each message")
    return tokenizer


def no_model(folder: Path, missing: str) -> CheckpointError:
    """Return the error of a folder that holds no model."""
    return CheckpointError(
        f"{folder}: no model here ({missing} is missing); give a local Hugging Face model folder, "
        "such as `slipstream fetch-model smollm2` makes"
    )
