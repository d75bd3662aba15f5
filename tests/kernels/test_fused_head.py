"""The heads in C++ against the reference in float64: values, gradients, chunks, silenced rows, dispatch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream_kernels import (
    BackendError,
    Objective,
    finish_metrics,
    head,
    linear_logprob,
    linear_policy_loss,
    native,
)
from slipstream_kernels.testing import assert_matches_reference

pytestmark = pytest.mark.skipif(not native.available(), reason=native.description())

COUNT, HIDDEN, VOCABULARY = 70, 12, 1030  # one part of 1,024 columns, and a ragged one
BOUNDS = torch.tensor([0, 25, 25, 41, 70])


def head_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = (COUNT, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)
    # Logits of about 0.7: the labels' log-probabilities stay near those that loss_case makes up.
    hidden, weight, bias = (0.45 * torch.randn(size) for size in sizes)
    hidden, weight, bias = (tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias))
    return hidden, weight, bias, torch.randint(0, VOCABULARY, (COUNT,))


def loss_case(objective: Objective) -> dict[str, Any]:
    torch.manual_seed(1)
    weight = torch.rand(COUNT)
    weight[::3] = 0.0
    weight[41:50] = 0.0
    return {
        "behavior_N": -6.7 - torch.rand(COUNT),
        "proximal_N": -6.7 - torch.rand(COUNT),
        "reference_N": -7 - torch.rand(COUNT),
        "advantage_N": torch.randn(COUNT),
        "weight_N": weight,
        "cu_seqlens": BOUNDS,
        "objective": objective,
    }


def doubled(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]


def small_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(head, "LEAST_ROWS", rows)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rows", [16, 1000])
def test_logprob_equals_the_reference(
    softcap: float | None, per_row: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, rows)
    tensors = head_case(torch.float32)
    exact = doubled(tensors)
    temperature = torch.rand(COUNT) + 0.5 if per_row else 0.7
    settings: dict[str, Any] = {"softcap": softcap, "inverse_temperature": temperature}
    got = linear_logprob(*tensors[:2], tensors[3], bias_V=tensors[2], backend="native", **settings)
    truth = linear_logprob(*exact[:2], exact[3], bias_V=exact[2], backend="reference", **settings)
    upstream = [torch.randn(COUNT) for _ in range(3)]
    gradients = torch.autograd.grad(got, tensors[:3], upstream)
    truths = torch.autograd.grad(truth, exact[:3], [one.double() for one in upstream])
    for actual, expected in zip([*got, *gradients], [*truth, *truths], strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < 1e-5


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_very_negative_logits_and_confident_rows(backend: str) -> None:
    weight = torch.full((8, 1), -1e4)
    weight[3] = 1e4
    labels = torch.tensor([3, 0])
    logprob, entropy, logsumexp = linear_logprob(torch.ones(2, 1), weight, labels, backend=backend)
    assert (logprob.tolist(), entropy.tolist(), logsumexp.tolist()) == ([0.0, -2e4], [0.0, 0.0], [1e4, 1e4])
    everywhere = linear_logprob(torch.ones(1, 1), torch.full((5, 1), -1e4), labels[1:], backend=backend)
    assert_matches_reference(torch.stack(everywhere)[:2, 0], torch.tensor([-1.6094379, 1.6094379]))


@pytest.mark.parametrize(
    "objective",
    [
        Objective(importance_cap=1.3, trust_low=0.5, trust_high=1.5),
        Objective(kl_coefficient=0.1, entropy_coefficient=0.05),
        Objective(aggregation="sequence_mean_token_mean", entropy_coefficient=0.01),  # type: ignore[arg-type]
        Objective(ratio_level="sequence", aggregation="sequence_mean_token_sum"),  # type: ignore[arg-type]
    ],
)
@pytest.mark.parametrize("rows", [9, 1000])
def test_policy_loss_equals_the_reference(
    objective: Objective, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, rows)
    tensors, inputs = head_case(torch.float32), loss_case(objective)
    exact = doubled(tensors)
    got = linear_policy_loss(*tensors[:2], tensors[3], bias_V=tensors[2], backend="native", **inputs)
    truth = linear_policy_loss(*exact[:2], exact[3], bias_V=exact[2], backend="reference", **inputs)
    assert_matches_reference(got.loss, truth.loss)
    assert_matches_reference(got.grad_logprob_N, truth.grad_logprob_N)
    # An upstream gradient that is not 1.
    gradients = torch.autograd.grad(3.0 * got.loss, tensors[:3])
    for actual, expected in zip(gradients, torch.autograd.grad(3.0 * truth.loss, exact[:3]), strict=True):
        assert (actual.double() - expected).norm() / expected.norm() < 1e-5
    finished, expected_metrics = finish_metrics(got.metrics), finish_metrics(truth.metrics)
    assert finished.keys() == expected_metrics.keys()
    for name, value in finished.items():
        assert_matches_reference(value, expected_metrics[name])


def test_a_row_alone_gives_the_gradient_it_gives_among_silenced_ones() -> None:
    """Rows that the clip silences leave the products, so the gradient of the others is theirs alone."""
    tensors = head_case(torch.float32)
    objective = Objective(clip_low=0.1, clip_high=0.1)
    inputs = loss_case(objective) | {"normalizer": 10.0, "weight_N": torch.ones(COUNT)}
    logprob, _, _ = linear_logprob(*tensors[:2], tensors[3])
    # Ratio 1 on every tenth row, far above the clip with a positive advantage elsewhere.
    proximal = logprob.detach() - 1.0
    proximal[::10] += 1.0
    inputs |= {"proximal_N": proximal, "behavior_N": proximal, "advantage_N": torch.ones(COUNT)}
    together = linear_policy_loss(*tensors[:2], tensors[3], **inputs)
    alone = {name: value[::10] if name.endswith("_N") else value for name, value in inputs.items()} | {
        "cu_seqlens": torch.tensor([0, 7])
    }
    fewer = linear_policy_loss(tensors[0][::10], tensors[1], tensors[3][::10], **alone)
    assert together.grad_logprob_N.count_nonzero() == 7
    for one, other in zip(
        torch.autograd.grad(together.loss, tensors[:2]),
        torch.autograd.grad(fewer.loss, tensors[:2]),
        strict=True,
    ):
        assert_matches_reference(one, other)


def test_bits_depend_on_neither_threads_nor_order_of_rows() -> None:
    """Small whole numbers: products are exact, so that only the order of the sums could show."""
    hidden = torch.randint(-3, 4, (64, 8)).float()
    weight, labels = torch.randint(-3, 4, (3000, 8)).float() / 4, torch.randint(0, 3000, (64,))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(torch.stack(linear_logprob(hidden, weight, labels, backend="native")))
    finally:
        torch.set_num_threads(before)
    order = torch.randperm(64)
    permuted = torch.stack(linear_logprob(hidden[order], weight, labels[order], backend="native"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(permuted, results[0][:, order])


def test_bfloat16_gradients_are_as_good_as_pytorchs() -> None:
    tensors = head_case(torch.bfloat16)
    objective, exact = Objective(), doubled(tensors)
    inputs = loss_case(objective) | {"reference_N": None}
    got = linear_policy_loss(*tensors[:2], tensors[3], **inputs)
    truth = linear_policy_loss(*exact[:2], exact[3], **inputs)
    logits = tensors[0] @ tensors[1].T
    logprob = logits.log_softmax(1).gather(1, tensors[3][:, None])[:, 0]
    plain = torch.autograd.grad(logprob, tensors[:2], truth.grad_logprob_N.to(torch.bfloat16))
    expected = torch.autograd.grad(truth.loss, exact[:2])
    for ours, theirs, right in zip(torch.autograd.grad(got.loss, tensors[:2]), plain, expected, strict=True):
        assert ours.dtype is torch.bfloat16
        assert (ours.double() - right).norm() <= 2 * (theirs.double() - right).norm()


def test_ops_pass_the_dispatchers_own_check() -> None:
    hidden, weight, bias, labels = head_case(torch.float32)
    plain = [t.detach() for t in (hidden, weight, bias)]
    head_arguments = (*plain, labels, torch.ones(1), None, "", "native")
    torch.library.opcheck(torch.ops.slipstream.linear_logprob.default, head_arguments)
    scored = [torch.randn(COUNT) for _ in range(5)]
    torch.library.opcheck(torch.ops.slipstream.linear_logprob_backward.default, (*head_arguments, *scored))
    inputs = loss_case(Objective())
    policy = [inputs[name] for name in ("behavior_N", "proximal_N", "reference_N", "advantage_N", "weight_N")]
    torch.library.opcheck(
        torch.ops.slipstream.linear_policy_loss.default,
        (*head_arguments, *policy, BOUNDS, torch.tensor(3.0), "{}", [True, True, False]),
    )


def test_compiled_into_one_graph_the_bits_are_the_same() -> None:
    hidden, weight, _, labels = head_case(torch.float32)
    inputs = loss_case(Objective(clip_high=0.28))

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        logprob, _, _ = linear_logprob(2 * hidden, weight, labels)
        return linear_policy_loss(2 * hidden, weight, labels, **inputs).loss + logprob.mean()

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    eager, traced = loss_of(hidden, weight), compiled(hidden, weight)
    assert torch.equal(eager, traced)
    for one, other in zip(
        torch.autograd.grad(eager, [hidden, weight]),
        torch.autograd.grad(traced, [hidden, weight]),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_float64_has_only_the_reference_and_shards_never_have_it() -> None:
    hidden, weight, _, labels = doubled(head_case(torch.float32))
    with pytest.raises(BackendError, match="linear_logprob: backend 'native' takes no float64"):
        linear_logprob(hidden, weight, labels, backend="native")


def test_no_gradient_is_computed_that_nobody_asks_for() -> None:
    hidden, weight, _, labels = head_case(torch.float32)
    inputs = loss_case(Objective())
    with torch.no_grad():
        assert not linear_policy_loss(hidden, weight, labels, **inputs).loss.requires_grad
    result = linear_policy_loss(hidden.detach(), weight, labels, **inputs)
    (gradient,) = torch.autograd.grad(result.loss, weight)
    expected = linear_policy_loss(hidden, weight, labels, **(inputs | {"objective": replace(Objective())}))
    assert torch.equal(gradient, torch.autograd.grad(expected.loss, weight)[0])


SHARDS = """
import sys, torch, torch.distributed as dist
from slipstream_kernels import Objective, linear_logprob, linear_policy_loss
rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 3)
dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
torch.manual_seed(0)
hidden, weight = torch.randint(-3, 4, (20, 6)).float(), torch.randint(-3, 4, (7000, 6)).float() / 4
labels, upstream = torch.randint(0, 7000, (20,)), torch.randn(3, 20)
cuts = 0, 2048, 5120, 7000
part = slice(cuts[rank], cuts[rank + 1])
inputs = dict(behavior_N=torch.full((20,), -8.0), advantage_N=torch.randn(20), weight_N=torch.ones(20),
              cu_seqlens=torch.tensor([0, 20]), objective=Objective(entropy_coefficient=0.1))
def all_of(h, w, **shard):
    scored = linear_logprob(h, w, labels, **shard)
    gradients = torch.autograd.grad(scored, [h, w], list(upstream))
    loss = linear_policy_loss(h, w, labels, **inputs, **shard).loss
    return scored, [*gradients, loss, *torch.autograd.grad(loss, [h, w])]
h, whole, mine = (t.clone().requires_grad_() for t in (hidden, weight, weight[part]))
expected, truths = all_of(h, whole)
scored, got = all_of(h, mine, vocab_start=part.start, group=dist.group.WORLD)
for one, other in zip(scored, expected):
    assert torch.equal(one, other), (one - other).abs().max()
for one, other in zip(got, truths):
    torch.testing.assert_close(one, other[part] if len(other.shape) and len(other) == 7000 else other)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_shards_of_the_vocabulary_equal_the_whole(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDS, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=280)
        assert rank.returncode == 0, said
