"""The house holds: floors, no cycles, sizes, no unpickling, light imports, sorted public names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "slipstream": ROOT / "engine/slipstream",
    "slipstream_kernels": ROOT / "kernels/slipstream_kernels",
}

# Fixed by design; every other module states its floor in the first words of its docstring.
FLOORS = {
    0: "errors types",
    1: "config interfaces wire metrics deadlines",
    2: "objective packing staleness rewards curriculum",
    3: "spool ingest checkpoint model",
    4: "environments tools inference transport weights training",
    5: "actor learner hub evaluate warmup",
    6: "launch",
    7: "cli",
}
FLOOR_OF = {f"slipstream.{name}": floor for floor, names in FLOORS.items() for name in names.split()}
ROLES = {f"slipstream.{name}" for name in FLOORS[5].split()}
MAX_FILE_LINES = 400
AIM_FILE_LINES = 300
MAX_FUNCTION_LINES = {"slipstream": 80, "slipstream_kernels": 120}
FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "recv_pyobj", "send_pyobj", "torch.load", "torch.save"}
HEAVY = {"matplotlib", "pynvml", "rich", "tokenizers", "torch", "transformers", "triton", "vllm", "zmq"}


def module_name(path: Path) -> str:
    root = next(root for root in PACKAGES.values() if path.is_relative_to(root))
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for root in PACKAGES.values() for path in sorted(root.rglob("*.py"))}
ENGINE = [name for name in SOURCES if name.split(".")[0] == "slipstream"]


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text())


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk all nodes except those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for alternative in child.orelse:  # type: ignore[attr-defined]
                yield from runtime_nodes(alternative)
            continue
        yield child
        yield from runtime_nodes(child)


def imported_names(name: str, *, types_too: bool) -> Iterator[str]:
    """All that a module imports, anywhere in it, as absolute dotted names."""
    nodes = ast.walk(tree_of(name)) if types_too else runtime_nodes(tree_of(name))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import; write it absolutely"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(name: str, *, types_too: bool) -> set[str]:
    """Our own modules among them: `from a.b import c` means a.b.c if that is a module, else a.b."""
    found = set()
    for target in imported_names(name, types_too=types_too):
        module = target if target in SOURCES else target.rpartition(".")[0]
        found |= {module} & SOURCES.keys()
    return found - {name}


def fixed_floor(name: str) -> int | None:
    """The floor that the design gives a module or the package it lies in."""
    return FLOOR_OF.get(".".join(name.split(".")[:2]))


def stated_floor(name: str) -> int | None:
    words = re.match(r"Floor (\d)\. ", ast.get_docstring(tree_of(name)) or "")
    return int(words[1]) if words else None


@pytest.mark.parametrize("name", SOURCES)
def test_docstring_states_the_floor(name: str) -> None:
    stated = stated_floor(name)
    assert stated is not None, f"{SOURCES[name]}: the docstring must start with 'Floor n. '"
    fixed = fixed_floor(name)
    assert fixed is None or stated == fixed, f"{name}: states floor {stated}, the design says {fixed}"


@pytest.mark.parametrize("name", SOURCES)
def test_imports_run_downwards(name: str) -> None:
    """Sideways too, between parts of one floor, except between roles."""
    if name in PACKAGES:
        # Public names are collected at the top, whatever floor they come from, and only for type checkers.
        assert not {target for target in imported_modules(name, types_too=False) if target in SOURCES}
        return
    own = stated_floor(name)
    assert own is not None
    for target in imported_modules(name, types_too=True):
        if target.split(".")[0] != name.split(".")[0]:
            assert name.startswith("slipstream."), f"{name}: kernels must not import the engine ({target})"
            continue
        if target in PACKAGES:
            continue
        floor = stated_floor(target)
        assert floor is not None
        assert floor <= own, f"{name} (floor {own}) imports {target} (floor {floor}): imports run downwards"


@pytest.mark.parametrize("name", sorted(ROLES))
def test_roles_never_import_each_other(name: str) -> None:
    if name in SOURCES:
        others = imported_modules(name, types_too=True) & (ROLES - {name})
        assert not others, f"{name} imports another role: {sorted(others)}"


def test_no_import_cycles() -> None:
    graph = {name: imported_modules(name, types_too=False) for name in SOURCES if name not in PACKAGES}
    while graph:
        leaves = {name for name, targets in graph.items() if not targets & graph.keys()}
        assert leaves, f"these modules import each other in a circle, or depend on one: {sorted(graph)}"
        graph = {name: targets for name, targets in graph.items() if name not in leaves}


def non_blank_lines(path: Path) -> int:
    return sum(1 for line in path.read_text().splitlines() if line.strip())


@pytest.mark.parametrize("name", SOURCES)
def test_file_size(name: str) -> None:
    lines = non_blank_lines(SOURCES[name])
    assert lines <= MAX_FILE_LINES, (
        f"{SOURCES[name]}: {lines} lines, at most {MAX_FILE_LINES}; aim: {AIM_FILE_LINES}"
    )


@pytest.mark.parametrize("name", SOURCES)
def test_function_size(name: str) -> None:
    limit = MAX_FUNCTION_LINES[name.split(".")[0]]
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            docstring = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
            assert lines <= limit, f"{name}:{node.lineno}: {node.name} has {lines} lines, at most {limit}"


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_unpickled_or_evaluated(name: str) -> None:
    roots = {target.split(".")[0] for target in imported_names(name, types_too=True)}
    assert not roots & FORBIDDEN_MODULES, f"{name} imports {sorted(roots & FORBIDDEN_MODULES)}"
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            last = called if isinstance(node.func, ast.Name) else called.rpartition(".")[2]
            forbidden = called in FORBIDDEN_CALLS or last in {"recv_pyobj", "send_pyobj"}
            assert not forbidden, f"{name}:{node.lineno}: {called}"


@pytest.mark.parametrize("name", SOURCES)
def test_no_globals_and_no_broad_except(name: str) -> None:
    for node in ast.walk(tree_of(name)):
        assert not isinstance(node, ast.Global), f"{name}:{node.lineno}: global statement"
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            assert caught not in {"", "Exception"}, (
                f"{name}:{node.lineno}: catch what you can mend, not {caught!r}"
            )


@pytest.mark.parametrize("name", SOURCES)
def test_public_names_are_sorted(name: str) -> None:
    for node in tree_of(name).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert names == sorted(names), f"{name}.__all__ is not sorted"


@pytest.mark.parametrize("name", ENGINE)
def test_every_public_function_of_a_line_or_more_is_documented(name: str) -> None:
    for node in tree_of(name).body:
        public = (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_"
        )
        if public:
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            assert ast.get_docstring(node), f"{name}:{node.lineno}: {node.name} has no docstring"


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return {module.split(".")[0] for module in done.stdout.split()}


def test_imports_are_light() -> None:
    assert not loaded_after("import slipstream, slipstream_kernels") & (HEAVY | {"numpy", "pydantic"})


@pytest.mark.parametrize("name", ["slipstream.hub", "slipstream.launch", "slipstream.cli"])
def test_hub_launcher_and_command_line_need_no_torch(name: str) -> None:
    if name not in SOURCES:
        pytest.skip(f"{name} does not exist yet")
    assert not loaded_after(f"import {name}") & {"torch", "transformers", "triton"}


def test_public_names_of_the_engine_exist() -> None:
    import slipstream

    assert set(slipstream._MODULE_OF_NAME) | {"__version__"} == set(slipstream.__all__)
    assert all(getattr(slipstream, name) is not None for name in slipstream.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        slipstream.nonsense  # noqa: B018
