"""Floor 4. Inference inside the actor process: continuous batching with a key-value cache, on CPU or GPU.

    generate() ──▶ waiting ──▶ a free row ──▶ [ one pass: all rows' new tokens, packed ] ──▶ draw
       ▲   waits for: a free row, then its message      released by: stop token or length limit │
       └──────────────────────────── completion ◀───────────────────────────────────────────────┘

New rollouts join at the next pass. New weights are taken between two passes; every row's cached length
then falls to zero, so that its keys and values are rebuilt from its tokens before its next token is
drawn.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from slipstream.attention import Int64Array, run_decoder
from slipstream.errors import NumericsError
from slipstream.flight_recorder import FLIGHT
from slipstream.inference.cache import SlotCache
from slipstream.inference.sampling import draw, uniforms
from slipstream.interfaces import WeightSubscriber
from slipstream.model import canary_logprobs, copy_weights, head, named_weights
from slipstream.packing import prefix_order
from slipstream.types import Completion, Int32Array, Sampling, WeightProof, WeightUpdate
from slipstream_kernels import checksum64_named

# Matrix products of 1 to 3 rows round otherwise than those of more rows (measured with MKL), and then
# an episode's bits would depend on who is sampled beside it.
LEAST_ROWS = 8

# Tokens of one forward pass; longer rebuilds are spread over several passes so that memory stays bounded.
PASS_TOKENS = 8192

# Of the event loop between two passes: in the first tools end, in the second those go on that called them, in
# the third those that waited for the same result. None of them then sits a pass out, which is in the fourth.
_ROUNDS = 4


@dataclass(slots=True)
class _Request:
    """One message being sampled in one row."""

    sampling: Sampling
    future: asyncio.Future[Completion]


class EmbeddedBackend:
    """An `InferenceBackend` over a Hugging Face model in this process.

    Example: ``EmbeddedBackend(model, stop_token=4, rows=128, max_tokens=256, subscriber=subscriber)``;
    start it by keeping ``asyncio.create_task(backend.run())``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_token: int,
        rows: int,
        max_tokens: int,
        subscriber: WeightSubscriber | None = None,
        serial: int = 0,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._device = head(model).device
        self._subscriber = subscriber
        self._stop_token = stop_token
        self._max_tokens = max_tokens
        self._cache = SlotCache(model, rows=rows, max_tokens=max_tokens)
        self._tokens = np.zeros((rows, max_tokens), dtype=np.int32)
        self._logprobs = np.zeros((rows, max_tokens), dtype=np.float32)
        self._versions = np.full((rows, max_tokens), -1, dtype=np.int32)
        self._length = np.zeros(rows, dtype=np.int32)
        self._cached = np.zeros(rows, dtype=np.int32)
        self._start = np.zeros(rows, dtype=np.int32)
        self._limit = np.zeros(rows, dtype=np.int32)
        self._active = np.zeros(rows, dtype=bool)
        self._keys = np.zeros(rows, dtype=np.uint64)
        self._temperature = np.ones(rows, dtype=np.float32)
        self._top_p = np.ones(rows, dtype=np.float32)
        self._requests: dict[int, _Request] = {}
        self._row_of: dict[int, int] = {}
        self._free = list(reversed(range(rows)))
        self._room = asyncio.Semaphore(rows)
        self._work = asyncio.Event()
        self.serial = serial
        self.tokens_generated = 0
        self.tokens_prefilled = 0

    @property
    def rows(self) -> int:
        """Rollouts that can be live at once."""
        return len(self._length)

    async def generate(self, token_ids: Int32Array, sampling: Sampling, *, rollout_id: int) -> Completion:
        """Sample one message after the [T] tokens of a rollout; those of its last call are cached.

        Raises ValueError when the tokens leave no room for another.
        """
        if not 0 < len(token_ids) < self._max_tokens:
            raise ValueError(f"generate: expected 1 to {self._max_tokens - 1} tokens, got {len(token_ids)}")
        row = self._row_of.get(rollout_id)
        if row is None:
            row = await self._take_row(rollout_id)
        self._feed(row, token_ids)
        request = _Request(
            sampling=sampling,
            future=asyncio.get_running_loop().create_future(),
        )
        self._requests[row] = request
        self._start[row] = len(token_ids)
        self._limit[row] = min(len(token_ids) + sampling.max_tokens, self._max_tokens)
        self._temperature[row], self._top_p[row] = sampling.temperature, sampling.top_p
        self._active[row] = True
        self._work.set()
        try:
            return await request.future
        finally:
            # Only a cancelled call leaves its request here: nobody waits for its tokens any more.
            if self._requests.get(row) is request:
                self._retire(row)

    def release(self, rollout_id: int) -> None:
        """Give the rollout's row back; a message still being sampled is cancelled."""
        row = self._row_of.pop(rollout_id, None)
        if row is not None:
            if row in self._requests:
                self._retire(row).future.cancel()
            self._free.append(row)
            # The lowest row is taken first, so that a thin batch stays together.
            self._free.sort(reverse=True)
            self._room.release()

    async def load(self, update: WeightUpdate) -> WeightProof:
        """Copy published weights in and prove it; called between two passes, since both run on one thread.

        Raises CheckpointError when they do not fit, RuntimeError without a subscriber.
        """
        if self._subscriber is None:
            raise RuntimeError("this backend was built without a weight subscriber")
        with torch.no_grad():
            copy_weights(self._model, self._subscriber.fetch(update))
        self.serial = update.version.serial
        self._cached[:] = 0
        return self.prove(update.canary_tokens)

    def prove(self, canary_tokens: tuple[int, ...]) -> WeightProof:
        """Compute the proof of the weights held now, from the model's own memory."""
        arrays = {name: tensor.cpu() for name, tensor in named_weights(self._model).items()}
        return WeightProof(
            serial=self.serial,
            checksum64=checksum64_named(arrays),
            canary_logprobs=canary_logprobs(self._model, canary_tokens),
        )

    def announce(self, update: WeightUpdate) -> None:
        """Do nothing: this holds what it has loaded."""

    async def close(self) -> None:
        """Do nothing: there is no more to it than this object."""

    async def run(self) -> None:
        """Serve until cancelled; an idle backend sleeps until the next `generate`."""
        while True:
            if not self._active.any():
                self._work.clear()
                await self._work.wait()
            self._step()
            for _ in range(_ROUNDS):
                await asyncio.sleep(0)

    @torch.no_grad()
    def _step(self) -> None:
        """Feed the new tokens of active rows; draw a token in each row that is then up to date."""
        FLIGHT.beat()
        rows, spans, shared = self._chosen_rows()
        decodes = (spans == 1) & (self._length[rows] > self._start[rows])
        feed = self._cache.plan(rows, self._cached[rows], spans, decodes=decodes, shared=shared)
        tokens_T = torch.from_numpy(self._tokens[feed.rows, feed.positions]).to(self._device)
        positions_T = torch.from_numpy(feed.positions).to(self._device)
        hidden_TH = run_decoder(self._model, _thick(tokens_T), _thick(positions_T), self._cache)
        self._cached[rows] += spans
        ready = self._cached[rows] == self._length[rows]
        self.tokens_prefilled += len(feed.rows) - int(decodes.sum())
        if ready.any():
            self._draw(rows[ready], hidden_TH[torch.from_numpy(feed.last[ready])])

    def _chosen_rows(self) -> tuple[Int32Array, Int32Array, Int64Array]:
        """Return the rows of the next pass, the tokens each feeds, and how many of them the row before feeds.

        Rows fed from their beginning stand together, so that what they have in common is fed once: the
        prompts of a group, and most of what is rebuilt after new weights.
        """
        rows = np.flatnonzero(self._active).astype(np.int32)
        spans = self._length[rows] - self._cached[rows]
        fits = max(int(np.searchsorted(np.cumsum(spans), PASS_TOKENS, side="right")), 1)
        rows, spans = rows[:fits], spans[:fits]
        shared = np.zeros(len(rows), dtype=np.int64)
        fresh = self._cached[rows] == 0
        if fresh.any():
            order, common = prefix_order(
                [self._tokens[r, :n] for r, n in zip(rows[fresh], spans[fresh], strict=True)]
            )
            for values in (rows, spans):
                values[:] = np.concatenate([values[~fresh], values[fresh][order]])
            shared[len(rows) - len(common) :] = common
        return rows, spans, shared

    def _draw(self, rows: Int32Array, hidden_RH: torch.Tensor) -> None:
        """Draw the next token of `rows` and finish those that stopped or reached their limit."""
        logits_RV = (_thick(hidden_RH) @ head(self._model).T)[: len(rows)]
        lengths = self._length[rows]
        uniform = torch.from_numpy(uniforms(self._keys[rows], lengths.astype(np.uint64))).to(self._device)
        top_p = self._top_p[rows]
        token_R, logprob_R = draw(
            logits_RV,
            temperature_R=torch.from_numpy(self._temperature[rows]).to(self._device),
            top_p_R=torch.from_numpy(top_p).to(self._device) if (top_p < 1).any() else None,
            uniform_R=uniform,
        )
        tokens, logprobs = token_R.cpu().numpy().astype(np.int32), logprob_R.cpu().numpy()
        if not np.isfinite(logprobs).all():
            raise NumericsError(f"weights of serial {self.serial} give log-probabilities that are not finite")
        self._tokens[rows, lengths] = tokens
        self._logprobs[rows, lengths] = logprobs
        self._versions[rows, lengths] = self.serial
        self._length[rows] += 1
        self.tokens_generated += len(rows)
        done = (tokens == self._stop_token) | (self._length[rows] >= self._limit[rows])
        for row, token in zip(rows[done].tolist(), tokens[done].tolist(), strict=True):
            self._finish(row, stopped=token == self._stop_token)

    def _finish(self, row: int, *, stopped: bool) -> None:
        request = self._retire(row)
        span = slice(int(self._start[row]), int(self._length[row]))
        if not request.future.done():
            request.future.set_result(
                Completion(
                    token_ids=self._tokens[row, span].copy(),
                    logprobs=self._logprobs[row, span].copy(),
                    versions=self._versions[row, span].copy(),
                    stopped=stopped,
                )
            )

    def _retire(self, row: int) -> _Request:
        """Take a row out of the passes; its cache stays until its rollout is released."""
        self._active[row] = False
        return self._requests.pop(row)

    def _feed(self, row: int, token_ids: Int32Array) -> None:
        """Set a row's tokens; what differs from those it holds is no longer cached."""
        shared = min(int(self._length[row]), len(token_ids))
        differs = np.flatnonzero(self._tokens[row, :shared] != token_ids[:shared])
        shared = int(differs[0]) if differs.size else shared
        self._tokens[row, shared : len(token_ids)] = token_ids[shared:]
        self._length[row] = len(token_ids)
        # The last token is always fed: the next one is drawn from its hidden state.
        self._cached[row] = min(int(self._cached[row]), shared, len(token_ids) - 1)
        if not self._cached[row]:
            self._borrow(row, token_ids)

    def _borrow(self, row: int, token_ids: Int32Array) -> None:
        """Copy what is cached of the same beginning in another row, which may have been released since."""
        count = len(token_ids) - 1
        differs = self._tokens[:, :count] != token_ids[:count]
        common = (
            np.where(differs.any(axis=1), differs.argmax(axis=1), count) if count else np.zeros(self.rows)
        )
        held = np.minimum(common, self._cached)
        lender = int(held.argmax())
        if held[lender]:
            self._cache.copy(lender, row, int(held[lender]))
            self._cached[row] = held[lender]

    async def _take_row(self, rollout_id: int) -> int:
        await self._room.acquire()
        row = self._free.pop()
        self._row_of[rollout_id] = row
        self._keys[row] = rollout_id
        self._length[row] = self._cached[row] = 0
        return row


def _thick(values_T: torch.Tensor) -> torch.Tensor:
    """Return the values with zeros appended up to LEAST_ROWS rows."""
    missing = LEAST_ROWS - len(values_T)
    if missing <= 0:
        return values_T
    return torch.cat([values_T, values_T.new_zeros(missing, *values_T.shape[1:])])
