"""Floor 4. What runs inside a vLLM server's workers: takes weights, and says what it took.

vLLM loads it by `--worker-extension-cls slipstream.inference.vllm.extension.SlipstreamWorker`, before its
engine is made; importing it registers the weight transfer "slipstream". Nothing else imports this module.

    init      names the transport
    start     forgets what an unfinished update left
    update    takes all tensors and checks names, shapes and checksum; the model is as it was
    finish    loads them; only a failure in here leaves the model broken
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from slipstream.errors import CheckpointError
from slipstream.inference.vllm.identity import vocabulary_digest
from slipstream.inference.vllm.transports import Held, WeightReceiver, receiver_of
from slipstream.inference.vllm.transports.offers import hexadecimal

HEAD = "lm_head.weight"


class CpuGenerator(torch.Generator):
    """A generator whose offset may be moved, which does nothing.

    Of a prefill that it does in parts vLLM draws a token at each, throws it away, and moves the request's
    generator back. A CPU's has no offset: the engine would die of the first seeded request that does not fit
    into one step, such as many that go on after an update. Here only the same numbers are not drawn again.
    """

    def get_offset(self) -> int:
        """Return some offset that can be moved back."""
        return 1 << 20

    def set_offset(self, offset: int) -> torch.Generator:
        """Do nothing."""
        return self


if not torch.cuda.is_available():
    torch.Generator = CpuGenerator  # type: ignore[misc]


@dataclass
class SlipstreamInit(WeightTransferInitInfo):  # type: ignore[misc]
    """How weights will come."""

    transport: str = "filesystem"


@dataclass
class SlipstreamUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One offer of that transport."""

    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """Weights taken from a transport."""

    serial: int
    checksum64: int
    """Computed from the tensors as they arrived."""
    tensors: dict[str, torch.Tensor]


class SlipstreamTransfer(WeightTransferEngine):  # type: ignore[misc]
    """The weight transfer that `--weight-transfer-config '{"backend": "slipstream"}'` chooses."""

    init_info_cls: ClassVar[type] = SlipstreamInit
    update_info_cls: ClassVar[type] = SlipstreamUpdate
    supports_draft_weight_update = False

    _receiver: WeightReceiver | None = None
    _transport = ""
    _staged: Received | None = None
    serial = -1
    """Of the weights loaded last, or -1."""
    checksum64 = 0

    def init_transfer_engine(self, init_info: SlipstreamInit) -> None:
        """Make ready for the transport; what a transport of the same name held stays held."""
        if self._transport != init_info.transport:
            self._receiver = receiver_of(init_info.transport, device=str(self.device))
            self._transport = init_info.transport

    def start_weight_update(self) -> None:
        """Forget what an unfinished update left."""
        self._staged = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take one update; the base class would synchronise an accelerator, which a CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SlipstreamUpdate) -> None:
        """Take all tensors and check them; raises CheckpointError, InfrastructureError or DeadlineError."""
        if self._receiver is None:
            raise CheckpointError("update_weights: expected a transport to be agreed on before, got none")
        parallel = self.vllm_config.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        tensors, checksum = self._receiver.take(update_info.info, worker=worker)
        self._check(tensors)
        self._staged = Received(serial=update_info.info["serial"], checksum64=checksum, tensors=tensors)

    def finish_weight_update(self) -> None:
        """Load what was taken; raises CheckpointError when that is nothing, or not the whole model."""
        received, self._staged = self._staged, None
        if received is None:
            raise CheckpointError("finish_weight_update: expected weights handed over before, got none")
        self.serial = -1
        with torch.no_grad():
            initialize_layerwise_reload(self.model)
            self.model.load_weights(iter(received.tensors.items()))
            finalize_layerwise_reload(self.model, self.model_config)
            self._tie_head()
        self.serial, self.checksum64 = received.serial, received.checksum64

    @property
    def held(self) -> Held | None:
        """The weights whose tensors are kept to apply changes to, or None."""
        return self._receiver.held if self._receiver is not None else None

    def abandon(self) -> None:
        """Forget an update that was started and will not be finished."""
        self._staged = None

    def shutdown(self) -> None:
        """Hold nothing."""
        self._staged = self._receiver = None
        self._transport = ""

    def _check(self, tensors: dict[str, torch.Tensor]) -> None:
        """Compare names and shapes with those of the files the model was started from."""
        expected = _shapes_in(Path(self.model_config.model))
        if not expected:
            return
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if self._is_tied():
            expected.pop(HEAD, None)
            got.pop(HEAD, None)
        odd = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        if odd:
            raise CheckpointError(
                f"weights do not fit the model: {odd[0]} is {got.get(odd[0], 'missing')}, "
                f"expected {expected.get(odd[0], 'none of that name')}"
            )

    def _is_tied(self) -> bool:
        return bool(getattr(self.model_config.hf_text_config, "tie_word_embeddings", False))

    def _tie_head(self) -> None:
        """Give a tied head the new embedding.

        Reloading leaves it with the packed copy that a CPU makes of it: the head would stay that of the
        first weights, with nothing but a warning in the log.
        """
        if not self._is_tied():
            return
        head, body = getattr(self.model, "lm_head", None), getattr(self.model, "model", None)
        embedding = getattr(body, "embed_tokens", None)
        if head is None or embedding is None:
            raise CheckpointError(
                f"{type(self.model).__name__}: expected lm_head and model.embed_tokens in a model of tied "
                "embeddings, got others; export it untied (tie_word_embeddings = false)"
            )
        if head is not embedding:
            head.weight = embedding.weight
            head.quant_method.process_weights_after_loading(head)


class SlipstreamWorker:
    """Methods that every worker gets, for `/collective_rpc`."""

    weight_transfer_engine: SlipstreamTransfer
    vllm_config: Any
    _weight_update_active: bool

    def slipstream_proof(self) -> dict[str, Any]:
        """Return the serial loaded last and the checksum of its tensors as they arrived."""
        engine = self.weight_transfer_engine
        return {"serial": engine.serial, "checksum64": hexadecimal(engine.checksum64)}

    def slipstream_held(self) -> dict[str, Any] | None:
        """Return the serial and checksum of the weights that a delta may be made from, or None."""
        held = self.weight_transfer_engine.held
        if held is None:
            return None
        return {"serial": held.serial, "checksum64": hexadecimal(held.checksum64)}

    def slipstream_abandon(self) -> None:
        """Let another update begin after one that broke off."""
        self.weight_transfer_engine.abandon()
        self._weight_update_active = False

    def slipstream_identity(self) -> dict[str, Any]:
        """Return what tells whether this server speaks the run's tokens, and the size of a cached block."""
        from transformers import AutoTokenizer

        model = self.vllm_config.model_config
        tokenizer = AutoTokenizer.from_pretrained(model.tokenizer, local_files_only=True)
        return {
            "vocabulary": vocabulary_digest(tokenizer.get_vocab()),
            "rows": model.get_vocab_size(),
            "block_tokens": self.vllm_config.cache_config.block_size,
            "logprobs_mode": str(model.logprobs_mode),
        }


def _shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors in a folder's safetensors files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


WeightTransferEngineFactory.register_engine("slipstream", SlipstreamTransfer)
