"""Every Triton kernel and tile, compiled ahead of time to sm_90 and read back as machine code.

Rules for any Triton version: no register lives in local memory, products run on tensor cores (HGMMA) except
in float32, operands come by TMA (UTMALDG) where the tile says so, nothing is float64. Registers and shared
memory are bounded by sass_contract.json, which holds what each minor version of Triton was measured to use.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from slipstream_kernels.dispatch import interpreted  # noqa: E402
from slipstream_kernels.statistics import PART_COLUMNS  # noqa: E402
from slipstream_kernels.triton import head_kernels, kl_kernels, linear_logprob  # noqa: E402
from slipstream_kernels.tuning import TILES  # noqa: E402

pytestmark = pytest.mark.skipif(interpreted(), reason="interpreted kernels are not compiled")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
VERSION = ".".join(triton.__version__.split(".")[:2])
BOUNDS: dict[str, dict[str, dict[str, int]]] = json.loads(
    Path(__file__).with_name("sass_contract.json").read_text()
)
SHARED_OF_A_MULTIPROCESSOR = 227 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel in one configuration."""

    kernel: str
    tile: str | None = None
    numbers: str = "bf16"
    logits: str | None = None
    settings: bool = True
    """Temperature by row, bias, softcap and every gradient; or none of them."""
    temperature: bool = False
    """Of these a temperature by row."""
    slow: bool = True

    @property
    def name(self) -> str:
        plain = None if self.settings else "temperature" if self.temperature else "plain"
        return "-".join(part for part in (self.kernel, self.tile, self.numbers, self.logits, plain) if part)


CASES = [
    Case(kernel="sweep_parts", tile="square", slow=False),
    Case(kernel="sweep_parts", tile="square", settings=False),
    Case(kernel="sweep_parts", tile="square", numbers="fp16"),
    Case(kernel="sweep_parts", tile="wide", settings=False, slow=False),
    Case(kernel="sweep_parts", tile="wide", settings=False, temperature=True),
    Case(kernel="sweep_parts", tile="wide", settings=False, numbers="fp16"),
    Case(kernel="sweep_parts", tile="wide", settings=False, logits="bf16", slow=False),
    Case(kernel="sweep_parts", tile="wide", settings=False, logits="bf16", temperature=True),
    Case(kernel="sweep_parts", tile="writing_float32", logits="fp32", settings=False),
    Case(kernel="sweep_parts", tile="square", logits="bf16", slow=False),
    Case(kernel="sweep_parts", tile="square", logits="bf16", settings=False),
    Case(kernel="sweep_parts", tile="writing_float32", logits="fp32"),
    Case(kernel="sweep_parts", tile="pointers"),
    Case(kernel="sweep_parts", tile="pointers_writing", logits="fp32"),
    Case(kernel="sweep_parts", tile="float32", numbers="fp32"),
    Case(kernel="sweep_parts", tile="float32", numbers="fp32", logits="fp32"),
    Case(kernel="fold_parts", slow=False),
    Case(kernel="replace_by_gradient", logits="bf16", slow=False),
    Case(kernel="replace_by_gradient", logits="bf16", settings=False),
    Case(kernel="kl_parts", tile="two_heads"),
    Case(kernel="kl_parts", tile="two_heads", settings=False),
    Case(kernel="kl_parts", tile="mixture"),
    Case(kernel="jsd_parts", tile="mixture"),
    Case(kernel="kl_parts", tile="two_heads_pointers"),
    Case(kernel="jsd_parts", tile="two_heads_pointers"),
    Case(kernel="kl_parts", tile="float32", numbers="fp32"),
    Case(kernel="jsd_parts", tile="float32", numbers="fp32"),
    Case(kernel="merge_kl_parts"),
    Case(kernel="sum_parts"),
    Case(kernel="kl_gradient", logits="fp32"),
    Case(kernel="kl_gradient", logits="fp32", settings=False),
]
INTEGERS = {"rows", "columns", "width", "width_p", "width_q", "parts"}
SCALARS = {"softcap", "beta", "log_beta", "log_rest"}
FLAGS = {"PER_ROW", "BIAS", "SOFTCAP", "LOGPROB", "ENTROPY", "LOGSUMEXP", "REVERSE"}


def signature(case: Case, names: list[str]) -> dict[str, str]:
    tile = TILES.get(case.tile or "")

    def kind(name: str) -> str:
        if name in INTEGERS:
            return "i32"
        if name in SCALARS:
            return "fp32"
        if name.isupper() or name in {"C", "V", "H"}:
            return "constexpr"
        if name == "labels_C":
            return "*i64"
        if name.startswith("logits") or name == "grad_CV":
            number = case.logits or "fp32"
            if tile and tile.descriptors and case.logits:
                return f"tensordesc<{number}[{tile.rows},{tile.columns_at_once}]>"
            return f"*{number}"
        if name.startswith(("hidden", "weight")) and tile:
            block = tile.rows if name.startswith("hidden") else tile.columns
            size = f"[{block},{tile.hidden}]"
            return f"tensordesc<{case.numbers}{size}>" if tile.descriptors else f"*{case.numbers}"
        return f"*{case.numbers}" if name == "bias_V" else "*fp32"

    return {name: kind(name) for name in names}


def compiled(case: Case) -> Any:
    module = kl_kernels if hasattr(kl_kernels, case.kernel) else head_kernels
    function = getattr(module, case.kernel)
    names = list(function.arg_names)
    types = signature(case, names)
    values: dict[str, Any] = dict.fromkeys(FLAGS, case.settings)
    values["PER_ROW"] |= case.temperature
    values |= {"FORWARD": False, "LOGITS": case.logits is not None, "PRECISION": "ieee", "PART": PART_COLUMNS}
    options = {"num_warps": 8 if "gradient" in case.kernel else 4, "enable_fp_fusion": True}
    if case.tile is None:
        values |= {"C": linear_logprob.MERGE_ROWS, "V": linear_logprob.GRADIENT_COLUMNS}
    else:
        tile = TILES[case.tile]
        values |= {
            "C": tile.rows,
            "V": tile.columns,
            "H": tile.hidden,
            "GROUP": tile.group,
            "DESCRIPTORS": tile.descriptors,
        }
        values |= {"HALVES": tile.halves}
        options |= {"num_warps": tile.warps, "num_stages": tile.stages}
    # Tensors begin at multiples of 16 bytes. So do rows; bfloat16 by pointers is for those that do not.
    even = [name for name in names if types[name][0] == "*"]
    even += [name for name in names if name.startswith("width") and case.numbers == "fp32"]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    constants = {name: values[name] for name in names if types[name] == "constexpr"}
    source = ASTSource(function, types, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def tool(*command: str) -> str:
    path, *arguments = command
    done = subprocess.run(
        [str(TOOLS / path), *arguments], capture_output=True, text=True, timeout=280, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * case.slow) for case in CASES]
)
def test_contract(case: Case, tmp_path: Path) -> None:
    kernel = compiled(case)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "--dump-resource-usage", str(cubin)))
    assert usage is not None
    sass = tool("cuobjdump", "--dump-sass", str(cubin))
    operations = set(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]+)", sass, re.M))
    families = {operation.split(".")[0] for operation in operations}
    assert "EXIT" in families, "the listing was not understood"
    assert not families & {"STL", "LDL"}, f"registers overflow into local memory, {usage[2]} bytes"
    assert ".f64" not in kernel.asm["ptx"]
    shared = kernel.metadata.shared
    assert shared <= SHARED_OF_A_MULTIPROCESSOR
    if case.tile is not None:
        tile = TILES[case.tile]
        assert "HMMA" not in families, "products run on the tensor cores of the generation before"
        shapes = {operation for operation in operations if operation.startswith("HGMMA.")}
        expected = f"HGMMA.64x{tile.columns}x16"
        assert case.numbers == "fp32" or any(shape.startswith(expected) for shape in shapes), shapes
        assert tile.descriptors == ("UTMALDG" in families)
    bound = BOUNDS.get(VERSION, {}).get(case.name)
    measured = {"registers": int(usage[1]), "shared_bytes": shared}
    assert bound is None or all(measured[key] <= bound[key] for key in bound), f"{measured} exceeds {bound}"
    assert bound is not None or VERSION not in BOUNDS, f"no bound for {case.name}; measured {measured}"


def test_every_tile_is_under_contract() -> None:
    assert {case.tile for case in CASES} - {None} == TILES.keys() - {"interpreted"}
    assert len({case.name for case in CASES}) == len(CASES)
