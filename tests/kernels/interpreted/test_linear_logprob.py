"""The Triton kernels of the linear head, interpreted, against log_softmax in float64.

Dimensions: C rows, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream_kernels.statistics import LN_2, LOG2_E, finish, merge
from slipstream_kernels.testing import assert_matches_reference
from slipstream_kernels.triton.linear_logprob import head_parts, head_statistics, logit_gradient_, merge_parts
from slipstream_kernels.tuning import Tile

POINTERS = Tile(rows=16, columns=128, hidden=16, warps=4, stages=1, descriptors=False)
DESCRIPTORS = Tile(rows=16, columns=128, hidden=16, warps=4, stages=1, descriptors=True, group=2)
WIDE = Tile(rows=32, columns=256, hidden=32, warps=4, stages=1, descriptors=True, halves=True)


def case(rows: int, hidden: int, vocabulary: int, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "hidden_CH": torch.randn(rows, hidden),
        "weight_VH": torch.randn(vocabulary, hidden),
        "labels_C": torch.randint(0, vocabulary, (rows,)),
        "inverse_temperature": torch.tensor([0.7]),
        "bias_V": None,
        "softcap": None,
    }
    return arguments | changes


def preactivation(arguments: dict[str, Any]) -> Tensor:
    x_CV = arguments["hidden_CH"].double() @ arguments["weight_VH"].double().T
    return x_CV if arguments["bias_V"] is None else x_CV + arguments["bias_V"].double()


def logits(arguments: dict[str, Any], x_CV: Tensor) -> Tensor:
    softcap = arguments["softcap"]
    capped_CV = x_CV if softcap is None else softcap * torch.tanh(x_CV / softcap)
    return capped_CV * arguments["inverse_temperature"].double()[:, None]


def truth(arguments: dict[str, Any], z_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_p = z_CV.log_softmax(1)
    label = arguments["labels_C"].clamp(0, z_CV.shape[1] - 1)
    return log_p.gather(1, label[:, None])[:, 0], -(log_p.exp() * log_p).sum(1), z_CV.logsumexp(1)


def assert_statistics(arguments: dict[str, Any], statistics_4C: Tensor) -> None:
    z_CV = logits(arguments, preactivation(arguments))
    largest = float(z_CV.abs().max())
    for actual, expected in zip(finish(statistics_4C), truth(arguments, z_CV), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-6 * max(largest, 1.0))


@pytest.mark.parametrize("tile", [POINTERS, DESCRIPTORS, WIDE])
@pytest.mark.parametrize(
    ("rows", "hidden", "vocabulary"), [(1, 8, 1), (17, 20, 129), (33, 32, 1025), (16, 64, 2048)]
)
def test_statistics_and_logits(tile: Tile, rows: int, hidden: int, vocabulary: int) -> None:
    """Ragged rows and vocabulary, one past a block and one past a part; all settings at once and none."""
    plain = case(rows, hidden, vocabulary)
    full = plain | {
        "inverse_temperature": torch.rand(rows) + 0.5,
        "bias_V": torch.randn(vocabulary),
        "softcap": 4.0,
    }
    for arguments in (plain, full):
        # A descriptor writes whole rows of 16 bytes only.
        written = None if tile.descriptors and vocabulary % 4 else torch.full((rows, vocabulary), torch.nan)
        parts_K4C = head_parts(**arguments, logits_CV=written, tile=tile)
        assert_statistics(arguments, merge_parts(parts_K4C))
        assert_matches_reference(merge_parts(parts_K4C), merge(parts_K4C))
        if written is not None:
            expected = logits(arguments, preactivation(arguments))
            torch.testing.assert_close(written.double(), expected, rtol=1e-5, atol=1e-5)


def test_rounded_inputs_and_rounded_logits() -> None:
    """Statistics come from float32 sums, whatever the type of the inputs and of the logits written."""
    for dtype in (torch.bfloat16, torch.float16):
        arguments = case(5, 32, 300)
        arguments |= {name: arguments[name].to(dtype) for name in ("hidden_CH", "weight_VH")}
        written = torch.full((5, 300), torch.nan, dtype=torch.bfloat16)
        assert_statistics(arguments, head_statistics(**arguments, logits_CV=written))
        expected = logits(arguments, preactivation(arguments))
        assert_matches_reference(written, expected, dtype=torch.bfloat16)


@pytest.mark.parametrize("level", [-1e4, 0.0, 1e4])
def test_equal_logits(level: float) -> None:
    """Far below 0 padded columns, whose product is 0, would be the largest; far above, exp overflows."""
    vocabulary = 1030
    arguments = case(2, 1, vocabulary, hidden_CH=torch.ones(2, 1), inverse_temperature=torch.ones(1))
    arguments["weight_VH"] = torch.full((vocabulary, 1), level)
    logprob, entropy, logsumexp = finish(head_statistics(**arguments))
    uniform = torch.full((2,), float(vocabulary)).log()
    assert_matches_reference(entropy, uniform)
    torch.testing.assert_close(logsumexp, level + uniform, rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(logprob, -uniform, rtol=0.0, atol=2e-3 if level else 1e-6)


def test_one_logit_far_above() -> None:
    arguments = case(2, 1, 1100, hidden_CH=torch.ones(2, 1), inverse_temperature=torch.ones(1))
    arguments["weight_VH"] = torch.full((1100, 1), -1e4)
    arguments["weight_VH"][1050] = 1e4
    arguments["labels_C"] = torch.tensor([1050, 0])
    logprob, entropy, logsumexp = finish(head_statistics(**arguments))
    assert entropy.tolist() == [0.0, 0.0]
    torch.testing.assert_close(logprob, torch.tensor([0.0, -2e4]), rtol=2e-7, atol=0.0)
    torch.testing.assert_close(logsumexp, torch.full((2,), 1e4), rtol=2e-7, atol=0.0)


def test_labels_outside_are_not_here() -> None:
    arguments = case(5, 16, 200, labels_C=torch.tensor([-1, 200, 199, 1 << 40, -(1 << 33)]))
    label_C = head_statistics(**arguments)[3]
    z_CV = logits(arguments, preactivation(arguments))
    expected = torch.tensor([0.0, 0.0, float(z_CV[2, 199]) * LOG2_E, 0.0, 0.0])
    assert_matches_reference(label_C, expected)


def test_no_rows() -> None:
    arguments = case(0, 16, 200)
    written = torch.empty(0, 200)
    assert head_statistics(**arguments, logits_CV=written).shape == (4, 0)
    none = torch.empty(0)
    settings: dict[str, Any] = {"inverse_temperature": torch.ones(1), "softcap": None}
    given = dict.fromkeys(("grad_logprob_C", "grad_entropy_C", "grad_logsumexp_C"), none)
    logit_gradient_(written, arguments["labels_C"], logsumexp_C=none, entropy_C=none, **given, **settings)


def test_bits_depend_on_the_row_alone() -> None:
    """Run again, in chunks, permuted, or with the vocabulary in shards of whole parts: the same bits."""
    vocabulary = 2 * 1024 + 77
    arguments = case(37, 16, vocabulary, inverse_temperature=torch.rand(37) + 0.5)
    arguments["bias_V"] = torch.randn(vocabulary)
    # These products sum exactly: elsewise NumPy's sums depend on where in its block a row stands.
    arguments["hidden_CH"] = torch.randint(-8, 9, (37, 16)) / 8.0
    arguments["weight_VH"] = torch.randint(-8, 9, (vocabulary, 16)) / 8.0
    whole_4C = merge_parts(head_parts(**arguments, tile=WIDE))
    assert torch.equal(merge_parts(head_parts(**arguments, tile=WIDE)), whole_4C)

    def rows(index: Any) -> Tensor:
        chosen = {name: arguments[name][index] for name in ("hidden_CH", "labels_C", "inverse_temperature")}
        return merge_parts(head_parts(**(arguments | chosen), tile=WIDE))

    chunks = [rows(slice(start, start + 13)) for start in range(0, 37, 13)]
    assert torch.equal(torch.cat(chunks, 1), whole_4C)
    permutation = torch.randperm(37)
    assert torch.equal(rows(permutation), whole_4C[:, permutation])

    def shard(start: int, stop: int) -> Tensor:
        part = {name: arguments[name][start:stop] for name in ("weight_VH", "bias_V")}
        return head_parts(**(arguments | part | {"labels_C": arguments["labels_C"] - start}), tile=WIDE)

    for cut in (1024, 2048):
        left, right = shard(0, cut), shard(cut, vocabulary)
        assert torch.equal(merge_parts(torch.cat([left, right])), whole_4C)
        merged = merge_parts(torch.stack([merge_parts(left), merge_parts(right)]))
        # Sums are not associative: bits of the whole only if the right shard is one part.
        assert torch.equal(merged, whole_4C) or right.shape[0] > 1
        assert_matches_reference(merged, whole_4C)


SUBSETS = [("logprob",), ("entropy",), ("logsumexp",), ("logprob", "entropy", "logsumexp")]


@pytest.mark.parametrize("outputs", SUBSETS)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_gradient_of_logits(outputs: tuple[str, ...], softcap: float | None, per_row: bool) -> None:
    rows, vocabulary = 6, 301
    arguments = case(rows, 24, vocabulary, softcap=softcap, bias_V=torch.randn(vocabulary))
    if per_row:
        arguments["inverse_temperature"] = torch.rand(rows) + 0.5
    x_CV = preactivation(arguments).requires_grad_()
    results = truth(arguments, logits(arguments, x_CV))
    names = ("logprob", "entropy", "logsumexp")
    upstream = {name: torch.randn(rows) if name in outputs else None for name in names}
    for gradient in upstream.values():
        if gradient is not None:
            gradient[2] = 0.0
    total = sum(
        (upstream[name].double() * result).sum()  # type: ignore[union-attr]
        for name, result in zip(names, results, strict=True)
        if upstream[name] is not None
    )
    (expected,) = torch.autograd.grad(total, x_CV)  # type: ignore[arg-type]

    written = torch.full((rows, vocabulary), torch.nan)
    _, entropy, logsumexp = finish(head_statistics(**arguments, logits_CV=written))
    written[2, 5] = torch.nan
    logit_gradient_(
        written,
        arguments["labels_C"],
        logsumexp_C=logsumexp,
        entropy_C=entropy,
        inverse_temperature=arguments["inverse_temperature"],
        softcap=softcap,
        **{f"grad_{name}_C": gradient for name, gradient in upstream.items()},
    )
    assert_matches_reference(written, expected)
    assert written[2].tolist() == [0.0] * vocabulary


def test_gradient_of_rounded_logits_and_of_labels_elsewhere() -> None:
    arguments = case(3, 24, 5000, labels_C=torch.tensor([-1, 4999, 5000]))
    written = torch.full((3, 5000), torch.nan, dtype=torch.bfloat16)
    statistics_4C = head_statistics(**arguments, logits_CV=written)
    _, entropy, logsumexp = finish(statistics_4C)
    p_CV = (written.double() - logsumexp.double()[:, None]).exp()
    gradient = torch.tensor([1.0, -2.0, 3.0])
    logit_gradient_(
        written,
        arguments["labels_C"],
        logsumexp_C=logsumexp,
        entropy_C=entropy,
        grad_logprob_C=gradient,
        grad_entropy_C=None,
        grad_logsumexp_C=None,
        inverse_temperature=torch.tensor([0.7]),
        softcap=None,
    )
    expected = -gradient.double()[:, None] * p_CV
    expected[1, 4999] += -2.0
    torch.testing.assert_close(written.double(), 0.7 * expected, rtol=2**-8, atol=1e-12)
    assert statistics_4C[0, 0] * LN_2 <= logsumexp[0]
