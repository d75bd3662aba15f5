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
FORBIDDEN_MODULES = {
    "cloudpickle",
    "dill",
    "joblib",
    "jsonpickle",
    "marshal",
    "msgpack_numpy",
    "pickle",
    "pickle5",
    "shelve",
    "yaml",
    "_pickle",
}
"""What makes objects, or runs code, out of bytes; modules of the tree need none of them."""
FORBIDDEN_CALLS = {
    "compile",
    "eval",
    "exec",
    "numpy.load",
    "np.load",
    "numpy.save",
    "np.save",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
}
FORBIDDEN_METHODS = {"recv_pyobj", "recv_serialized", "send_pyobj", "allow_pickle"}
FORBIDDEN_KEYWORDS = {"allow_pickle", "weights_only", "trust_remote_code"}
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
    assert list(unpickling(tree_of(name))) == []


def unpickling(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that could turn bytes into objects or code."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, a.name) for a in names if a.name.split(".")[0] in FORBIDDEN_MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN_MODULES:
                yield node.lineno, module
            case ast.Call(func=func, keywords=keywords):
                called = ast.unparse(func)
                last = called.rpartition(".")[2]
                imports = {"import_module", "__import__"} & {last}
                named = {value for value in FORBIDDEN_MODULES if repr(value) in ast.unparse(node)}
                if called in FORBIDDEN_CALLS or last in FORBIDDEN_METHODS or (imports and named):
                    yield node.lineno, called
                yield from ((node.lineno, k.arg) for k in keywords if k.arg in FORBIDDEN_KEYWORDS)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from _pickle import Unpickler",
        "import marshal",
        "import shelve",
        "import joblib",
        "import dill",
        "import cloudpickle.compat",
        "import yaml",
        "def f():\n import pickle",
        "importlib.import_module('pickle')",
        "__import__('marshal')",
        "eval(x)",
        "exec(x)",
        "compile(x, 'f', 'exec')",
        "torch.load(f)",
        "torch.load(f, weights_only=True)",
        "np.load(f)",
        "numpy.load(f, allow_pickle=True)",
        "np.fromfile(f, allow_pickle=True)",
        "socket.recv_pyobj()",
        "from_pretrained(p, trust_remote_code=True)",
    ],
)
def test_the_lint_of_pickle_sees_each_kind(source: str) -> None:
    assert list(unpickling(ast.parse(source)))


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


# Waits. What blocks, and what bounds it.

BLOCKING_METHODS = {
    "accept",
    "acquire",
    "communicate",
    "get",
    "join",
    "poll",
    "readline",
    "receive",
    "select",
    "wait",
    "waitpid",
}
"""Without an argument they wait for ever, or for whatever is told below."""
BLOCKING_CALLS = {
    "asyncio.gather",
    "asyncio.wait",
    "input",
    "os.wait",
    "os.waitpid",
    "select.select",
    "subprocess.call",
    "subprocess.check_call",
    "subprocess.check_output",
    "subprocess.run",
}
BOUNDS = {"asyncio.timeout", "asyncio.timeout_at", "asyncio.wait_for", "within"}


def waits_without_deadline(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """("function: source", line) of each call or await that nothing in its function bounds."""
    for function, node, bounded in _with_function(tree, "", False):
        if not bounded and ((isinstance(node, ast.Await) and _is_bare(node)) or _blocks(node)):
            yield f"{function}: {ast.unparse(node)}", node.lineno  # type: ignore[attr-defined]


def _with_function(node: ast.AST, function: str, bounded: bool) -> Iterator[tuple[str, ast.AST, bool]]:
    """Every node with the qualified name of its function, and whether a deadline encloses it."""
    for child in ast.iter_child_nodes(node):
        inside, limited = function, bounded
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside, limited = f"{function}.{child.name}".lstrip("."), False
        elif isinstance(child, ast.AsyncWith):
            limited |= any(_called(item.context_expr) in BOUNDS for item in child.items)
        elif isinstance(child, ast.Call):
            limited |= _called(child) in BOUNDS
        yield function, child, limited
        yield from _with_function(child, inside, limited)


def _called(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def _is_bare(node: ast.Await) -> bool:
    """An awaited future or task: a coroutine's own waits are seen in its own body."""
    return not isinstance(node.value, ast.Call)


def _blocks(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    called, given = _called(node), {keyword.arg for keyword in node.keywords}
    if called in BLOCKING_CALLS:
        return not {"timeout", "timeout_s"} & given
    if called in {"fcntl.flock", "fcntl.lockf"}:
        return not any(flag in ast.unparse(node.args[1]) for flag in ("LOCK_NB", "LOCK_UN"))
    if not isinstance(node.func, ast.Attribute):
        return False
    method = node.func.attr
    if method.startswith("recv"):
        return not node.args and "flags" not in given
    # Asking a subprocess whether it has ended does not wait.
    asks = method == "poll" and ast.unparse(node.func.value).endswith("process")
    return method in BLOCKING_METHODS and not node.args and not node.keywords and not asks


PERMITTED_WAITS = {
    # Users' functions run inside an episode, which has a deadline (ground.py).
    "slipstream.foreign": {"settled: await value"},
    # Released by the backend; whoever asks has the deadline, be it a client or an episode.
    "slipstream.gateway.app": {"Gateway._call: await working"},
    # The role's main wait, and what it has just cancelled.
    "slipstream.open_gateway": {
        "_serve: stopping.wait()",
        "_serve: asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)",
        "_serve: asyncio.gather(*tasks, return_exceptions=True)",
        # Until an agent has finished, for which it has environment.timeout_s.
        "_offer: room.acquire()",
    },
    # Ends when the run does: the role's main wait. Its peers watch it by pings, the supervisor by its ring.
    "slipstream.actor": {
        "_serve: await serving",
        "Actor.serve: self._stopping.wait()",
        "Actor.serve: asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)",
        # Tasks just cancelled.
        "Actor.serve: asyncio.gather(*self._tasks, return_exceptions=True)",
        # A loop of an actor: its own client raises when the hub has been silent too long.
        "Actor._receive: self._client.receive()",
        # Until a place becomes free; each episode has a deadline.
        "Actor._ask: self._changed.wait()",
    },
    "slipstream.serve": {
        # The role's main wait: its supervisor watches its ring, its keepers and its client raise.
        "Serve._until_stopped: self._stopping.wait()",
        "Serve._until_stopped: asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)",
        # Tasks just cancelled.
        "Serve._until_stopped: asyncio.gather(*tasks, return_exceptions=True)",
        # Its own client raises when the hub has been silent too long.
        "Serve._receive: self._client.receive()",
    },
    # Whoever asks has the deadline, and hangs up.
    "slipstream.inference.vllm.front": {
        "Front._handed_on: asyncio.wait({asking, gone}, return_when=asyncio.FIRST_COMPLETED)",
        "_hung_up: request.receive()",
        # Tasks just cancelled.
        "Front.close: asyncio.gather(*self._working, return_exceptions=True)",
        "Front._handed_on: asyncio.gather(asking, gone, return_exceptions=True)",
    },
    "slipstream.inference.vllm.fleet": {
        # Tasks just cancelled.
        "Fleet.load: asyncio.gather(*asking, return_exceptions=True)",
        "Fleet.close: asyncio.gather(*self._proving.values(), return_exceptions=True)",
    },
    # Its caller has the deadline; the end of the server's life releases it, too.
    "slipstream.inference.vllm.keeper": {"Keeper.proof: self._proven.wait()"},
    # In the foreground: whoever started the benchmark sees it and can stop it.
    "slipstream.commands.supplies": {"_bench: subprocess.run(command, check=False)"},
    "slipstream.environments.adapters.foreign": {
        # As long as a foreign program lives: its calls have deadlines, its owner kills it.
        "Foreign._watch: self._process.wait()",
        "Foreign._watch: asyncio.wait({exited, self._reading}, return_when=asyncio.FIRST_COMPLETED)",
    },
    # In a foreign interpreter: whoever called has the deadline, and kills that process.
    "slipstream.environments.adapters.of_verifiers": {
        "VerifiersEpisode._step: asyncio.wait({calling})",
        "settled: await value",
    },
    "slipstream.environments.adapters.worker": {"awaited.result: await value"},
    "slipstream.inference.embedded": {
        # Called inside an episode, which has a deadline (episodes.py).
        "EmbeddedBackend.generate: await request.future",
        "EmbeddedBackend._take_row: self._room.acquire()",
        # An idle backend, until the next generate.
        "EmbeddedBackend.run: self._work.wait()",
    },
    # Episodes, each with a deadline.
    "slipstream.inference.trial": {"_all: asyncio.gather(*episodes)"},
    "slipstream.serial": {
        # One thread: the actor ends by its own deadlines once the hub has said Stop.
        "_run: await serving",
        "_run: asyncio.gather(serving, return_exceptions=True)",
    },
    # A child that calls one function of the kernel and ends.
    "slipstream.tools.confinement": {"namespaces_work: os.waitpid(child, 0)"},
    "slipstream.tools.forkserver": {
        # The sandbox's own processes: each ends with its worker or its leash; a call's caller has a deadline.
        "main: os.wait()",
        "Keeper._keep: select.select([self.leash.fileno(), os.pidfd_open(worker)], [], [])",
        "Keeper._keep: os.waitpid(worker, 0)",
        "_answer: asyncio.wait({call})",
        "end_descendants: os.waitpid(-1, os.WNOHANG)",
    },
    "slipstream.tools.sandbox": {
        # Asks a process, waits for nothing.
        "Sandbox.worker: server.poll()",
        # After SIGKILL.
        "_end: server.wait()",
    },
    "slipstream.transport.actor_client": {
        # The core's timer ends the connection after `silence_s`, which puts None into the inbox.
        "ActorClient.receive: self._inbox.get()",
        "ActorClient._read: self._channel.receive()",
        "ActorClient._guard: await work",
        # The core's timer raises when one of its waits has run out.
        "ActorClient._until: await changed",
        # Idle while the channel takes everything at once; what it does not take has a deadline.
        "ActorClient._write: self._stuck.wait()",
        # Tasks just cancelled.
        "ActorClient.close: asyncio.gather(*self._tasks, return_exceptions=True)",
    },
    # Both ends of a channel: their callers bound them.
    "slipstream.transport.memory": {"MemoryChannel.receive: self._arrived.wait()"},
    "slipstream.transport.dealer": {
        "DealerChannel._wait: ready.wait()",
        # Only while the monitor has something.
        "_Connection.remade: self.monitor.recv_multipart()",
    },
    "slipstream.transport.door": {
        # Only what a poll has announced.
        "Door._run: self._zap.recv_multipart()",
        "Door._run: self._monitor.recv_multipart()",
        # A thread that looks twenty times a second whether it is to end.
        "Door.close: self._thread.join()",
    },
}
"""Waits without a deadline of their own, each with what ends it."""


@pytest.mark.parametrize("name", SOURCES)
def test_every_wait_has_a_deadline(name: str) -> None:
    found = dict(waits_without_deadline(tree_of(name)))
    permitted = PERMITTED_WAITS.get(name, set())
    new = {wait: line for wait, line in found.items() if wait not in permitted}
    assert not new, f"{name}: give these a timeout, or permit them with the reason that ends them: {new}"
    assert permitted <= found.keys(), f"{name}: no longer there: {sorted(permitted - found.keys())}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("queue.get()", ["queue.get()"]),
        ("queue.get(timeout=1)", []),
        ("table.get('a')", []),
        ("thread.join()", ["thread.join()"]),
        ("', '.join(names)", []),
        ("lock.acquire()", ["lock.acquire()"]),
        ("lock.acquire(timeout=1.0)", []),
        ("process.wait()", ["process.wait()"]),
        ("process.wait(timeout=3)", []),
        ("process.poll()", []),
        ("socket.poll()", ["socket.poll()"]),
        ("socket.poll(5)", []),
        ("socket.recv()", ["socket.recv()"]),
        ("socket.recv_multipart()", ["socket.recv_multipart()"]),
        ("socket.recv(_NOW)", []),
        ("process.communicate()", ["process.communicate()"]),
        ("subprocess.run(command)", ["subprocess.run(command)"]),
        ("subprocess.run(command, timeout=3)", []),
        ("fcntl.flock(file, fcntl.LOCK_EX)", ["fcntl.flock(file, fcntl.LOCK_EX)"]),
        ("fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", []),
        ("await future", ["await future"]),
        ("await asyncio.wait(tasks)", ["asyncio.wait(tasks)"]),
        ("await asyncio.wait(tasks, timeout=1)", []),
        ("await event.wait()", ["event.wait()"]),
        ("await within(event.wait(), 3.0, 'a', 'b')", []),
        ("await asyncio.wait_for(event.wait(), 3.0)", []),
        ("async with asyncio.timeout(3):\n  await event.wait()", []),
        ("async with lock:\n  await event.wait()", ["event.wait()"]),
        ("async with asyncio.timeout(3):\n  def g():\n   event.wait()", ["event.wait()"]),
    ],
)
def test_the_lint_of_waits_sees_each_kind(source: str, found: list[str]) -> None:
    body = "\n ".join(source.split("\n"))
    waits = [wait for wait, _ in waits_without_deadline(ast.parse(f"async def f():\n {body}"))]
    assert [wait.partition(": ")[2] for wait in waits] == found


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
