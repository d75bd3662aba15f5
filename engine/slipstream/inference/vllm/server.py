"""Floor 4. The life of one `vllm serve` process on this machine: started, ready, dead, stopped.

    loop        waits for                                released by
    start       the first sampled token                  an answer, the process's end, `start_s`
    stop        the process to end after SIGTERM         its end, or SIGKILL of the whole group after `stop_s`

vLLM has an environment of its own, so that nothing of this process's is on its path but the two packages
its workers import (extension.py); they are linked into a folder that holds nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import slipstream
import slipstream_kernels
from slipstream.deadlines import Deadline
from slipstream.errors import ConfigurationError, DeadlineError, InfrastructureError
from slipstream.flight_recorder import FLIGHT
from slipstream.inference.vllm.contract import VllmClient, VllmDeadlines
from slipstream.run_folder import read_json
from slipstream.supervisor import last_lines

EXTENSION: Final = "slipstream.inference.vllm.extension.SlipstreamWorker"
ENVIRONMENT: Final = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # The routes that control weights; only this machine reaches them, since the server listens on loopback.
    "VLLM_SERVER_DEV_MODE": "1",
}
BESIDE: Final = ".venv-vllm/bin/vllm"
"""Where `make test-vllm` puts vLLM; looked for when none is on the path."""
CPU_HEAD_SIZES: Final = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM 0.32 and 0.33."""
_POLL_S: Final = 0.5
_REAP_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a server is started.

    Example: ``ServerOptions(program=".venv-vllm/bin/vllm", model="runs/a/checkpoints/warmup", eager=True)``.
    """

    model: str
    """Folder of the model with its tokenizer."""
    program: str = "vllm"
    """Name on the path, or path, of vLLM's command line."""
    dtype: str = "bfloat16"
    """Or "float32"."""
    max_model_len: int = 4096
    """Most tokens of an episode."""
    max_num_seqs: int = 64
    """Requests that run at once."""
    eager: bool = False
    """Without compilation: faster to start; the only sensible way on a CPU."""
    cpu_cache_gib: int = 1
    """Keys and values on a CPU; a GPU takes `--gpu-memory-utilization` among `arguments`."""
    arguments: tuple[str, ...] = ()
    """More arguments of `vllm serve`."""
    devices: str = ""
    """CUDA_VISIBLE_DEVICES, if it is to differ from this process's."""
    start_s: float = 600.0
    """From the start to the first sampled token."""
    stop_s: float = 20.0
    """From SIGTERM to SIGKILL."""


class VllmServer:
    """One `vllm serve`, bound to 127.0.0.1 and to the life of this process.

    Example: ``server = VllmServer(options, folder=run / "vllm-0"); await server.start(); server.url``.
    """

    def __init__(self, options: ServerOptions, *, folder: Path) -> None:
        """Prepare to write the log, and the path of the extension, into `folder`."""
        self.options, self.folder = options, folder
        self.log = folder / "vllm.log"
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the group's leader while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def start(self) -> None:
        """Start the server and wait for its first token.

        Raises ConfigurationError when there is no such program, InfrastructureError with the log's last
        lines when it ends first, DeadlineError after `start_s`. It then does not run.
        """
        program = shutil.which(self.options.program) or (
            shutil.which(BESIDE) if self.options.program == "vllm" else None
        )
        if program is None:
            raise ConfigurationError(
                f'vllm: expected a program, got "{self.options.program}", which is not there; install '
                "vLLM into an environment of its own and give the path of its `vllm`"
            )
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._launch(self.command(program, port))
        FLIGHT.note(f"vllm started at {self.url}, log {self.log}")
        try:
            await self._until_ready()
        except BaseException:
            self.stop()
            raise

    def command(self, program: str, port: int) -> list[str]:
        """Return the command line."""
        options = self.options
        return [
            *(program, "serve", options.model, "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", options.dtype, "--max-model-len", str(options.max_model_len)),
            *("--max-num-seqs", str(options.max_num_seqs), "--enable-scale-out"),
            # Of the distribution that tokens are drawn from, not of the raw logits.
            *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
            *("--worker-extension-cls", EXTENSION),
            *("--weight-transfer-config", json.dumps({"backend": "slipstream"})),
            *(("--enforce-eager",) if options.eager else ()),
            *options.arguments,
        ]

    def check(self) -> None:
        """Raise InfrastructureError with the log's last lines unless the process runs."""
        if self.pid is None:
            code = None if self._process is None else self._process.returncode
            lines = last_lines(self.log, 8) if self.log.exists() else []
            raise InfrastructureError(
                "\n  ".join(
                    [f"vllm at {self.url} ended with exit code {code}; last lines of {self.log}:", *lines]
                )
            )

    def stop(self) -> None:
        """End the server and everything it has started; blocks for at most `stop_s` and a reap."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=self.options.stop_s)
        except subprocess.TimeoutExpired:
            FLIGHT.note(f"vllm at {self.url} ignored SIGTERM for {self.options.stop_s:g} s: killed")
        # Its engine and workers may outlive it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=_REAP_S)

    def _launch(self, command: Sequence[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONHOME"}
        environment |= {**ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": str(self.options.cpu_cache_gib)}
        if self.options.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.options.devices
        leash = [sys.executable, "-m", "slipstream.inference.vllm.leash", str(os.getpid())]
        # The leash needs this process's path, the server must not have it.
        path = ["/usr/bin/env", f"PYTHONPATH={self._linked_packages()}"]
        with self.log.open("ab") as file:
            self._process = subprocess.Popen(
                [*leash, *path, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _linked_packages(self) -> Path:
        """Return a folder in which the two packages are, and nothing else that this process can import."""
        folder = (self.folder / "path").absolute()
        folder.mkdir(exist_ok=True)
        for package in (slipstream, slipstream_kernels):
            link = folder / package.__name__
            link.unlink(missing_ok=True)
            link.symlink_to(Path(str(package.__file__)).parent, target_is_directory=True)
        return folder

    async def _until_ready(self) -> None:
        deadline = Deadline(self.options.start_s, "vllm starter", f"a first token of {self.url}")
        async with VllmClient(self.url, deadlines=VllmDeadlines(control_s=self.options.start_s)) as client:
            while True:
                self.check()
                deadline.check()
                try:
                    async with asyncio.timeout(deadline.remaining()):
                        return await client.check_health()
                except InfrastructureError:
                    await asyncio.sleep(_POLL_S)
                except TimeoutError as error:
                    raise deadline.error() from error
                except DeadlineError:
                    raise deadline.error() from None


def check_head_size(model: Path) -> None:
    """Raise ConfigurationError for a model whose attention vLLM does not have on a CPU."""
    said = read_json(model / "config.json")
    size = said.get("head_dim") or said.get("hidden_size", 0) // max(1, said.get("num_attention_heads", 1))
    if size not in CPU_HEAD_SIZES:
        raise ConfigurationError(
            f"model.heads: on a CPU vLLM has attention for heads of {', '.join(map(str, CPU_HEAD_SIZES))} "
            f"numbers, got {size} (model.hidden_size / model.heads)"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
