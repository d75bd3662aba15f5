"""Bugs planted into the kernels' sources, one at a time in a copy of the package: each must fail a test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
INTERPRETED = Path(__file__).parent / "interpreted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """A change of one place in one source, and the tests that must see it."""

    name: str
    before: str
    after: str
    tests: str
    """pytest's -k."""
    module: str = "head_kernels"


STATISTICS = "test_statistics_and_logits and 17-20-129"
BUGS = [
    Bug(
        name="off by one tile",
        before="last = min(part * PART + PART, columns)",
        after="last = min(part * PART + PART, columns - V + 1)",
        tests=STATISTICS,
    ),
    Bug(
        name="part one tile short",
        before="last = min(part * PART + PART, columns)",
        after="last = min(part * PART + PART - V, columns)",
        tests="test_statistics_and_logits and 33-32-1025",
    ),
    Bug(
        name="padded columns not masked",
        before="z_CV = tl.where(at_V[None, :] < columns, z_CV * _LOG2_E, _LEAST_PEAK)",
        after="z_CV = z_CV * _LOG2_E",
        tests="test_equal_logits",
    ),
    Bug(
        name="initial maximum 0",
        before="new_peak_C = tl.maximum(peak_C, tl.max(z_CV, 1))",
        after="new_peak_C = tl.maximum(tl.maximum(peak_C, 0.0), tl.max(z_CV, 1))",
        tests="test_equal_logits",
    ),
    Bug(
        name="natural logits for base 2",
        before="z_CV = tl.where(at_V[None, :] < columns, z_CV * _LOG2_E, _LEAST_PEAK)",
        after="z_CV = tl.where(at_V[None, :] < columns, z_CV, _LEAST_PEAK)",
        tests=STATISTICS,
    ),
    Bug(
        name="the right half where the left one is",
        before="right_CW, row, column + V // 2, label_C",
        after="right_CW, row, column, label_C",
        tests=STATISTICS,
    ),
    Bug(
        name="a last group as large as the others",
        before="blocks = min(row_blocks - group * GROUP, GROUP)",
        after="blocks = GROUP",
        tests="test_statistics_and_logits and 33-32-1025",
    ),
    Bug(
        name="base 2 read as natural in the gradient",
        before="tl.exp2(log_p_V * _LOG2_E)",
        after="tl.exp2(log_p_V)",
        tests="test_gradient_of_logits and True",
    ),
    Bug(
        name="temperature dropped in the gradient",
        before="tl.where(active, dz_V * temperature, 0.0)",
        after="tl.where(active, dz_V, 0.0)",
        tests="test_gradient_of_logits and True",
    ),
    Bug(
        name="softcap dropped in the gradient",
        before="dz_V *= 1.0 - squashed_V * squashed_V",
        after="dz_V *= 1.0",
        tests="test_gradient_of_logits and True",
    ),
    Bug(
        name="bfloat16 accumulation",
        # The interpreter cannot add in bfloat16: a running sum cut to its 8 bits is what it would hold.
        before="total_CV = tl.dot(hidden_CH, weight_VH.T, total_CV, input_precision=PRECISION)",
        after="total_CV = tl.dot(hidden_CH, weight_VH.T, total_CV, input_precision=PRECISION)\n        "
        "total_CV = (total_CV.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)",
        tests=STATISTICS,
    ),
    Bug(
        name="weighted sum not shifted to the new maximum",
        before="shrink_C * (weighted_C + shift_C * total_C)",
        after="shrink_C * weighted_C",
        tests="test_statistics_and_logits and 2048",
    ),
    Bug(
        name="labels of other shards taken for column 0",
        before="tl.where((label_C >= 0) & (label_C < columns), label_C, -1)",
        after="tl.where((label_C >= 0) & (label_C < columns), label_C, 0)",
        tests="test_labels_outside",
    ),
    Bug(
        name="divergence of the other direction",
        module="kl_kernels",
        before="cross_C += tl.sum(power_p_CV * (p_CV - q_CV), 1)",
        after="cross_C += tl.sum(power_q_CV * (p_CV - q_CV), 1)",
        tests="test_values_and_gradients and reverse and 17",
    ),
    Bug(
        name="mixture centred by the whole divergence",
        module="linear_kl",
        before="(1.0 - settings.beta) * other_C, mean_C, logprob_C",
        after="(1.0 - settings.beta) * other_C, other_C, logprob_C",
        tests="test_values_and_gradients and jsd and 17",
    ),
]


def run(sources: Path, bug: Bug) -> subprocess.CompletedProcess[str]:
    test = INTERPRETED / f"test_{'linear_logprob' if bug.module == 'head_kernels' else 'linear_kl'}.py"
    options = ["-x", "-p", "no:cacheprovider", "-o", f"pythonpath={sources}", "--tb=line"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", bug.tests, str(test)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=[bug.name.replace(" ", "-") for bug in BUGS])
def test_planted_bug_is_caught(bug: Bug, tmp_path: Path) -> None:
    copy = tmp_path / "slipstream_kernels"
    shutil.copytree(ROOT / "kernels/slipstream_kernels", copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = copy / "triton" / f"{bug.module}.py"
    text = source.read_text()
    assert text.count(bug.before) == 1, f"{bug.name}: the source has {text.count(bug.before)} such places"
    source.write_text(text.replace(bug.before, bug.after))
    done = run(tmp_path, bug)
    assert done.returncode == 1, done.stdout + done.stderr
    # Caught by what the kernel computes, not by a copy that cannot be run.
    assert "AssertionError" in done.stdout or "assert" in done.stdout, done.stdout
