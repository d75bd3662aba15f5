"""Python for those one does not trust: it computes, and reaches nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psutil
import pytest

from slipstream.errors import ToolError
from slipstream.tools.interpreter import MOST_OUTPUT, Interpreter

pytest.importorskip("pydantic_monty")


@pytest.fixture
def interpreter() -> Iterator[Interpreter]:
    made = Interpreter(seconds=0.3, wait_s=20.0)
    yield made
    made.close()


def said(interpreter: Interpreter, code: str) -> str:
    try:
        return asyncio.run(interpreter.run(code))
    except ToolError as error:
        return f"error: {error}"


def test_what_it_returns(interpreter: Interpreter) -> None:
    for code, shown in (
        ("1 + 1", "2"),
        ("print(3)\n4", "3\n4"),
        ("'a' * 3", "aaa"),
        ("print('a')\nNone", "a"),
        ("x = 1", "no output"),
        ("[1, 'a']", "[1, 'a']"),
        ("import math\nmath.gcd(12, 18)", "6"),
        ("'x' * 5000", "x" * MOST_OUTPUT + f"\n[cut at {MOST_OUTPUT} characters]"),
    ):
        assert said(interpreter, code) == shown


def test_what_it_refuses(interpreter: Interpreter) -> None:
    for code, shown in (
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x", "NameError: name 'x' is not defined"),
        ("def", "SyntaxError: Expected an identifier"),
        ("open('/etc/passwd').read()", "PermissionError: Permission denied: '/etc/passwd'"),
        ("import os\nos.listdir('/')", "PermissionError: Permission denied: '/'"),
        ("import socket", "ModuleNotFoundError: No module named 'socket'"),
        ("import subprocess", "ModuleNotFoundError: No module named 'subprocess'"),
        ("while True: pass", "TimeoutError: more than 0.3 s"),
        ("'x' * 10 ** 10", "MemoryError: memory limit exceeded"),
        ("for i in range(10 ** 5): print(i)", "MemoryError: memory limit exceeded"),
        ("def f(): return f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("raise SystemExit", "SystemExit"),
    ):
        assert said(interpreter, code) == f"error: {shown}"
        # Nothing that a snippet does outlives it.
        assert said(interpreter, "1 + 1") == "2"


def test_nothing_carries_over_and_all_is_repeatable(interpreter: Interpreter) -> None:
    assert said(interpreter, "x = 1\nx") == "1"
    assert said(interpreter, "x") == "error: NameError: name 'x' is not defined"
    dice = "import random, datetime, time\ntime.sleep(9)\nprint(random.random(), datetime.datetime.now())"
    assert said(interpreter, dice) == said(interpreter, dice)
    assert "2024-01-01 00:00:00" in said(interpreter, dice)


def test_many_at_once_and_none_left(interpreter: Interpreter) -> None:
    async def every() -> list[str]:
        return await asyncio.gather(*(interpreter.run(f"{n} ** 2") for n in range(40)))

    assert asyncio.run(every()) == [str(n * n) for n in range(40)]
    mine = [child for child in psutil.Process().children() if child.name() == "monty"]
    assert mine
    interpreter.close()
    _, alive = psutil.wait_procs(mine, timeout=20)
    assert not alive
    # It starts again when it is asked again.
    assert said(interpreter, "2 + 2") == "4"
