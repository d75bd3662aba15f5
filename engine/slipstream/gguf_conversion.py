"""Floor 4. A GGUF file turned into a Hugging Face folder, offline: weights, tokenizer, chat template.

transformers reads the weights and the vocabulary. Two things it leaves out are mended here: how text is
split before its pieces are merged, and a chat template that shows tools.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Final

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from slipstream import checkpoint
from slipstream.errors import CheckpointError
from slipstream.extras import require
from slipstream.model import WEIGHTS, named_weights

PACKAGES: Final = ("gguf", "accelerate")
"""What transformers needs to read such a file: the extra `models`."""
_CALL: Final = '<tool_call>{"name": "TOOL", "arguments": {"ARGUMENT": "VALUE"}}</tool_call>'
TOOL_TEMPLATE: Final = (
    "{%- macro listed() -%}"
    "Tools: {% for tool in tools %}{{ tool.function.name }}("
    "{{ tool.function.parameters.properties | join(', ') }}){{ '' if loop.last else ', ' }}{% endfor %}"
    "{{ '\\n' }}Each message calls exactly one tool, and is only this: " + _CALL + "{%- endmacro -%}"
    "{%- if messages[0].role != 'system' -%}<|im_start|>system\n"
    "{% if tools %}{{ listed() }}{% else %}"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face{% endif %}<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% if loop.first and message.role == 'system' and tools %}"
    "{{ '\\n' if message.content }}{{ listed() }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": '
    "{% if call.function.arguments is string %}{{ call.function.arguments }}"
    "{% else %}{{ call.function.arguments | tojson }}{% endif %}}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's own, which has no tools, with tools and calls as `slipstream.chat` and its environments write
them: an agent that renders its messages with this template speaks as the policy was trained."""


def check_packages() -> None:
    """Raise ConfigurationError when what converts a file is not installed."""
    require("models", *PACKAGES, by="converting a GGUF file")


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file into an empty folder, weights in bfloat16, tied ones once.

    Raises ConfigurationError without its packages, CheckpointError for a file it cannot convert,
    StorageError for a full disk.
    """
    check_packages()
    transformers_logging.disable_progress_bar()
    tokenizer = _tokenizer(gguf)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    config = model.config
    # The weights were packed to be read; nothing of that is left.
    del config.quantization_config
    config._name_or_path = ""
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in named_weights(model).items()}
    checkpoint.write_tensors(folder / WEIGHTS, weights)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """Return the file's tokenizer, splitting text as its model was trained; raises CheckpointError."""
    field = importlib.import_module("gguf").GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    name = field.contents() if field else "none"
    if name != "smollm":
        raise CheckpointError(
            f"{gguf.name}: expected a tokenizer that splits text in the way smollm, got {name}: "
            "text would give other tokens than in training"
        )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer
