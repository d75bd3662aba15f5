"""The heads in Triton against the reference: through the public ops, forward and backward, in chunks."""

from __future__ import annotations

import pytest
import torch

from slipstream_kernels import Aggregation, Objective, head, linear_logprob, linear_policy_loss


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean"])
def test_heads_equal_the_reference(
    softcap: float | None, aggregation: Aggregation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(head, "LEAST_ROWS", 5)
    torch.manual_seed(0)
    hidden, weight, bias = (0.5 * torch.randn(size) for size in ((12, 8), (37, 8), (37,)))
    tensors = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    labels, upstream = torch.randint(0, 37, (12,)), torch.randn(3, 12)
    temperature, mask = torch.rand(12) + 0.5, torch.arange(12).remainder(3).ne(0).float()
    inputs = {
        "behavior_N": torch.full((12,), -3.6), "advantage_N": torch.randn(12), "weight_N": mask,
        "cu_seqlens": torch.tensor([0, 7, 12]),
        "objective": Objective(entropy_coefficient=0.1, aggregation=aggregation),
    }  # fmt: skip

    def run(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, backend: str) -> list[torch.Tensor]:
        settings = {"bias_V": b, "softcap": softcap, "backend": backend}
        scored = linear_logprob(h, w, labels, inverse_temperature=temperature, **settings)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(scored, [h, w, b], [u.to(h.dtype) for u in upstream])
        loss = linear_policy_loss(h, w, labels, **inputs, **settings).loss  # type: ignore[arg-type]
        return [*scored, *gradients, loss, *torch.autograd.grad(2.0 * loss, [h, w, b])]

    for got, expected in zip(run(*tensors, "triton"), run(*exact, "reference"), strict=True):
        assert (got.double() - expected).norm() / expected.norm() < 1e-5
