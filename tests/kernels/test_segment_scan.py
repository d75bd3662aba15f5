"""The Triton scan compiles ahead of time; its numbers are compared in interpreted/, others beside gae."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# In a process of its own, so that no other test's environment decides whether Triton interprets.
COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from slipstream_kernels.triton import segment_scan as kernels

floats = dict.fromkeys(("decay", "value", "tile_decay", "tile_sum", "carry", "output"), "*fp32")
types = floats | {"begins": "*i8", "tokens": "i32", "tiles": "i32"}
sizes = {"TILE": kernels.TILE, "TILES": kernels.TILES_AT_ONCE}
for kernel in (kernels.reduce_tiles, kernels.carry_tiles, kernels.scan_tiles):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = {name: sizes[name] for name in kernel.arg_names if name in sizes}
    made = compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": kernels.WARPS},
    )
    assert ".f64" not in made.asm["ptx"], kernel
    with open(f"{sys.argv[1]}/{kernel.__name__}.cubin", "wb") as file:
        file.write(made.asm["cubin"])
"""


def cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@pytest.mark.skipif(not cuobjdump().exists(), reason="this Triton has no cuobjdump")
def test_triton_kernels_compile_without_spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    paths = [str(Path(__file__).parents[2] / "kernels"), *sys.path]
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in paths if path))
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    made = sorted(tmp_path.glob("*.cubin"))
    assert [path.stem for path in made] == ["carry_tiles", "reduce_tiles", "scan_tiles"]
    for path in made:
        usage = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", path],
            capture_output=True,
            text=True,
            timeout=280,
            check=True,
        ).stdout
        assert re.search(r"REG:\d+ STACK:0 .*LOCAL:0", usage), usage
