"""Weight updates of a running vLLM server, from the announcement to the proof that it holds them.

    slipstream bench updates [-- --program PATH --rounds N --json FILE]

Each update is all that a run does: pause, receive, load, finish, clear the caches, go on, then checksum,
canary and a prompt that the prefix cache may keep. Two models: the quickstart's, 290,000 parameters in
float32, and one of SmolLM2-135M's shapes in bfloat16 (269 MB). `start_s` is the first update by a way, which
also connects both ends; `seconds` is the median of the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slipstream.chat import Chat
from slipstream.config import ModelConfig
from slipstream.environments.research import ResearchOptions, corpus
from slipstream.inference.vllm.backend import VllmBackend
from slipstream.inference.vllm.contract import VllmClient
from slipstream.inference.vllm.server import ServerOptions, VllmServer
from slipstream.inference.vllm.transports import transport_of
from slipstream.model import VOCABULARY, Policy, build_model, canary_logprobs, named_weights, write_policy
from slipstream.receiving import CANARY_TOLERANCE
from slipstream.tokenizer import train_tokenizer
from slipstream.types import Version, WeightUpdate
from slipstream.weights.filesystem import FilesystemPublisher
from slipstream_kernels import checksum64_named

WAYS: Final = ("gloo", "filesystem")
MAX_TOKENS: Final = 512
CANARY: Final = tuple(range(0, 320, 20))
WANTED: Final = {"quickstart": 0.3, "smollm2": 3.0}
"""Seconds, by gloo."""


def quickstart() -> tuple[Policy, str]:
    """Return the quickstart's policy with fresh weights, and its type of number."""
    tokenizer = train_tokenizer(corpus(ResearchOptions()), vocabulary=VOCABULARY)
    chat = Chat(tokenizer)
    model = build_model(
        ModelConfig(), vocabulary=len(tokenizer), stop_token=chat.stop_token, max_tokens=MAX_TOKENS, seed=0
    )
    return Policy(model=model.eval(), tokenizer=tokenizer, chat=chat), "float32"


def smollm2() -> tuple[Policy, str]:
    """Return a Llama of SmolLM2-135M's shapes with fresh weights."""
    tokenizer = train_tokenizer(corpus(ResearchOptions(), worlds=4), vocabulary=VOCABULARY)
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(sizes).to(torch.bfloat16).eval()  # type: ignore[no-untyped-call]
    return Policy(model=model, tokenizer=tokenizer, chat=Chat(tokenizer)), "bfloat16"


MODELS: Final = {"quickstart": quickstart, "smollm2": smollm2}


def update_of(policy: Policy, publisher: FilesystemPublisher, serial: int) -> WeightUpdate:
    """Change all weights a little and publish them."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    weights = named_weights(policy.model)
    folder = publisher.publish(dict(weights), serial=serial)
    version = Version(
        serial=serial, incarnation=0, step=serial, fork_step=0, checksum64=checksum64_named(weights)
    )
    return WeightUpdate(
        version=version,
        folder=folder,
        canary_tokens=CANARY,
        canary_logprobs=canary_logprobs(policy.model, CANARY),
    )


async def measured(name: str, program: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Start a server of a model and update it by each way in turn."""
    policy, dtype = MODELS[name]()
    write_policy(folder / "model", policy)
    options = ServerOptions(
        program=program,
        model=str(folder / "model"),
        dtype=dtype,
        max_model_len=MAX_TOKENS,
        max_num_seqs=16,
        eager=True,
    )
    server = VllmServer(options, folder=folder / "server")
    publisher = FilesystemPublisher(folder / "weights", keep=2)
    figures: dict[str, Any] = {"bytes": sum(w.nbytes for w in named_weights(policy.model).values())}
    serial = 0
    try:
        await server.start()
        async with VllmClient(server.url) as client:
            for way in WAYS:
                backend = VllmBackend(
                    client,
                    stop_token=policy.chat.stop_token,
                    transport=transport_of(way),
                    tolerance=CANARY_TOLERANCE[dtype],
                )
                await backend.attach(policy.tokenizer)
                seconds: list[float] = []
                for _ in range(rounds + 1):
                    serial += 1
                    update = update_of(policy, publisher, serial)
                    began = time.perf_counter()
                    await backend.load(update)
                    seconds.append(time.perf_counter() - began)
                figures[way] = {
                    "start_s": seconds[0],
                    "seconds": statistics.median(seconds[1:]),
                    "longest_s": max(seconds[1:]),
                }
    finally:
        server.stop()
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the figures and write them where asked."""
    parser = argparse.ArgumentParser(prog="updates.py", description="Weight updates of a vLLM server.")
    parser.add_argument("--program", default=".venv-vllm/bin/vllm", help="vLLM's command line")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file for the figures")
    chosen = parser.parse_args(arguments)
    figures: dict[str, Any] = {"wanted": WANTED}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "model").mkdir()
            found = asyncio.run(measured(name, chosen.program, chosen.rounds, Path(folder)))
        figures[name] = found
        for way in WAYS:
            row = found[way]
            sys.stdout.write(
                f"{name:<11}{way:<11}{found['bytes'] / 1e6:7.1f} MB  {row['seconds']:6.3f} s, at most "
                f"{row['longest_s']:6.3f} s, the first {row['start_s']:6.3f} s\n"
            )
            sys.stdout.flush()
    figures["load_per_core"] = os.getloadavg()[1] / (os.cpu_count() or 1)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
